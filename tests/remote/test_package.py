from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mint_ray.config.loader import UserError, from_data, load
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.specs import config_class
from mint_ray.remote.package import FILE_BYTES, SPEC, Parcel, pack
from tests.specs import verb_of

JOBS = sorted((Path(__file__).parents[1] / "jobs").glob("*.yaml"))
BUCKET = "s3://bucket/run"


def config(**sections: Any) -> PipelineConfig:
    said = {
        "root": BUCKET,
        "task": {"kind": "rare_disease"},
        "prepare": {"source": {"kind": "hpo"}},
        "train": {"student": {"model_id": "bundled:smollm2-135m-instruct"}},
    }
    return from_data(PipelineConfig, said | sections)


def table(uri: str) -> PipelineConfig:
    return config(prepare={"source": {"kind": "table", "uri": uri}})


def teacher(path: str, **options: Any) -> PipelineConfig:
    return config(fit={"teacher": {"kind": "import", "path": path, "options": options}})


def packed(made: PipelineConfig, here: Path, **how: Any) -> Parcel:
    return pack(made, how.pop("verb", "run"), shared_disk=how.pop("shared_disk", False), here=here, **how)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_the_spec_that_travels_is_the_spec_that_was_resolved(path: Path, tmp_path: Path) -> None:
    cls = config_class(verb_of(path))
    made = load(cls, path, [f"root={BUCKET}", "prepare.source={kind: hpo}"])
    parcel = packed(made, tmp_path)
    assert list(parcel.files) == [SPEC]
    (tmp_path / SPEC).write_bytes(parcel.files[SPEC])
    assert load(cls, tmp_path / SPEC) == made
    assert parcel.root == BUCKET


def test_the_name_is_that_of_the_recipe_whatever_machines_it_asks_for(tmp_path: Path) -> None:
    base, other = packed(config(), tmp_path), packed(config(score={"without": ["face"]}), tmp_path)
    wide = packed(config(score={"resources": {"actors": 8}}), tmp_path)
    assert packed(config(), tmp_path) == base
    assert wide.recipe == base.recipe
    assert wide.resources != base.resources
    assert len({base.recipe, other.recipe, packed(config(), tmp_path, verb="score").recipe}) == 3
    assert packed(config(root="s3://bucket/other"), tmp_path).recipe != base.recipe


def test_code_that_the_spec_imports_travels_and_is_part_of_the_name(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    for name in ("__init__.py", "teachers.py", "notes.bin"):
        (package / name).write_text("x = 1\n")
    first = packed(teacher("mine.teachers:Mine"), tmp_path)
    assert set(first.files) == {SPEC, "mine/__init__.py", "mine/teachers.py"}
    (package / "teachers.py").write_text("x = 2\n")
    assert packed(teacher("mine.teachers:Mine"), tmp_path).recipe != first.recipe
    assert set(packed(teacher("installed.teachers:Theirs"), tmp_path).files) == {SPEC}


def test_small_text_named_by_a_relative_path_travels_to_the_same_path(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "words.txt").write_text("a\nb\n")
    parcel = packed(teacher("installed:Theirs", words="lists/words.txt"), tmp_path)
    assert parcel.files["lists/words.txt"] == b"a\nb\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cases.parquet", b"PAR1", "is data"),
        ("cases.csv", b"a,b\n", "is data"),
        (".env", b"A=1", "looks like a secret"),
        ("credentials", b"A=1", "looks like a secret"),
        ("id_rsa", b"A=1", "looks like a secret"),
        ("server.pem", b"A=1", "looks like a secret"),
        ("long.json", b"1" * (FILE_BYTES + 1), f"{FILE_BYTES + 1:,} bytes"),
        ("key.txt", b"\n-----BEGIN RSA PRIVATE KEY-----\n", "line 2: looks like a secret"),
        ("aws.yaml", b"id: AKIAIOSFODNN7EXAMPLE\n", "line 1: looks like a secret"),
    ],
)
def test_data_and_secrets_stay_here_and_are_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    for path in (f"in/{name}", "in"):
        with pytest.raises(UserError, match=expected) as raised:
            packed(table(path), tmp_path)
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_tokenizer_is_no_token(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "tokenizer.json").write_text("{}")
    made = config(train={"student": {"model_id": "student"}})
    assert "student/tokenizer.json" in packed(made, tmp_path).files


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (table("s3://someone:hunter2@bucket/x.csv"), "looks like a secret"),
        (table("../elsewhere.csv"), "lies outside"),
        (table("none.csv"), "uri: none.csv: no such file"),
        (table("/etc/hostname"), "uri: /etc/hostname: lies on this machine's disk"),
        (config(root="out"), "root: out: lies on this machine's disk"),
        (config(root="file:///out"), "root: file:///out: lies on this machine's disk"),
    ],
    ids=["password", "outside", "missing", "absolute", "root", "file_root"],
)
def test_what_a_machine_elsewhere_does_not_see_is_refused(tmp_path: Path, made: PipelineConfig, expected: str) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere.csv").write_text("a\n")
    with pytest.raises(UserError, match=expected):
        packed(made, tmp_path / "here")


def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "private.txt").write_text("a\n")
    (tmp_path / "here" / "link.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(UserError, match="lies outside"):
        packed(table("link.txt"), tmp_path / "here")


def test_on_a_shared_disk_paths_become_absolute_and_data_stays_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text("a\n")
    made = config(root=str(tmp_path / "out"), prepare={"source": {"kind": "table", "uri": "cases.csv"}})
    parcel = packed(made, tmp_path, shared_disk=True)
    assert list(parcel.files) == [SPEC]
    (tmp_path / SPEC).write_bytes(parcel.files[SPEC])
    assert load(PipelineConfig, tmp_path / SPEC).prepare.source == table(str(tmp_path / "cases.csv")).prepare.source
    assert parcel.root == str(tmp_path / "out")


def test_requirements_are_declared_and_part_of_the_name(tmp_path: Path) -> None:
    path = tmp_path / "more.txt"
    path.write_text("# what the image lacks\n\nopen_clip_torch==3.2.0  # the teacher's encoder\n")
    parcel = packed(config(), tmp_path, requirements=path)
    assert parcel.requirements == ["open_clip_torch==3.2.0"]
    assert parcel.recipe != packed(config(), tmp_path).recipe
    path.write_text("x @ https://me:hunter2@index.example.com/x.whl\n")
    with pytest.raises(UserError, match=r"more.txt: line 1: looks like a secret"):
        packed(config(), tmp_path, requirements=path)
