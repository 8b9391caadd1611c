"""A whole comparison, tiny: made-up patients, the ontology teacher, a two-layer student, two methods, two seeds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mint_ray.artifacts import Artifact, open_artifact, verify
from mint_ray.compare.plan import Method, plan_methods
from mint_ray.compare.run import write_comparison
from mint_ray.compare.summary import check_leaks, collect_answers
from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.loader import UserError, from_data, load
from mint_ray.config.stages import Pair
from mint_ray.records import Label, Phenotype, Prediction, Record, TeacherScores
from mint_ray.tasks import build_task
from mint_ray.tasks.config import RareDisease
from tests.tiny import save_tiny_student

SPEC = """
title: Tiny comparison
task: {{kind: rare_disease}}
prepare:
  source: {{kind: hpo, diseases: 8, patients_per_disease: 6}}
  splits: {{validation: 0.2, test: 0.3}}
pair: {{sampler: {{kind: hard, top: 2}}}}
train:
  student: {{model_id: {student}, lora_rank: 2}}
  trainer: {{train_batch_size: 8, max_length: 2048, max_steps: 1, logging_steps: 1}}
  resources: {{cpus_per_worker: 1}}
evaluate:
  resamples: 100
  generation: {{max_new_tokens: 8}}
  resources: {{cpus_per_actor: 1}}
seeds: [0, 1]
resources: {{max_concurrent: 2}}
methods:
  orpo: {{train.trainer.objective: {{kind: orpo}}}}
  sft, renamed: {{train.trainer.objective: {{kind: sft}}, pair.control: relabelled}}
  hopeless: {{pair.sampler: {{kind: margin, top: 2, margin: 1.0}}}}
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    save_tiny_student(folder / "student")
    path = folder / "compare.yaml"
    path.write_text(SPEC.format(student=folder / "student"))
    return path


def mint_ray(*arguments: str, code: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mint_ray.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=dict(os.environ))
    assert done.returncode == code, done.stderr[-4000:]
    return done


def modified(root: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in root.glob("*/manifest.json")}


@pytest.mark.ray
@pytest.mark.slow
def test_a_comparison_shares_what_is_shared_reports_what_fails_and_is_not_run_twice(spec: Path) -> None:
    root = spec.parent / "out"
    first = mint_ray("compare", str(spec), "--root", str(root), "--json", code=1)
    found: dict[str, Any] = json.loads(first.stdout.splitlines()[-1])
    made = modified(root)
    stages = [name.rpartition("-")[0] for name in made]
    # teacher and base student are asked once; ORPO and SFT are trained with two seeds each
    counts = {stage: stages.count(stage) for stage in sorted(set(stages))}
    assert counts == {
        "prepare": 1, "fit": 1, "score": 1, "pair": 2, "tokenize": 2, "train": 4, "answer": 5, "evaluate": 4,
        "compare": 1,
    }  # fmt: skip
    assert list(found["metrics"]) == ["teacher", "base student", "orpo", "sft, renamed"]
    assert found["failed"] == {"hopeless": "pair.sampler: margin drew no pair from 48 rankings"}
    assert "failed: hopeless: pair.sampler: margin drew no pair" in first.stdout
    assert verify(found["report"]) == []

    report = Path(found["report"])
    summary = json.loads((report / "comparison.json").read_text())
    rows = {row["name"]: row for row in summary["methods"]}
    assert [rows[name]["role"] for name in rows] == ["ceiling", "baseline", "method", "control", "method"]
    assert rows["orpo"]["runs"] == 2
    assert rows["orpo"]["cost"]["pairs"] > 0
    assert rows["orpo"]["cost"]["tokens"] > 0
    tested = [(test["first"], test["second"]) for test in summary["tests"]]
    assert tested == [("orpo", "base student"), ("sft, renamed", "base student"), ("sft, renamed", "orpo")]
    assert summary["spec"]["seeds"] == [0, 1]
    assert set(summary["manifests"]) <= set(made)
    page = (report / "report.html").read_text()
    for word in ("control; 2 seeds", "hopeless", "margin drew no pair", "Leak check", "seeds"):
        assert word in page
        assert word in (report / "report.md").read_text() or word == "seeds"

    again = mint_ray("compare", str(spec), "--root", str(root), "--json", code=1)
    assert json.loads(again.stdout.splitlines()[-1]) == found
    assert modified(root) == made


