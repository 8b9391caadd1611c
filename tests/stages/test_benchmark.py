"""Benchmark results of lm-evaluation-harness for a student, on a task in a local folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_ray import lineage
from mint_ray.artifacts import verify
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Evaluate, EvaluateResources, Harness
from mint_ray.stages.benchmark import HarnessActor, check_harness, read_metrics, run_harness
from mint_ray.students.config import Student
from tests.stages.inputs import QUESTIONS, make_request, save_harness_task
from tests.tiny import save_tiny_student

TASK = "sky_and_sums"
RESOURCES = EvaluateResources(cpus_per_actor=1)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def expected_accuracy(folder: str) -> float:
    """Return the share of questions whose right choice is the most likely one, from a forward pass per choice."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    right = 0
    for question, choices, answer in QUESTIONS:
        totals = []
        for choice in choices:
            prompt = tokenizer(question, add_special_tokens=False)["input_ids"]
            ids = tokenizer(f"{question} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            totals.append(sum(float(logps[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
        right += max(range(len(choices)), key=lambda i: totals[i]) == answer
    return right / len(QUESTIONS)


@pytest.mark.parametrize("limit", [None, 2])
def test_a_student_answers_every_question_up_to_the_limit(tmp_path: Path, limit: int | None) -> None:
    torch.set_num_threads(1)
    student = save_tiny_student(tmp_path / "student", seed=3)
    harness = Harness(tasks=(TASK,), folder=str(save_harness_task(tmp_path / "tasks")), limit=limit)
    actor = HarnessActor(make_request(Student(model_id=str(student))), harness, RESOURCES)
    [row] = actor(pa.table({"task": [TASK]})).to_pylist()
    results = json.loads(row["results"])
    questions = limit or len(QUESTIONS)
    assert results["counts"] == {f"questions of {TASK}": questions}
    metrics = results["metrics"][TASK]
    assert set(metrics) == {"acc", "acc_norm"}
    accuracy = metrics["acc"]["value"]
    if limit is None:
        assert accuracy == expected_accuracy(str(student))
    # the standard error of a mean of zeros and ones
    assert metrics["acc"]["stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (questions - 1)))


@pytest.mark.ray
def test_results_are_in_the_manifest_by_task_and_metric(ray_cluster: None, tmp_path: Path) -> None:
    student = Student(model_id=str(save_tiny_student(tmp_path / "student", seed=3)))
    harness = Harness(tasks=(TASK,), folder=str(save_harness_task(tmp_path / "tasks")))
    config, request = Evaluate(harness=harness, resources=RESOURCES), make_request(student)
    results = run_harness(str(tmp_path / "out"), config, request)
    assert results.manifest.metrics[TASK]["acc"]["value"] == expected_accuracy(student.model_id)
    assert results.manifest.counts == {f"questions of {TASK}": len(QUESTIONS)}
    assert verify(results.uri) == []
    assert run_harness(str(tmp_path / "out"), config, request).manifest == results.manifest


def test_metrics_lose_the_filter_none_and_unknown_standard_errors() -> None:
    found = {
        "alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.1,
        "exact_match,strict": 1.0, "exact_match_stderr,strict": "N/A", "bleu,none": 3, "bleu_stderr,none": math.nan,
    }  # fmt: skip
    assert read_metrics(found) == {
        "acc": {"value": 0.25, "stderr": 0.1},
        "exact_match,strict": {"value": 1.0},
        "bleu": {"value": 3.0},
    }


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "HARNESS", "no_such_package")
    with pytest.raises(UserError, match="no_such_package is not installed; install the extra `harness`"):
        check_harness(Harness(tasks=("arc_easy",)))


def test_an_unknown_task_or_folder_is_named(tmp_path: Path) -> None:
    folder = str(save_harness_task(tmp_path / "tasks"))
    check_harness(Harness(tasks=(TASK,), folder=folder))
    with pytest.raises(UserError, match="no folder '/none/such'"):
        check_harness(Harness(tasks=(TASK,), folder="/none/such"))
    with pytest.raises(UserError, match=r"no task 'sky_and_sun' in .*tasks$"):
        check_harness(Harness(tasks=(TASK, "sky_and_sun"), folder=folder))
