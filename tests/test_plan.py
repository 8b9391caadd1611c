"""The plan of a run: its steps in order, what each needs, whether it is complete, and why it runs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mint_ray import storage
from mint_ray.artifacts import RUNS
from mint_ray.config.loader import UserError
from mint_ray.lineage import AnswerRequest, EvaluationInputs
from mint_ray.pipeline import _Run
from mint_ray.plan import PlannedStep, Step, explain_plan, plan_steps
from mint_ray.records import Method
from mint_ray.stages import STAGES
from tests.run_specs import building, make_config, matching

PLAIN = [
    "prepare",
    "fit",
    "score",
    "pair",
    "tokenize",
    "train",
    "answer/base",
    "answer/aligned",
    "answer/base-rank",
    "answer/aligned-rank",
    "evaluate",
    "report",
]


def insert(steps: list[str], before: str, *keys: str) -> list[str]:
    index = steps.index(before)
    return [*steps[:index], *keys, *steps[index:]]


RETRIEVAL = [
    *PLAIN[:6], "retrieve", "choose_passages/base",
    "answer/base", "answer/base-retrieval", "answer/aligned", "answer/aligned-retrieval",
    "answer/base-rank", "answer/base-retrieval-rank", "answer/aligned-rank", "answer/aligned-retrieval-rank",
    "evaluate", "report",
]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "changes", "expected"),
    [
        ("none", {}, PLAIN),
        ("match_texts", matching, insert(PLAIN, "fit", "embed_texts", "match_texts")),
        ("build_vlm", building, insert(PLAIN, "pair", "build_vlm")),
        ("control", {"pair.control": "shuffled"}, insert(PLAIN, "pair", "shuffle_images")),
        ("sampler", {"pair.sampler": {"kind": "on_policy", "top": 2}}, insert(PLAIN, "pair", "rank/base")),
        ("retrieval", {"evaluate.retrieval": {}}, RETRIEVAL),
        (
            "adaptive",
            {"evaluate.retrieval": {"adaptive": True}},
            insert(RETRIEVAL, "answer/base", "choose_passages/aligned"),
        ),
        (
            "harness",
            {"evaluate.harness": {"tasks": ["a"]}},
            insert(PLAIN, "answer/base", "benchmark/base", "benchmark/aligned"),
        ),
    ],
)
def test_a_section_of_the_spec_adds_its_steps_in_order(
    tmp_path: Path, section: str, changes: Any, expected: list[str]
) -> None:
    steps = plan_steps(make_config(tmp_path, changes(tmp_path) if callable(changes) else changes))
    assert list(steps) == expected
    for number, (key, step) in enumerate(steps.items()):
        assert set(step.needs) <= set(expected[:number])
        # the outputs that a step is named by are those that it waits for
        read = {steps[need].artifact.name for need in step.needs}
        named_by = {
            value for value in step.artifact.inputs.values() if value in {s.artifact.name for s in steps.values()}
        }
        assert named_by <= read, key
    # stages are in the order in which they are listed
    order = list(STAGES)
    stages = [
        order.index(step.stage)
        for step in steps.values()
        if step.stage not in ("choose_passages", "benchmark", "answer")
    ]
    assert stages == sorted(stages)


def test_needs_are_the_steps_that_a_step_reads(tmp_path: Path) -> None:
    changes = {
        **building(tmp_path),
        "pair.control": "shuffled",
        "pair.sampler": {"kind": "on_policy", "top": 2},
        "evaluate.retrieval": {"adaptive": True},
        "evaluate.harness": {"tasks": ["a"]},
    }
    needs = {key: set(step.needs) for key, step in plan_steps(make_config(tmp_path, changes)).items()}
    assert needs["score"] == {"prepare", "fit"}
    assert needs["build_vlm"] == {"shuffle_images"}
    # a teacher below its gate ends the run before a student is loaded
    assert needs["rank/base"] == {"shuffle_images", "score", "build_vlm"}
    assert needs["pair"] == {"shuffle_images", "score", "rank/base"}
    assert needs["tokenize"] == {"pair", "build_vlm"}
    assert needs["train"] == {"tokenize", "build_vlm"}
    assert needs["retrieve"] == {"shuffle_images"}
    assert needs["choose_passages/base"] == {"shuffle_images", "retrieve", "build_vlm"}
    assert needs["choose_passages/aligned"] == {"shuffle_images", "retrieve", "build_vlm", "train"}
    assert needs["answer/base"] == {"shuffle_images", "build_vlm"}
    assert needs["answer/aligned-retrieval"] == {"shuffle_images", "build_vlm", "train", "choose_passages/aligned"}
    assert needs["benchmark/aligned"] == {"build_vlm", "train"}
    assert {"score", "train", "choose_passages/base", "benchmark/base", "answer/base"} <= needs["evaluate"]
    assert needs["report"] == set(needs) - {"report"}


def test_steps_have_what_their_stage_needs_to_run(tmp_path: Path) -> None:
    steps = plan_steps(make_config(tmp_path, {"pair.sampler": {"kind": "on_policy", "top": 2}}))
    request = steps["answer/aligned-rank"].details
    assert isinstance(request, AnswerRequest)
    assert request.method == Method(student="aligned", mode="rank")
    assert request.splits == ("test",)
    assert request.adapter == steps["train"].artifact
    ranking = steps["rank/base"].details
    assert (ranking.method, ranking.splits) == (Method(student="base", mode="rank"), ("train", "validation"))
    assert steps["pair"].details == {None: steps["rank/base"].artifact}
    inputs = steps["evaluate"].details
    assert isinstance(inputs, EvaluationInputs)
    methods = [(student, mode) for mode in ("free", "rank") for student in ("base", "aligned")]
    assert [(method.student, method.mode) for method in inputs.answers] == methods


def test_the_last_stage_leaves_out_what_it_does_not_need(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"evaluate.retrieval": {}, **matching(tmp_path)})
    assert list(plan_steps(config, "prepare")) == ["prepare"]
    assert list(plan_steps(config, "match_texts")) == ["prepare", "embed_texts", "match_texts"]
    assert list(plan_steps(config, "retrieve")) == ["prepare", "embed_texts", "match_texts", "retrieve"]
    to_train = ["prepare", "embed_texts", "match_texts", "fit", "score", "pair", "tokenize", "train"]
    assert list(plan_steps(config, "train")) == to_train
    assert list(plan_steps(config, "answer")) == [*to_train, *RETRIEVAL[6:-2]]


@pytest.mark.parametrize("stage", ["build_vlm", "retrieve", "shuffle_images", "rank", "benchmark", "match_texts"])
def test_a_stage_that_the_spec_does_not_ask_for_is_an_error(tmp_path: Path, stage: str) -> None:
    with pytest.raises(UserError, match=rf"^{stage}: this spec has no such stage \({STAGES[stage][:-1]}\)$"):
        plan_steps(make_config(tmp_path), stage)


def write(*steps: Step) -> None:
    """Publish an empty output of each step."""
    for step in steps:
        with step.artifact.write():
            pass


def explain(folder: Path, changes: dict[str, Any] | None = None, last: str = "report") -> dict[str, PlannedStep]:
    return {step.key: step for step in explain_plan(make_config(folder, changes), last)}


def test_nothing_is_complete_below_a_new_root(tmp_path: Path) -> None:
    planned = explain(tmp_path)
    assert {step.state for step in planned.values()} == {"run"}
    assert {tuple(step.reasons) for step in planned.values()} == {("no earlier output",)}
    assert not (tmp_path / "out").exists()


def test_a_complete_step_has_no_reason_and_an_interrupted_one_resumes(tmp_path: Path) -> None:
    steps = plan_steps(make_config(tmp_path))
    write(steps["prepare"], steps["fit"])
    storage.write_bytes(storage.join(steps["score"].artifact.root, RUNS, steps["score"].artifact.name, "x"), b"")
    planned = explain(tmp_path, last="pair")
    assert {key: step.state for key, step in planned.items()} == {
        "prepare": "complete",
        "fit": "complete",
        "score": "resume",
        "pair": "run",
    }
    assert planned["prepare"].reasons == []
    assert planned["prepare"].artifact == steps["prepare"].artifact.uri


def test_reasons_are_the_changed_settings_and_the_steps_that_run(tmp_path: Path) -> None:
    write(*plan_steps(make_config(tmp_path)).values())
    assert {step.state for step in explain(tmp_path).values()} == {"complete"}
    planned = explain(tmp_path, {"train.trainer.objective.beta": 0.2, "score.resources.batch_size": 7})
    reasons = {key: step.reasons for key, step in planned.items() if step.state != "complete"}
    assert reasons == {
        "train": ["train.trainer.objective.beta: 0.5 -> 0.2"],
        "answer/aligned": ["train runs"],
        "answer/aligned-rank": ["train runs"],
        "evaluate": ["train runs", "answer/aligned runs", "answer/aligned-rank runs"],
        "report": ["train runs", "answer/aligned runs", "answer/aligned-rank runs", "evaluate runs"],
    }


def test_the_most_similar_earlier_output_is_compared(tmp_path: Path) -> None:
    # the first differs from it in three settings, the second in one
    for changes in ({"train.trainer.learning_rate": 0.1, "train.trainer.seed": 1}, {"train.trainer.seed": 2}):
        write(*plan_steps(make_config(tmp_path, changes), "train").values())
    changes = {"train.trainer.seed": 2, "train.trainer.max_steps": 5}
    assert explain(tmp_path, changes, "train")["train"].reasons == ["train.trainer.max_steps: -1 -> 5"]


def test_a_changed_file_is_named_by_its_role(tmp_path: Path) -> None:
    write(*plan_steps(make_config(tmp_path)).values())
    (tmp_path / "student" / "model.safetensors").write_text("other weights")
    planned = explain(tmp_path)
    assert planned["tokenize"].reasons == ["student changed"]
    assert planned["answer/base"].reasons == ["student changed"]
    assert planned["train"].reasons == ["student changed", "tokenize runs"]
    assert planned["pair"].state == "complete"


def test_every_stage_has_a_module_and_a_method_that_runs_it() -> None:
    for stage in STAGES:
        assert importlib.util.find_spec(f"mint_ray.stages.{stage}") is not None
        assert callable(getattr(_Run, stage))
    modules = {path.stem for path in (Path(__file__).parents[1] / "mint_ray" / "stages").glob("*.py")}
    assert modules - {"__init__"} == set(STAGES)


def test_a_plan_loads_neither_ray_nor_torch() -> None:
    code = """
import sys
from mint_ray.config.loader import load
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.plan import explain_plan
steps = explain_plan(load(PipelineConfig, "jobs/quickstart.yaml", ["root=/nonexistent"]))
assert steps[-1].key == "report", steps
heavy = {"ray", "torch", "transformers", "trl", "peft", "deepspeed", "sklearn", "scipy", "optuna", "datasets", "lm_eval"}
print(sorted(heavy & set(sys.modules)))
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
