"""The report of a run, from artifacts with chosen predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mint_ray.artifacts import Artifact, verify
from mint_ray.config.loader import from_data
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.metrics import Estimate
from mint_ray.metrics.methods import to_rows
from mint_ray.records import Method, Prediction
from mint_ray.stages.report import source_notes, summarize_run, write_report
from tests.compare.runs import ALIGNED, BASE, TEACHER, TEST, predictions, write_artifact, write_run


def config(root: Path) -> PipelineConfig:
    data = {
        "root": str(root),
        "title": "A run",
        "task": {"kind": "rare_disease"},
        "prepare": {"source": {"kind": "hpo"}},
        "pair": {"sampler": {"kind": "hard", "top": 2}},
        "train": {"student": {"model_id": "bundled:smollm2-135m-instruct"}},
    }
    return from_data(PipelineConfig, data)


def outputs(root: Path, methods: dict[Method, int], **metrics: Any) -> dict[str, Artifact]:
    """Return the outputs of a run; `methods` maps a method to its number of right answers."""
    rows = [row for method, num_right in methods.items() for row in predictions(method, num_right)]
    estimates = {
        method: {"top_k_accuracy": Estimate(num_right / len(TEST), 0.0, 1.0, 2)}
        for method, num_right in methods.items()
    }
    done = write_run(root, "unused", rows)
    done["evaluate"] = write_artifact(
        root, "evaluate", "e", {"predictions": (Prediction, rows)}, metrics={"methods": to_rows(estimates), **metrics}
    )
    return done


def test_the_report_has_all_its_files_and_is_written_once(tmp_path: Path) -> None:
    done = outputs(tmp_path, {TEACHER: 7, BASE: 1, ALIGNED: 4})
    report = write_report(config(tmp_path), done)
    assert verify(report.uri) == []
    names = {file.path for file in report.manifest.files}
    assert names == {"report.html", "report.md", "table.txt", "goodput.json"}
    assert "Top-2 accuracy" in (Path(report.uri) / "table.txt").read_text()
    assert set(json.loads((Path(report.uri) / "goodput.json").read_text())) == set(done)
    written = (Path(report.uri) / "manifest.json").stat().st_mtime_ns
    assert write_report(config(tmp_path), done) == report
    assert (Path(report.uri) / "manifest.json").stat().st_mtime_ns == written


def test_base_and_aligned_student_are_compared_record_by_record(tmp_path: Path) -> None:
    summary = summarize_run(config(tmp_path), outputs(tmp_path, {TEACHER: 7, BASE: 1, ALIGNED: 4}))
    moved = summary.transitions
    assert moved is not None
    assert (moved.kept, moved.gained, moved.lost, moved.neither) == (1, 3, 0, 4)
    assert sum(label.aligned for label in summary.per_label) == 4
    assert [example.record_id for example in summary.examples] == [f"test{number}" for number in range(4)]
    assert (summary.examples[0].base, summary.examples[0].aligned) == ("base student 0", "aligned student 0")
    assert [result.method for result in summary.methods] == [TEACHER, BASE, ALIGNED]
    assert "top-2 accuracy counts the first 2" in summary.notes[0]


def test_retrieval_and_benchmarks_are_notes(tmp_path: Path) -> None:
    recall = {"records": 60, "recall": 0.6}
    metrics = {
        "retrieval": [{"student": "aligned", "retrieved": recall, "shown": recall | {"recall": 0.5}}],
        "harness": [{"student": "base", "tasks": {"arc_easy": {"acc": {"value": 0.25}}}}],
    }
    notes = summarize_run(config(tmp_path), outputs(tmp_path, {BASE: 1, ALIGNED: 4}, **metrics)).notes
    assert (
        "Retrieval: of 60 records with a document of their true label, this document was found for 60.0% and given to "
        "the aligned student for 50.0%."
    ) in notes
    assert "Benchmarks, base student: arc_easy acc 0.250." in notes


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        ({"source": {"kind": "hpo"}}, ["simulated from the annotations"]),
        ({"source": {"kind": "table", "uri": "x.csv"}}, []),
        (
            {
                "source": {"kind": "table", "uri": "x.csv"},
                "match_texts": {"source": {"kind": "table", "uri": "y.csv"}, "encoder": {"model_id": "my/clip"}},
            },
            ["nearest text of another source, by the cosine similarity of my/clip"],
        ),
    ],
)
def test_notes_describe_the_source_of_the_records(tmp_path: Path, prepare: dict[str, Any], words: list[str]) -> None:
    settings = {"root": str(tmp_path), "task": {"kind": "rare_disease"}, "train": {"student": {"model_id": "x"}}}
    notes = source_notes(from_data(PipelineConfig, {**settings, "prepare": prepare}).prepare)
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))
