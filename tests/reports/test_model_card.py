"""The model card of an aligned student, in the format of the Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mint_ray.artifacts import Artifact, Manifest, open_artifact
from mint_ray.config.loader import dump
from mint_ray.config.stages import Train
from mint_ray.reports.model_card import render_model_card
from mint_ray.students import Student

COMMIT = "0123456789" * 4


def write_run(root: Path, student: Student, revision: str = COMMIT, **source: Any) -> Artifact:
    """Write the artifacts that a student is made from, and the student's artifact without weights."""
    settings = {"kind": "table", "uri": "s3://me:hunter2@bucket/cases.csv?secret_key=hunter3"} | source
    written: dict[str, Artifact] = {}
    for stage, config, inputs in (
        ("prepare", {"prepare": {"source": settings}}, {}),
        ("fit", {"fit": {"teacher": {"kind": "import", "options": {"api_key": "hunter4"}}}}, {}),
        ("score", {}, {"teacher": "fit"}),
        ("pair", {"pair": {"sampler": {"kind": "on_policy"}}}, {"records": "prepare", "scores": "score"}),
        ("tokenize", {}, {"pairs": "pair"}),
        ("train", {"train": dump(Train(student=student))}, {"tokens": "tokenize"}),
    ):
        names = {name: written[before].name for name, before in inputs.items()}
        names |= {"student": revision} if stage == "train" else {}
        artifact = written[stage] = open_artifact(str(root), stage, config, names)
        with artifact.write() as draft:
            if stage == "pair":
                draft.counts.update(pairs_train=1200, pairs_validation=40)
    return written["train"]


def card(artifact: Artifact, **options: Any) -> str:
    return render_model_card(artifact.uri, artifact.manifest, **({"merged": True} | options))


def evaluation() -> Manifest:
    value = {"value": 0.5, "low": 0.25, "high": 0.75}
    return Manifest(
        stage="evaluate", fingerprint="0" * 12, config={"evaluate": {"confidence": 0.9}}, inputs={}, files=[], counts={"records": 60, "groups": 41},
        dropped={}, seconds=1.0, versions={}, git_revision=None,
        metrics={
            "methods": [
                {"student": "base", "metrics": {"readable": value}},
                {"student": "aligned", "mode": "rank", "metrics": {"readable": value, "mrr|x": value}},
            ]
        },
    )  # fmt: skip


HUB = Student(model_id="HuggingFaceTB/SmolLM2-135M-Instruct", revision=COMMIT)


@pytest.mark.parametrize(
    ("merged", "library", "relation"), [(True, "transformers", "finetune"), (False, "peft", "adapter")]
)
def test_the_hub_reads_the_metadata(tmp_path: Path, merged: bool, library: str, relation: str) -> None:
    data = ModelCard(card(write_run(tmp_path, HUB, license="CC-BY-4.0"), merged=merged)).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("cc-by-4.0", library, "text-generation")
    assert (data.base_model, data.base_model_relation) == (HUB.model_id, relation)


@pytest.mark.parametrize("model_id", ["bundled:smollm2-135m-instruct", "models/mine", "/models/mine"])
def test_a_base_model_outside_the_hub_is_named_in_the_text_only(tmp_path: Path, model_id: str) -> None:
    text = card(write_run(tmp_path, Student(model_id=model_id), revision="ab" * 32))
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert f"`{model_id}`, revision not pinned; weights, by commit or digest: `{'ab' * 32}`" in text


def test_the_card_contains_use_training_data_and_evaluation(tmp_path: Path) -> None:
    artifact = write_run(tmp_path, HUB, license="Terms of *ours*", citation="Doe *et al.*, 2024")
    text = card(artifact, evaluate=evaluation())
    for part in (
        "Research use only; not a diagnostic device.",
        "it is not a diagnostic device, and\nno decision about a patient may be based on it",
        f"`{HUB.model_id}`, revision `{COMMIT}`",
        "(pairs\\_train 1,200, pairs\\_validation 40)",
        "License of the records: Terms of \\*ours\\*.",
        "Doe *et al.*, 2024",
        '"kind": "on_policy"',
        "On 60 test records of 41 groups",
        "| metric \\[90 % interval\\] | base student | aligned student, ranked |\n|---|---:|---:|\n"
        "| Readable answers | 0.50 [0.25, 0.75] | 0.50 [0.25, 0.75] |\n"
        "| mrr\\|x | n/a | 0.50 [0.25, 0.75] |\n",
    ):
        assert part in text
    assert "Not included." in card(artifact)


def test_the_card_contains_no_credentials(tmp_path: Path) -> None:
    text = card(write_run(tmp_path, HUB))
    assert "hunter" not in text
    assert '"uri": "s3://bucket/cases.csv"' in text


def test_artifacts_that_are_missing_from_the_root_are_unknown(tmp_path: Path) -> None:
    artifact = write_run(tmp_path / "run", HUB)
    other = open_artifact(str(tmp_path / "moved"), "train", artifact.config, artifact.inputs)
    text = render_model_card(other.uri, dataclasses.replace(artifact.manifest), merged=False)
    assert ModelCard(text).data.license == "unknown"
    assert "Pairs `unknown`" in text
    assert "Citation: unknown." in text