def config(methods: dict[str, Any], **more: Any) -> ComparisonConfig:
    base = {
        "task": {"kind": "rare_disease"},
        "prepare": {"source": {"kind": "hpo"}},
        "train": {"student": {"model_id": "bundled:smollm2-135m-instruct"}},
        "methods": methods,
    }
    return from_data(ComparisonConfig, {**base, **more})


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        ({"prepare.splits.seed": 1}, "prepare.splits.seed"),
        ({"train.student.lora_rank": 64}, "train.student.lora_rank"),
        ({"train.trainer.learning_rate": 1e-3}, "train.trainer.learning_rate"),
        ({"train.trainer.num_train_epochs": 2.0}, "train.trainer.num_train_epochs"),
        ({"task.hide_gene": False}, "task.hide_gene"),
        ({"evaluate.generation.max_new_tokens": 500}, "evaluate.generation.max_new_tokens"),
        ({"pair.sampler": {"kind": "truth", "top": 4}}, "pair.sampler.top"),
        ({"pair.sampler.pairs_per_record": 3}, "pair.sampler.pairs_per_record"),
    ],
)
def test_a_method_that_does_not_share_is_refused_unless_it_says_so(overrides: dict[str, Any], path: str) -> None:
    with pytest.raises(UserError, match=rf"^methods\.m: {re.escape(path)}: all methods share this; `unequal: true`"):
        plan_methods(config({"m": overrides}))
    [method] = plan_methods(config({"m": {**overrides, "unequal": True}}))
    assert method.unequal == [path]


def test_what_changes_no_result_and_what_is_compared_may_differ() -> None:
    free = {
        "train.trainer.objective": {"kind": "dpo"}, "pair.control": "swapped",
        "pair.sampler": {"kind": "sibling", "top": 3}, "train.resources.per_device_train_batch_size": 1,
    }  # fmt: skip
    [method] = plan_methods(config({"m": free}))
    assert method.unequal == []
    assert method.role == "control"


def test_seeds_reach_training_and_what_it_draws_and_never_the_split() -> None:
    methods = {"fixed": {"pair.sampler": {"kind": "hard"}}, "drawn": {"pair.sampler": {"kind": "truth"}}}
    fixed, drawn = plan_methods(config(methods, seeds=[3, 5]))
    assert [each.train.trainer.seed for each in fixed.configs] == [3, 5]
    assert [each.pair.sampler.seed for each in fixed.configs] == [0, 0], "the pairs are the same: they are drawn once"
    assert [each.pair.sampler.seed for each in drawn.configs] == [3, 5]
    assert {each.prepare.splits.seed for each in (*fixed.configs, *drawn.configs)} == {0}


def test_a_base_student_is_not_trained_so_it_runs_once() -> None:
    [method] = plan_methods(config({"m": {"student": "base"}}, seeds=[0, 1, 2]))
    assert len(method.configs) == 1
    assert method.student == "base student"


