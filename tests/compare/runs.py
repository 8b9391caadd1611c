"""Artifacts of comparison runs with chosen predictions, for tests without any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mint_ray.artifacts import Artifact, open_artifact, verify
from mint_ray.compare.plan import MethodPlan, plan_methods
from mint_ray.compare.run import write_comparison
from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.loader import from_data
from mint_ray.records import Label, Method, Phenotype, Prediction, Record, TeacherScores

LABELS = [Label(label_id=f"OMIM:{number}", name=f"Disease {number}") for number in range(1, 9)]
IDS = [label.label_id for label in LABELS]
FINDINGS = ["Seizure", "Short stature", "Ataxia", "Cleft palate", "Deafness", "Hypotonia", "Scoliosis", "Polydactyly"]

TEACHER, BASE, ALIGNED = Method(student="teacher"), Method(student="base"), Method(student="aligned")


def config(methods: dict[str, Any], **more: Any) -> ComparisonConfig:
    base = {
        "task": {"kind": "rare_disease"},
        "prepare": {"source": {"kind": "hpo"}},
        "train": {"student": {"model_id": "bundled:smollm2-135m-instruct"}},
        "methods": methods,
    }
    return from_data(ComparisonConfig, {**base, **more})


def plan(**methods: Any) -> list[MethodPlan]:
    return plan_methods(config(methods, seeds=[0, 1]))


def case(number: int, split: Any) -> Record:
    """Return a record whose findings no other record has."""
    findings = [Phenotype(id=f"HP:000{number}{place}", label=f"{name} {number}") for place, name in enumerate(FINDINGS)]
    return Record(
        record_id=f"{split}{number}", group_id=f"{split}{number // 2}", label_id=IDS[number % 4], split=split,
        phenotypes=findings, fields={"sex": "MALE" if number % 2 else "FEMALE", "age": f"P{number}Y"},
    )  # fmt: skip


TEST = [case(number, "test") for number in range(8)]
RECORDS = [*(case(number, "train") for number in range(20, 32)), *TEST]


def predictions(method: Method, num_right: int) -> list[Prediction]:
    """Return answers to the test records: the first `num_right` are right, the last is unparsed, the others wrong."""
    rows = []
    for place, record in enumerate(TEST):
        labels = [record.label_id or "", IDS[7]] if place < num_right else [IDS[6], ""]
        reason = "no_list" if place == 7 else None
        rows.append(
            Prediction(
                record_id=record.record_id,
                student=method.student,
                retrieval=method.retrieval,
                mode=method.mode,
                ablated=method.ablated,
                labels=[] if reason else labels,
                text=f"{method.title} {place}",
                reason=reason,
            )
        )
    return rows


def write_artifact(
    root: Path, stage: str, name: str, rows: dict[str, tuple[Any, list[Any]]], **content: Any
) -> Artifact:
    artifact = open_artifact(str(root), stage, {"name": name}, {})
    with artifact.write() as draft:
        for table, (row, found) in rows.items():
            draft.write_rows(row, table, found)
        draft.counts.update(content.get("counts", {}))
        draft.metrics.update(content.get("metrics", {}))
        if stage == "train":
            draft.write_text("outcome.json", json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    return artifact


def write_run(root: Path, name: str, rows: list[Prediction]) -> dict[str, Artifact]:
    """Return the artifacts of a run whose evaluation has these predictions."""
    scores = [
        TeacherScores(
            record_id=record.record_id, split="test", teacher="t",
            labels=[record.label_id or "", *(x for x in IDS if x != record.label_id)],
            scores=[8.0 - place for place in range(8)],
        )
        for record in TEST
    ]  # fmt: skip
    tables = {"records": (Record, RECORDS), "labels": (Label, LABELS)}
    return {
        "prepare": write_artifact(root, "prepare", "p", tables, counts={"records_test": len(TEST)}),
        "score": write_artifact(root, "score", "s", {"scores": (TeacherScores, scores)}),
        "pair": write_artifact(root, "pair", name, {}, counts={"pairs_train": 12}),
        "tokenize": write_artifact(root, "tokenize", name, {}),
        "train": write_artifact(root, "train", name, {}, metrics={"tokens": 500, "steps": 3}),
        f"answer/{ALIGNED.key}": write_artifact(root, "answer", name, {}),
        "evaluate": write_artifact(root, "evaluate", name, {"predictions": (Prediction, rows)}),
    }


def write_summary(
    root: Path, methods: dict[str, Any], num_right: dict[str, list[int]], failed: dict[str, str], **more: Any
) -> dict[str, Any]:
    """Return `comparison.json` of a comparison, given the number of right answers of each run of each method."""
    comparison = config(
        methods,
        root=str(root),
        seeds=[0, 1],
        pair={"sampler": {"kind": "hard", "top": 2}},
        evaluate={"resamples": 200},
        **more,
    )
    shared = [*predictions(TEACHER, 7), *predictions(BASE, 0)]
    runs = {
        name: [
            write_run(root, f"{name} {number}", [*shared, *predictions(ALIGNED, count)])
            for number, count in enumerate(counts)
        ]
        for name, counts in num_right.items()
    }
    records = next(iter(runs.values()))[0]["prepare"]
    report = write_comparison(comparison, plan_methods(comparison), records, runs, failed)
    assert verify(report.uri) == []
    summary: dict[str, Any] = json.loads((Path(report.uri) / "comparison.json").read_text())
    return summary
