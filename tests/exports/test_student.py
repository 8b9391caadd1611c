"""Exports of students: merged and as an adapter, read by transformers and PEFT alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.cli import cli
from mint_ray.config.loader import UserError, dump
from mint_ray.config.stages import Train
from mint_ray.exports import export_student
from mint_ray.models.pretrained import model_identity
from mint_ray.students.config import Student
from mint_ray.students.loading import load_model, load_tokenizer, save_adapter
from tests.exports.samples import TRAIN, write_pairs
from tests.tiny import save_tiny_student


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_pairs(tmp_path_factory.mktemp("pairs"), TRAIN, [])


@pytest.fixture(scope="module", params=[4, None], ids=["adapter", "full"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Student]:
    """Return a train artifact of a tiny student, with an adapter or trained in full, next to its evaluation."""
    root = tmp_path_factory.mktemp("trained")
    student = Student(model_id=str(save_tiny_student(root / "base")), lora_rank=request.param, lora_alpha=8)
    inputs = {"tokens": "tokenize-0", "student": model_identity(student, "student")}
    artifact = open_artifact(str(root), "train", {"train": dump(Train(student=student))}, inputs)
    with artifact.write() as draft:
        model = load_model(student, trainable=True)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        save_adapter(model, load_tokenizer(student), draft.folder / "adapter")
    config = {"evaluate": {"confidence": 0.95}}
    with open_artifact(str(root), "evaluate", config, {"student": artifact.name}).write() as draft:
        draft.counts.update(records=6, groups=5)
        metrics = {"readable": {"value": 0.5, "low": 0.25, "high": 0.75}}
        draft.metrics["methods"] = [{"student": "aligned", "metrics": metrics}]
    return artifact, student


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.arange(3, 40).reshape(1, -1)).logits
    return logits


def test_a_merged_student_is_read_by_transformers_and_equals_the_trained_one(
    trained: tuple[Artifact, Student], tmp_path: Path
) -> None:
    artifact, student = trained
    learned = load_model(student, adapter=Path(artifact.file_uri("adapter")))
    export_student(artifact.uri, str(tmp_path / "merged"), merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", use_safetensors=True)
    torch.testing.assert_close(logits_of(merged), logits_of(learned))
    assert not torch.allclose(logits_of(merged), logits_of(load_model(student)), atol=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.get_vocab() == load_tokenizer(student).get_vocab()
    assert tokenizer.chat_template == load_tokenizer(student).chat_template
    assert not [path for path in (tmp_path / "merged").iterdir() if "adapter" in path.name or path.suffix == ".bin"]
    assert "A language model, trained in full," in (tmp_path / "merged" / "README.md").read_text() or student.lora_rank


def test_an_adapter_is_exported_alone_if_there_is_one(trained: tuple[Artifact, Student], tmp_path: Path) -> None:
    artifact, student = trained
    if student.lora_rank is None:
        with pytest.raises(UserError, match="the student was trained in full and has no adapter"):
            export_student(artifact.uri, str(tmp_path / "adapter"), merge=False)
        assert not (tmp_path / "adapter").exists()
        return
    export_student(artifact.uri, str(tmp_path / "adapter"), merge=False)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student.model_id), tmp_path / "adapter")
    torch.testing.assert_close(
        logits_of(adapted), logits_of(load_model(student, adapter=Path(artifact.file_uri("adapter"))))
    )
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "Research use only; not a diagnostic device." in card


def test_a_student_is_exported_from_the_command_line_with_its_metrics(
    trained: tuple[Artifact, Student], tmp_path: Path
) -> None:
    artifact, _ = trained
    [evaluated] = Path(artifact.root).glob("evaluate-*")
    to = str(tmp_path / "to")
    done = CliRunner().invoke(cli, ["export", artifact.uri, "--to", to, "--evaluate", str(evaluated)])
    assert done.exception is None, done.exception
    assert done.stdout.splitlines()[-1] == f"student: {to}"
    assert "| Readable answers | 0.50" in (tmp_path / "to" / "README.md").read_text()


def test_an_invalid_export_of_a_student_is_an_error_before_anything_is_written(
    trained: tuple[Artifact, Student], pairs: Artifact, tmp_path: Path
) -> None:
    artifact, student = trained
    other = open_artifact(str(tmp_path), "evaluate", {}, {"student": "train-0"})
    with other.write():
        pass
    moved = open_artifact(str(tmp_path), "train", artifact.config, {**artifact.inputs, "student": "ab" * 32})
    with moved.write() as draft:
        draft.write_text("adapter/nothing.txt", "")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    cases: list[tuple[str, str, str | None, str]] = [
        (pairs.uri, "to", None, "expected a train artifact, got a pair artifact; to export pairs, set a format"),
        (artifact.uri, "to", other.uri, f"not an evaluation of {artifact.name}"),
        (artifact.uri, "full", None, "not empty"),
    ]
    if student.lora_rank is not None:
        cases.append((moved.uri, "to", None, f"its weights are not those that {moved.name} was trained on"))
    for uri, to, evaluated, message in cases:
        with pytest.raises(UserError, match=message):
            export_student(uri, str(tmp_path / to), merge=True, evaluated=evaluated)
    assert not (tmp_path / "to").exists()