@pytest.mark.parametrize(
    ("methods", "more", "message"),
    [
        ({}, {}, "methods must name at least one method"),
        ({"teacher": {}}, {}, "'teacher' cannot be the name of a method"),
        ({"m": {}}, {"seeds": [1, 1]}, "seeds must be different"),
        ({"m": {}}, {"reference": "n"}, "reference must be one of m, got 'n'"),
        ({"m": {}}, {"max_similarity": 1.5}, "got 1.5"),
        ({"m": {"train.trainer.objective.bta": 1}}, {}, r"^methods\.m: .*train\.trainer\.objective\.bta: unknown key"),
        ({"m": {"student": "both"}}, {}, r"methods\.m\.student: expected base or aligned, got 'both'"),
        ({"m": {"unequal": "yes"}}, {}, r"methods\.m\.unequal: expected true or false, got 'yes'"),
    ],
)
def test_a_bad_method_is_named(methods: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_methods(config(methods, **more))


def test_the_shipped_comparison_is_on_equal_terms_and_has_its_controls() -> None:
    shipped = load(ComparisonConfig, Path(__file__).parent.parent / "jobs" / "compare.yaml")
    methods = {method.name: method for method in plan_methods(shipped)}
    unequal = {name: method.unequal for name, method in methods.items() if method.unequal}
    assert unequal == {"sft on the truth, one name": ["pair.sampler.top"]}
    assert {name for name, method in methods.items() if len(method.configs) != 3} == {"rag"}
    assert {method.configs[0].pair.control for method in methods.values()} == {None, "swapped", "relabelled"}
    assert methods["orpo"].configs[0].pair == Pair(sampler=shipped.pair.sampler)


LABELS = [Label(label_id=f"OMIM:{number}", name=f"Disease {number}") for number in range(1, 9)]
IDS = [label.label_id for label in LABELS]
FINDINGS = ["Seizure", "Short stature", "Ataxia", "Cleft palate", "Deafness", "Hypotonia", "Scoliosis", "Polydactyly"]


def case(number: int, split: Any) -> Record:
    """Every case has findings of its own."""
    told = [Phenotype(id=f"HP:000{number}{place}", label=f"{name} {number}") for place, name in enumerate(FINDINGS)]
    return Record(
        record_id=f"{split}{number}", group_id=f"{split}{number // 2}", label_id=IDS[number % 4], split=split,
        phenotypes=told, fields={"sex": "MALE" if number % 2 else "FEMALE", "age": f"P{number}Y"},
    )  # fmt: skip


TEST = [case(number, "test") for number in range(8)]
RECORDS = [*(case(number, "train") for number in range(20, 32)), *TEST]


def right(method: str, hits: int) -> list[Prediction]:
    """Answers of which the first so many are right, the last cannot be read, and the others name another label."""
    rows = []
    for place, record in enumerate(TEST):
        truth = record.label_id or ""
        labels = [truth, IDS[7]] if place < hits else [IDS[6], ""]
        reason = "no_list" if place == 7 else None
        rows.append(
            Prediction(
                record_id=record.record_id,
                method=method,
                labels=[] if reason else labels,
                text=f"{method} {place}",
                reason=reason,
            )
        )
    return rows


def leave(root: Path, stage: str, name: str, rows: dict[str, tuple[Any, list[Any]]], **says: Any) -> Artifact:
    artifact = open_artifact(str(root), stage, {"name": name}, {})
    with artifact.write() as draft:
        for table, (row, found) in rows.items():
            draft.write_rows(row, table, found)
        draft.counts.update(says.get("counts", {}))
        draft.metrics.update(says.get("metrics", {}))
        if stage == "train":
            draft.write_text("outcome.json", json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    return artifact


def left_behind(root: Path, name: str, predictions: list[Prediction]) -> dict[str, Artifact]:
    """The artifacts of one run whose evaluation came to these predictions."""
    scores = [
        TeacherScores(
            record_id=record.record_id, split="test", teacher="t",
            labels=[record.label_id or "", *(x for x in IDS if x != record.label_id)],
            scores=[8.0 - place for place in range(8)],
        )
        for record in TEST
    ]  # fmt: skip
    counts = {"records_test": len(TEST)}
    return {
        "prepare": leave(
            root, "prepare", "p", {"records": (Record, RECORDS), "labels": (Label, LABELS)}, counts=counts
        ),
        "score": leave(root, "score", "s", {"scores": (TeacherScores, scores)}),
        "pair": leave(root, "pair", name, {}, counts={"pairs_train": 12}),
        "tokenize": leave(root, "tokenize", name, {}),
        "train": leave(root, "train", name, {}, metrics={"tokens": 500, "steps": 3}),
        "evaluate": leave(root, "evaluate", name, {"predictions": (Prediction, predictions)}),
    }


def compared(
    root: Path, methods: dict[str, Any], hits: dict[str, list[int]], failed: dict[str, str], **more: Any
) -> Any:
    """The summary of a comparison in which each run of each method has so many records right."""
    given = config(
        methods,
        root=str(root),
        seeds=[0, 1],
        pair={"sampler": {"kind": "hard", "top": 2}},
        evaluate={"resamples": 200},
        **more,
    )
    plan = plan_methods(given)
    shared = [*right("teacher", 7), *right("base student", 0)]
    runs = {
        name: [
            left_behind(root, f"{name} {number}", [*shared, *right("aligned student", count)])
            for number, count in enumerate(counts)
        ]
        for name, counts in hits.items()
    }
    records = next(iter(runs.values()))[0]["prepare"]
    report = write_comparison(given, plan, records, runs, failed)
    assert verify(report.uri) == []
    return json.loads((Path(report.uri) / "comparison.json").read_text())


METHODS: dict[str, Any] = {
    "orpo": {},
    "sft": {"train.trainer.objective": {"kind": "sft"}},
    "renamed": {"pair.control": "relabelled"},
    "dpo": {"train.trainer.objective": {"kind": "dpo"}},
}


def test_a_comparison_is_what_its_runs_come_to(tmp_path: Path) -> None:
    hits = {"orpo": [7, 5], "sft": [3, 3], "renamed": [0, 0], "dpo": []}
    found = compared(tmp_path, METHODS, hits, {"dpo": "out of memory"}, reference="orpo")
    rows = {row["name"]: row for row in found["methods"]}
    top_1 = {name: row["estimates"]["top_1_accuracy"]["value"] for name, row in rows.items() if not row["error"]}
    assert top_1 == {"teacher": 7 / 8, "base student": 0, "orpo": 6 / 8, "sft": 3 / 8, "renamed": 0}
    assert (rows["dpo"]["error"], rows["dpo"]["estimates"]) == ("out of memory", {})
    assert [rows[name]["role"] for name in ("teacher", "base student", "orpo", "renamed")] == [
        "ceiling", "baseline", "method", "control"
    ]  # fmt: skip
    # the reference against each; never against the teacher, which sees more
    assert [(test["first"], test["second"]) for test in found["tests"]] == [
        ("orpo", "base student"), ("orpo", "sft"), ("orpo", "renamed")
    ]  # fmt: skip
    differences = {test["second"]: test["difference"] for test in found["tests"]}
    assert differences["sft"]["value"] == pytest.approx(3 / 8)
    # groups of two: mean hits 2, 2, 1.5, 0.5 of ORPO, all against none: the four of one sign, of sixteen exchanges
    assert differences["base student"]["p"] == 2 / 2**4
    # against SFT the three groups that differ, of eight exchanges; Holm: 3 x 0.125, and no later one is smaller
    assert differences["sft"]["p"] == 2 / 2**3
    assert [test["adjusted"] for test in found["tests"]] == pytest.approx([0.375] * 3)
    assert rows["orpo"]["unread"] == {"no_list": 2}
    assert rows["orpo"]["cost"] == {
        "pairs": 12, "tokens": 500, "steps": 3, "seconds": rows["orpo"]["cost"]["seconds"]
    }  # fmt: skip
    assert found["parts"] == {"female": 4, "male": 4, "under 1 year": 1, "1 to 5 years": 5, "6 to 11 years": 2}
    assert found["confusions"][0]["named"] == "Disease 7"
    assert found["leaks"]["found"] == []
    assert found["disagreements"][0]["right"]


def test_each_against_each_leaves_the_teacher_out(tmp_path: Path) -> None:
    found = compared(tmp_path, {"orpo": {}, "sft": METHODS["sft"]}, {"orpo": [7, 5], "sft": [3, 3]}, {})
    assert [(test["first"], test["second"]) for test in found["tests"]] == [
        ("orpo", "base student"), ("sft", "base student"), ("sft", "orpo")
    ]  # fmt: skip


def test_when_every_method_fails_there_is_still_a_report(tmp_path: Path) -> None:
    given = config({"orpo": {}}, root=str(tmp_path))
    done = left_behind(tmp_path, "orpo", right("aligned student", 1))
    report = write_comparison(given, plan_methods(given), done["prepare"], {"orpo": []}, {"orpo": "out of memory"})
    assert "out of memory" in (Path(report.uri) / "table.txt").read_text()


def plan(**said: Any) -> list[Method]:
    return plan_methods(config(said, seeds=[0, 1]))


def test_ways_of_answering_are_rows_of_their_own_and_come_in_order(tmp_path: Path) -> None:
    rows = [
        *right("teacher", 7), *right("base student", 0), *right("base student, ranked", 1),
        *right("aligned student", 3), *right("aligned student, ranked", 4),
    ]  # fmt: skip
    runs = {
        "orpo": [{"evaluate": leave(tmp_path, "evaluate", str(n), {"predictions": (Prediction, rows)})} for n in (1, 2)]
    }
    found = collect_answers(plan(orpo={}), runs, {})
    assert list(found) == ["teacher", "base student", "base student, ranked", "orpo", "orpo, ranked"]
    assert {name: (len(each.runs), each.decoding) for name, each in found.items()} == {
        "teacher": (1, ""), "base student": (1, ""), "base student, ranked": (1, ", ranked"), "orpo": (2, ""),
        "orpo, ranked": (2, ", ranked"),
    }  # fmt: skip


def test_a_method_on_other_terms_gives_no_answers_of_teacher_and_base_student(tmp_path: Path) -> None:
    rows = [*right("teacher", 7), *right("base student", 0), *right("aligned student", 3)]
    evaluated = leave(tmp_path, "evaluate", "1", {"predictions": (Prediction, rows)})
    methods = plan(orpo={"train.trainer.learning_rate": 1e-3, "unequal": True})
    assert list(collect_answers(methods, {"orpo": [{"evaluate": evaluated}] * 2}, {})) == ["orpo"]


def test_a_student_that_reads_is_judged_by_what_it_says_with_passages(tmp_path: Path) -> None:
    rows = [
        *right("teacher", 7), *right("base student", 0), *right("base student with passages", 2),
        *right("aligned student", 3), *right("aligned student with passages", 4),
    ]  # fmt: skip
    evaluated = leave(tmp_path, "evaluate", "1", {"predictions": (Prediction, rows)})
    retrieval = {"evaluate.retrieval": {"passages": 2}}
    methods = plan(rag={"student": "base", **retrieval}, both=retrieval)
    runs = {"rag": [{"evaluate": evaluated}], "both": [{"evaluate": evaluated}] * 2}
    found = collect_answers(methods, runs, {})
    assert list(found) == ["teacher", "base student", "rag", "both"]
    said = {name: {row.method for row in each.runs[0]} for name, each in found.items()}
    assert said["rag"] == {"base student with passages"}
    assert said["both"] == {"aligned student with passages"}
    assert said["base student"] == {"base student"}


def test_a_note_of_the_training_split_is_found_in_the_test_split() -> None:
    task = build_task(RareDisease(), LABELS, 2)
    copied = Record(
        record_id="copy",
        group_id="g",
        label_id=IDS[0],
        split="train",
        phenotypes=TEST[3].phenotypes,
        fields=TEST[3].fields,
    )
    clean = check_leaks(RECORDS, task, 0.95)
    assert (clean.compared, clean.found) == (len(TEST), [])
    [leak] = check_leaks([*RECORDS, copied], task, 0.95).found
    assert (leak.record_id, leak.seen_id, leak.same_label) == ("test3", "copy", False)
    assert leak.similarity == pytest.approx(1)
