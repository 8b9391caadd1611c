"""Everything that the report of a comparison shows, from artifacts of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mint_ray.compare.summary import collect_runs, find_disagreements, find_near_duplicates
from mint_ray.records import Method, Prediction, Record
from mint_ray.tasks import build_task
from mint_ray.tasks.config import RareDisease
from tests.compare.runs import (
    ALIGNED,
    BASE,
    IDS,
    LABELS,
    RECORDS,
    TEACHER,
    TEST,
    plan,
    predictions,
    write_artifact,
    write_summary,
)

METHODS: dict[str, Any] = {
    "orpo": {},
    "sft": {"train.trainer.objective": {"kind": "sft"}},
    "renamed": {"pair.control": "relabelled"},
    "dpo": {"train.trainer.objective": {"kind": "dpo"}},
}


def title_of(row: dict[str, Any]) -> str:
    return row["name"] or Method(**row["method"]).title


def test_a_comparison_summarizes_its_runs(tmp_path: Path) -> None:
    num_right = {"orpo": [7, 5], "sft": [3, 3], "renamed": [0, 0], "dpo": []}
    found = write_summary(tmp_path, METHODS, num_right, {"dpo": "out of memory"}, reference="orpo")
    rows = {title_of(row): row for row in found["rows"]}
    top_1 = {name: row["estimates"]["top_1_accuracy"]["value"] for name, row in rows.items() if not row["error"]}
    assert top_1 == {"teacher": 7 / 8, "base student": 0, "orpo": 6 / 8, "sft": 3 / 8, "renamed": 0}
    assert (rows["dpo"]["error"], rows["dpo"]["estimates"]) == ("out of memory", {})
    assert [rows[name]["role"] for name in ("teacher", "base student", "orpo", "renamed")] == [
        "ceiling", "baseline", "method", "control"
    ]  # fmt: skip
    # the reference against every other row, except for the teacher, which reads more
    assert [(test["first"], test["second"]) for test in found["tests"]] == [
        ("orpo/free", "base"), ("orpo/free", "sft/free"), ("orpo/free", "renamed/free")
    ]  # fmt: skip
    differences = {test["second"]: test["difference"] for test in found["tests"]}
    assert differences["sft/free"]["value"] == pytest.approx(3 / 8)
    # groups of two: mean hits 2, 2, 1.5, 0.5 of ORPO against 0: 2 of the 16 exchanges are as extreme
    assert differences["base"]["p"] == 2 / 2**4
    # against SFT three groups differ, so there are 8 exchanges; Holm: 3 x 0.125 for all tests
    assert differences["sft/free"]["p"] == 2 / 2**3
    assert [test["adjusted_p"] for test in found["tests"]] == pytest.approx([0.375] * 3)
    assert rows["orpo"]["unparsed"] == {"no_list": 2}
    cost = rows["orpo"]["cost"]
    assert {key: cost[key] for key in ("pairs", "tokens", "steps")} == {"pairs": 12, "tokens": 500, "steps": 3}
    assert list(cost["seconds"]) == ["pair", "tokenize", "train", "answer"]
    assert found["subgroups"] == {"female": 4, "male": 4, "under 1 year": 1, "1 to 5 years": 5, "6 to 11 years": 2}
    assert found["confusions"][0]["predicted"] == "Disease 7"
    assert found["near_duplicates"]["found"] == []
    assert found["disagreements"][0]["correct"]


def test_without_a_reference_every_pair_of_students_is_tested(tmp_path: Path) -> None:
    found = write_summary(tmp_path, {"orpo": {}, "sft": METHODS["sft"]}, {"orpo": [7, 5], "sft": [3, 3]}, {})
    assert [(test["first"], test["second"]) for test in found["tests"]] == [
        ("orpo/free", "base"), ("sft/free", "base"), ("sft/free", "orpo/free")
    ]  # fmt: skip


def evaluated(root: Path, name: str, *rows: list[Prediction]) -> dict[str, Any]:
    all_rows = [row for each in rows for row in each]
    return {"evaluate": write_artifact(root, "evaluate", name, {"predictions": (Prediction, all_rows)})}


def test_each_mode_is_a_row_and_rows_are_in_order(tmp_path: Path) -> None:
    base_ranked, aligned_ranked = Method(student="base", mode="rank"), Method(student="aligned", mode="rank")
    rows = [
        predictions(TEACHER, 7), predictions(BASE, 0), predictions(base_ranked, 1), predictions(ALIGNED, 3),
        predictions(aligned_ranked, 4),
    ]  # fmt: skip
    [orpo] = plan(orpo={"evaluate.generation.modes": ["free", "rank"], "allow_differences": True})
    [shared] = plan(sft={})
    runs = {"sft": [evaluated(tmp_path, "0", *rows)] * 2, "orpo": [evaluated(tmp_path, str(n), *rows) for n in (1, 2)]}
    found = collect_runs([shared, orpo], runs)
    assert [(each.name, each.method, len(each.runs)) for each in found] == [
        (None, TEACHER, 1), (None, BASE, 1), (None, base_ranked, 1), ("sft", ALIGNED, 2),
        ("orpo", ALIGNED, 2), ("orpo", aligned_ranked, 2),
    ]  # fmt: skip


def test_teacher_and_base_student_do_not_come_from_a_method_that_differs(tmp_path: Path) -> None:
    run = evaluated(tmp_path, "1", predictions(TEACHER, 7), predictions(BASE, 0), predictions(ALIGNED, 3))
    plans = plan(orpo={"train.trainer.learning_rate": 1e-3, "allow_differences": True})
    assert [each.name for each in collect_runs(plans, {"orpo": [run] * 2})] == ["orpo"]


def test_a_method_with_retrieval_is_evaluated_by_its_answers_with_passages(tmp_path: Path) -> None:
    base, aligned = Method(student="base", retrieval=True), Method(student="aligned", retrieval=True)
    run = evaluated(
        tmp_path, "1", predictions(TEACHER, 7), predictions(BASE, 0), predictions(base, 2), predictions(ALIGNED, 3),
        predictions(aligned, 4),
    )  # fmt: skip
    retrieval = {"evaluate.retrieval": {"max_passages": 2}}
    plans = plan(rag={"student": "base", **retrieval}, both=retrieval)
    found = collect_runs(plans, {"rag": [run], "both": [run] * 2})
    assert [(each.name, each.method) for each in found] == [
        (None, TEACHER), (None, BASE), ("rag", base), ("both", aligned)
    ]  # fmt: skip
    assert {row.method for row in found[2].runs[0]} == {base}


def test_a_training_note_is_found_in_the_test_split() -> None:
    task = build_task(RareDisease(), LABELS, 2)
    copied = Record(
        record_id="copy",
        group_id="g",
        label_id=IDS[0],
        split="train",
        phenotypes=TEST[3].phenotypes,
        fields=TEST[3].fields,
    )
    clean = find_near_duplicates(RECORDS, task, 0.95)
    assert (clean.compared, clean.found) == (len(TEST), [])
    [match] = find_near_duplicates([*RECORDS, copied], task, 0.95).found
    assert (match.record_id, match.seen_id, match.same_label) == ("test3", "copy", False)
    assert match.similarity == pytest.approx(1)


def test_disagreements_are_records_with_right_and_wrong_answers(tmp_path: Path) -> None:
    run = evaluated(tmp_path, "1", predictions(TEACHER, 7), predictions(BASE, 0), predictions(ALIGNED, 3))
    rows = collect_runs(plan(orpo={}), {"orpo": [run] * 2})
    found = find_disagreements(rows, build_task(RareDisease(), LABELS, 2), RECORDS, 2)
    assert [each.record_id for each in found] == [f"test{number}" for number in range(5)]
    assert found[0].correct == ["teacher", "orpo/free"]
    assert found[0].answers["orpo/free"] == "aligned student 0"
