"""What a student can do beside the task, asked by the harness; its task lies on disk."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_ray.config.loader import UserError, from_data
from mint_ray.config.stages import Evaluate, General
from mint_ray.stages.benchmark import HarnessActor, check_general, read_metrics
from mint_ray.students.config import Student
from tests.stages.tasks import QUESTIONS, save_local_task
from tests.tiny import save_tiny_student

TASK = "sky_and_sums"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def by_hand(folder: str) -> float:
    """Share of questions whose right choice is the likeliest, each choice in a plain pass of its own."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    right = 0
    for question, choices, answer in QUESTIONS:
        totals = []
        for choice in choices:
            prompt = tokenizer(question, add_special_tokens=False)["input_ids"]
            whole = tokenizer(f"{question} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            totals.append(sum(float(logps[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
        right += max(range(len(choices)), key=lambda i: totals[i]) == answer
    return right / len(QUESTIONS)


@pytest.mark.parametrize("limit", [None, 2])
def test_a_student_is_asked_every_question_up_to_the_limit(tmp_path: Path, limit: int | None) -> None:
    torch.set_num_threads(1)
    student = save_tiny_student(tmp_path / "student", seed=3)
    general = {"tasks": [TASK], "folder": str(save_local_task(tmp_path / "tasks")), "limit": limit}
    config = from_data(Evaluate, {"general": general, "resources": {"cpus_per_actor": 1}})
    (found,) = HarnessActor(Student(model_id=str(student)), config, None)(pa.table({"task": [TASK]})).to_pylist()
    result = json.loads(found["found"])
    assert result["counts"] == {f"questions of {TASK}": limit or len(QUESTIONS)}
    measured = result["metrics"][TASK]
    assert set(measured) == {"acc", "acc_norm"}
    share = measured["acc"]["value"]
    if limit is None:
        assert share == by_hand(str(student))
    questions = limit or len(QUESTIONS)
    # of a mean of zeros and ones
    assert measured["acc"]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (questions - 1)))


def test_metrics_lose_the_harness_s_commas_and_what_is_not_known() -> None:
    found = {
        "alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.1,
        "exact_match,strict": 1.0, "exact_match_stderr,strict": "N/A", "bleu,none": 3, "bleu_stderr,none": math.nan,
    }  # fmt: skip
    assert read_metrics(found) == {
        "acc": {"value": 0.25, "stderr": 0.1},
        "exact_match,strict": {"value": 1.0},
        "bleu": {"value": 3.0},
    }


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # as Python has it for a module that cannot be imported
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="lm_eval is not installed; the extra `harness` brings it"):
        check_general(General(tasks=("arc_easy",)))


def test_an_unknown_task_or_folder_is_named(tmp_path: Path) -> None:
    folder = str(save_local_task(tmp_path / "tasks"))
    check_general(General(tasks=(TASK,), folder=folder))
    with pytest.raises(UserError, match="no folder '/none/such'"):
        check_general(General(tasks=(TASK,), folder="/none/such"))
    with pytest.raises(UserError, match=r"no task 'sky_and_sun' in .*tasks$"):
        check_general(General(tasks=(TASK, "sky_and_sun"), folder=folder))


@pytest.mark.parametrize("settings", [{"tasks": []}, {"tasks": ["a"], "limit": 0}, {"tasks": ["a"], "num_fewshot": -1}])
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"tasks must name|limit must be|num_fewshot must"):
        from_data(General, settings)
