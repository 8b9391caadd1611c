from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mint_ray.config.loader import UserError, from_data, load
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.specs import config_class
from mint_ray.remote.package import MAX_FILE_BYTES, MAX_PACKAGE_BYTES, SPEC, JobPackage, build_package
from tests.specs import verb_of

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))
BUCKET = "s3://bucket/run"


def config(**sections: Any) -> PipelineConfig:
    data = {
        "root": BUCKET,
        "task": {"kind": "rare_disease"},
        "prepare": {"source": {"kind": "hpo"}},
        "train": {"student": {"model_id": "bundled:smollm2-135m-instruct"}},
    }
    return from_data(PipelineConfig, data | sections)


def config_with_table(uri: str) -> PipelineConfig:
    return config(prepare={"source": {"kind": "table", "uri": uri}})


def config_with_teacher(path: str, **options: Any) -> PipelineConfig:
    return config(fit={"teacher": {"kind": "import", "path": path, "options": options}})


def package_of(made: PipelineConfig, working_dir: Path, verb: str = "run", **options: Any) -> JobPackage:
    return build_package(made, verb, **{"shared_disk": False, "working_dir": working_dir, **options})


def test_the_shipped_specs_are_found() -> None:
    assert "quickstart.yaml" in {path.name for path in JOBS}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_the_packaged_spec_loads_as_the_resolved_config(path: Path, tmp_path: Path) -> None:
    cls = config_class(verb_of(path))
    made = load(cls, path, [f"root={BUCKET}", "prepare.source={kind: hpo}"])
    package = package_of(made, tmp_path)
    assert list(package.files) == [SPEC]
    (tmp_path / SPEC).write_bytes(package.files[SPEC])
    assert load(cls, tmp_path / SPEC) == made
    assert package.root == BUCKET


def test_the_fingerprint_ignores_resources(tmp_path: Path) -> None:
    base, other = package_of(config(), tmp_path), package_of(config(score={"ablate": ["face"]}), tmp_path)
    wide = package_of(config(score={"resources": {"actors": 8}}), tmp_path)
    assert package_of(config(), tmp_path) == base
    assert wide.fingerprint == base.fingerprint
    assert wide.resources != base.resources
    assert len({base.fingerprint, other.fingerprint, package_of(config(), tmp_path, verb="score").fingerprint}) == 3
    assert package_of(config(root="s3://bucket/other"), tmp_path).fingerprint != base.fingerprint


def test_imported_code_is_packaged_and_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("__init__.py", "teachers.py", "notes.bin"):
        (folder / name).write_text("x = 1\n")
    first = package_of(config_with_teacher("mine.teachers:Mine"), tmp_path)
    assert set(first.files) == {SPEC, "mine/__init__.py", "mine/teachers.py"}
    (folder / "teachers.py").write_text("x = 2\n")
    assert package_of(config_with_teacher("mine.teachers:Mine"), tmp_path).fingerprint != first.fingerprint
    assert set(package_of(config_with_teacher("installed.teachers:Theirs"), tmp_path).files) == {SPEC}


def test_a_text_file_named_by_a_relative_path_is_packaged_at_that_path(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "words.txt").write_text("a\nb\n")
    package = package_of(config_with_teacher("installed:Theirs", words="lists/words.txt"), tmp_path)
    assert package.files["lists/words.txt"] == b"a\nb\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cases.parquet", b"PAR1", "is data"),
        ("cases.csv", b"a,b\n", "is data"),
        (".env", b"A=1", "looks like a secret"),
        ("credentials", b"A=1", "looks like a secret"),
        ("id_rsa", b"A=1", "looks like a secret"),
        ("server.pem", b"A=1", "looks like a secret"),
        ("long.json", b"1" * (MAX_FILE_BYTES + 1), f"{MAX_FILE_BYTES + 1:,} bytes"),
        ("key.txt", b"\n-----BEGIN RSA PRIVATE KEY-----\n", "line 2: looks like a secret"),
        ("aws.yaml", b"id: AKIAIOSFODNN7EXAMPLE\n", "line 1: looks like a secret"),
    ],
)
def test_data_and_secrets_are_rejected_by_name(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    for path in (f"in/{name}", "in"):
        with pytest.raises(UserError, match=expected) as raised:
            package_of(config_with_table(path), tmp_path)
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_package_above_the_size_limit_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(MAX_PACKAGE_BYTES // MAX_FILE_BYTES + 1):
        (tmp_path / "in" / f"{number}.txt").write_bytes(b"1" * MAX_FILE_BYTES)
    with pytest.raises(UserError, match=f"the limit is {MAX_PACKAGE_BYTES:,}"):
        package_of(config_with_table("in"), tmp_path)


def test_a_tokenizer_file_is_not_mistaken_for_a_token(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "tokenizer.json").write_text("{}")
    made = config(train={"student": {"model_id": "student"}})
    assert "student/tokenizer.json" in package_of(made, tmp_path).files


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (config_with_table("s3://someone:hunter2@bucket/x.csv"), "looks like a secret"),
        (config_with_table("../elsewhere.csv"), "is outside"),
        (config_with_table("none.csv"), "uri: none.csv: no such file"),
        (config_with_table("/etc/hostname"), "uri: /etc/hostname: is on this machine's disk"),
        (config(root="out"), "root: out: is on this machine's disk"),
        (config(root="file:///out"), "root: file:///out: is on this machine's disk"),
    ],
    ids=["password", "outside", "missing", "absolute", "root", "file_root"],
)
def test_paths_that_the_cluster_cannot_see_are_rejected(tmp_path: Path, made: PipelineConfig, expected: str) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere.csv").write_text("a\n")
    with pytest.raises(UserError, match=expected):
        package_of(made, tmp_path / "here")


def test_a_symbolic_link_out_of_the_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "private.txt").write_text("a\n")
    (tmp_path / "here" / "link.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(UserError, match="is outside"):
        package_of(config_with_table("link.txt"), tmp_path / "here")


def test_on_a_shared_disk_paths_become_absolute_and_data_is_not_packaged(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text("a\n")
    made = config(root=str(tmp_path / "out"), prepare={"source": {"kind": "table", "uri": "cases.csv"}})
    package = package_of(made, tmp_path, shared_disk=True)
    assert list(package.files) == [SPEC]
    (tmp_path / SPEC).write_bytes(package.files[SPEC])
    expected = config_with_table(str(tmp_path / "cases.csv")).prepare.source
    assert load(PipelineConfig, tmp_path / SPEC).prepare.source == expected
    assert package.root == str(tmp_path / "out")


def test_requirements_are_read_and_change_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "more.txt"
    path.write_text("# not in the image\n\nopen_clip_torch==3.2.0  # the teacher's encoder\n")
    package = package_of(config(), tmp_path, requirements=path)
    assert package.requirements == ["open_clip_torch==3.2.0"]
    assert package.fingerprint != package_of(config(), tmp_path).fingerprint
    path.write_text("x @ https://me:hunter2@index.example.com/x.whl\n")
    with pytest.raises(UserError, match=r"more.txt: line 1: looks like a secret"):
        package_of(config(), tmp_path, requirements=path)
