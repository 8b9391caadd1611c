"""The dataset card of pairs, in the format of the Hub and of `datasets`."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mint_ray.artifacts import Artifact, open_artifact, verify
from mint_ray.records import Message, PreferencePair, schema_of
from mint_ray.reports.dataset_card import CARD, COLUMN_MEANINGS, render_dataset_card

NOTE = "A 4-year-old boy has ```seizures``` | and\n\n# no heading"


def make_pair(number: int, split: str) -> PreferencePair:
    return PreferencePair(
        prompt=[Message(role="system", content="Keep to the format."), Message(role="user", content=NOTE)],
        chosen=[Message(role="assistant", content="1. 'Noonan syndrome'")],
        rejected=[Message(role="assistant", content="1. 'Marfan syndrome'")],
        record_id=f"r{number}", split=split, teacher="ontology", sampler="hard",  # type: ignore[arg-type]
        chosen_labels=["OMIM:163950"], rejected_labels=["OMIM:154700"],
    )  # fmt: skip


def write_pairs(
    root: str,
    *,
    train: int = 3,
    validation: int = 2,
    in_place: bool = False,
    image: str | None = None,
    texts: dict[str, str] | None = None,
    **source: Any,
) -> Artifact:
    """Write records, a teacher, its scores and pairs as the stages do; `in_place` as workers write them."""
    source = {"kind": "table", "uri": "s3://me:hunter2@bucket/cases.csv?secret_key=hunter3"} | source
    records = open_artifact(root, "prepare", {"prepare": {"source": source}}, {source["uri"]: "abc123"})
    with records.write() as draft:
        draft.counts.update(records_train=3, records_validation=2, labels=20)
        draft.dropped["note_names_diagnosis"] = 7
    if texts:
        source_name = records.name
        records = open_artifact(root, "match_texts", {"match_texts": {"source": texts}}, {"records": source_name})
        with records.write() as draft:
            draft.counts.update(records_train=3, records_validation=2, labels=20)
            draft.dropped["no_text_above_min_similarity"] = 5
    options = {"api_key": "hunter4", "depth": 2}
    teacher = open_artifact(root, "fit", {"fit": {"teacher": {"kind": "import", "options": options}}}, {"pyhpo": "4.0"})
    with teacher.write():
        pass
    scores = open_artifact(root, "score", {}, {"teacher": teacher.name})
    with scores.write() as draft:
        draft.metrics["scores"] = {"top_1_accuracy": 0.9, "records": 2}
    pairs = open_artifact(
        root,
        "pair",
        {"pair": {"sampler": {"kind": "hard", "top": 1}}},
        {"records": records.name, "scores": scores.name},
    )
    with pairs.write() as draft:
        for split, count in (("train", train), ("validation", validation)):
            rows = [dataclasses.replace(make_pair(number, split), image_uri=image) for number in range(count)]
            if in_place:
                draft.placed.append(pairs.write_part(f"{split}/part-00000.parquet", PreferencePair, rows))
            else:
                draft.write_rows(PreferencePair, split, rows)
        draft.dropped["teacher_failed"] = 4
        draft.write_text(CARD, render_dataset_card(pairs, draft, records, scores))
    return pairs


def card(pairs: Artifact) -> str:
    return (Path(pairs.uri) / CARD).read_text()


def metadata(pairs: Artifact) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(card(pairs).split("---\n")[1])
    return loaded


def test_every_column_has_a_meaning() -> None:
    assert {field.name for field in dataclasses.fields(PreferencePair)} <= set(COLUMN_MEANINGS)


@pytest.mark.parametrize("in_place", [False, True])
def test_datasets_finds_both_splits_by_the_metadata(tmp_path: Path, in_place: bool) -> None:
    from datasets import load_dataset

    pairs = write_pairs(str(tmp_path / "out"), in_place=in_place)
    assert verify(pairs.uri) == []
    assert CARD in [file.path for file in pairs.manifest.files]
    loaded = load_dataset(pairs.uri, cache_dir=str(tmp_path / "cache"))
    assert {split: rows.num_rows for split, rows in loaded.items()} == {"train": 3, "validation": 2}
    assert loaded["train"].column_names == schema_of(PreferencePair).names
    assert loaded["validation"][1]["record_id"] == "r1"


def test_pairs_with_an_empty_part_and_an_empty_split_can_be_loaded(tmp_path: Path) -> None:
    from datasets import load_dataset

    pairs = write_pairs(str(tmp_path / "out"), validation=0)
    pairs.write_part("train/part-00000-000.parquet", PreferencePair, [])
    loaded = load_dataset(pairs.uri, cache_dir=str(tmp_path / "cache"))
    assert {split: rows.num_rows for split, rows in loaded.items()} == {"train": 3}


def test_the_hub_reads_the_metadata(tmp_path: Path) -> None:
    from huggingface_hub import DatasetCard

    data = DatasetCard(card(write_pairs(str(tmp_path), license="CC-BY-4.0"))).data
    assert (data.license, data.size_categories, data.task_categories) == ("cc-by-4.0", ["n<1K"], ["text-generation"])


def test_the_card_describes_the_image_of_a_pair(tmp_path: Path) -> None:
    from huggingface_hub import DatasetCard

    sentence = "The student reads an image"
    assert sentence not in card(write_pairs(str(tmp_path / "text")))
    with_image = card(write_pairs(str(tmp_path / "image"), image="images/`7`.jpg"))
    assert DatasetCard(with_image).data.task_categories == ["image-text-to-text"]
    assert sentence in with_image
    assert "image:\n\n```text\nimages/`7`.jpg\n```" in with_image


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"license": "unknown"}),
        ("cc0-1.0", {"license": "cc0-1.0"}),
        ("On application: see\n our terms", {"license": "other", "license_name": "on-application-see-our-terms"}),
        ("no", {"license": "other", "license_name": "no"}),
    ],
)
def test_the_license_is_that_of_the_source_or_unknown(
    tmp_path: Path, given: str | None, expected: dict[str, str]
) -> None:
    found = metadata(write_pairs(str(tmp_path), license=given))
    assert {key: value for key, value in found.items() if key.startswith("license")} == expected


@pytest.mark.parametrize(("rows", "size"), [(999, "n<1K"), (1000, "1K<n<10K")])
def test_the_size_category_counts_both_splits(tmp_path: Path, rows: int, size: str) -> None:
    assert metadata(write_pairs(str(tmp_path), train=rows - 2))["size_categories"] == [size]


def test_the_card_contains_counts_dropped_rows_teacher_sampler_and_citation(tmp_path: Path) -> None:
    text = card(write_pairs(str(tmp_path), citation="Doe *et al.*, 2024"))
    for part in (
        "| train | 3 |",
        "- records, in prepare: note\\_names\\_diagnosis 7",
        "- records, in pair: teacher\\_failed 4",
        '"pyhpo": "4.0"',
        '"top_1_accuracy": 0.9',
        '"kind": "hard"',
        '"labels": 20',
        "Doe *et al.*, 2024",
        "Research use only; not a diagnostic device.",
    ):
        assert part in text


def test_the_card_contains_the_terms_of_matched_texts_and_of_the_records(tmp_path: Path) -> None:
    texts = {"kind": "table", "uri": "s3://me:hunter2@bucket/notes.csv", "license": "cc-by-nc-4.0"}
    assert "nearest text of another source" not in card(write_pairs(str(tmp_path / "own")))
    text = card(write_pairs(str(tmp_path / "matched"), license="cc0-1.0", texts=texts))
    for part in (
        "nearest text of another source",
        '"uri": "s3://bucket/notes.csv"',
        '"license": "cc-by-nc-4.0"',
        "License of the records: cc0-1.0.",
        "- records, in prepare: note\\_names\\_diagnosis 7",
        "- records, in match_texts: no\\_text\\_above\\_min\\_similarity 5",
    ):
        assert part in text


def test_the_card_contains_no_credentials(tmp_path: Path) -> None:
    text = card(write_pairs(str(tmp_path)))
    assert "hunter" not in text
    assert '"uri": "s3://bucket/cases.csv"' in text
    assert '"s3://bucket/cases.csv": "abc123"' in text
    assert '"depth": 2' in text


def test_the_example_is_verbatim_in_a_block_that_it_cannot_end(tmp_path: Path) -> None:
    assert f"\n````text\n{NOTE}\n````\n" in card(write_pairs(str(tmp_path)))


@pytest.mark.s3
@pytest.mark.parametrize("in_place", [False, True])
def test_pairs_in_object_storage_can_be_verified_and_loaded(tmp_path: Path, s3_root: str, in_place: bool) -> None:
    pairs = write_pairs(f"{s3_root}/{in_place}", in_place=in_place)
    assert verify(pairs.uri) == []
    # in another process: these tests run `datasets` offline, where it rejects every URL
    code = f"""
import json, os
from datasets import load_dataset
options = {{"key": os.environ["AWS_ACCESS_KEY_ID"], "secret": os.environ["AWS_SECRET_ACCESS_KEY"],
            "endpoint_url": os.environ["AWS_ENDPOINT_URL"]}}
files = {{split: f"{pairs.uri}/{{split}}/*.parquet" for split in ("train", "validation")}}
loaded = load_dataset("parquet", data_files=files, storage_options=options, cache_dir={str(tmp_path)!r})
print(json.dumps({{split: rows.to_list() for split, rows in loaded.items()}}))
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "validation": 2}
    assert loaded["train"][0]["prompt"][1]["content"] == NOTE
