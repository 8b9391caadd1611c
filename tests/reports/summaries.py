"""Summaries of a run, a comparison and a sweep, for tests of their reports."""

from __future__ import annotations

import math
from typing import Any

from mint_ray.metrics import METRICS, PAPER_METRICS, Difference, Estimate, Transitions
from mint_ray.records import Method
from mint_ray.reports import Example, LabelHits, MethodResult, RunSummary
from mint_ray.reports.comparison import (
    ComparisonRow,
    ComparisonSummary,
    Confusion,
    Cost,
    Disagreement,
    NearDuplicate,
    NearDuplicateCheck,
    PairedTest,
    Role,
)
from mint_ray.reports.sweep import SweepSummary, TrialRow
from mint_ray.runtime.goodput import Goodput, ResourceSeconds


def estimates(start: float) -> dict[str, Estimate]:
    """Return estimates that differ by metric and by method."""
    values = [start + 0.07 * place for place in range(len(METRICS))]
    return {
        name: Estimate(value, value - 0.031, value + 0.043, 3 if name == "top_k_accuracy" else None)
        for name, value in zip(METRICS, values, strict=True)
    }


RUN = RunSummary(
    title="Rare disease from text",
    methods=[
        MethodResult(method=Method(student="teacher"), estimates=estimates(0.51)),
        MethodResult(method=Method(student="teacher", ablated="face"), estimates=estimates(0.42)),
        MethodResult(method=Method(student="base"), estimates=estimates(0.05)),
        MethodResult(method=Method(student="aligned"), estimates=estimates(0.33)),
    ],
    counts={"prepare": {"train": 4312, "validation": 517}, "pair": {"train": 12936}},
    dropped={"prepare": {"no_label": 41}, "pair": {}},
    log_history=[
        {"step": 10, "loss": 2.5, "log_odds_ratio": -0.9, "learning_rate": 5e-5, "epoch": 0.5},
        {"step": 20, "loss": math.nan, "log_odds_ratio": -0.5, "rewards/accuracies": 0.8},
        {"step": 20, "eval_loss": 1.9, "eval_log_odds_ratio": -0.6},
        {"step": 20, "train_runtime": 12.0},
    ],
    per_label=[
        LabelHits(name="Marfan syndrome", n=12, base=1, aligned=9),
        LabelHits(name="Rett syndrome", n=3, base=0, aligned=2),
    ],
    transitions=Transitions(kept=23, gained=281, lost=6, neither=307),
    examples=[
        Example(record_id="r-77", prompt="A tall boy.", truth="Marfan syndrome", base="no idea", aligned="1. Marfan")
    ],
    notes=["Facial terms stand in for the photograph."],
    seconds={"train": 7312.0, "score": 48.1},
    goodput={
        "prepare": Goodput(attempts=1, wall_seconds=3.0),
        "score": Goodput(
            attempts=1,
            wall_seconds=48.1,
            waiting_seconds=4.0,
            allocated=ResourceSeconds(cpu_seconds=1600.0),
            startup=ResourceSeconds(cpu_seconds=400.0),
            productive=ResourceSeconds(cpu_seconds=800.0),
            lost=ResourceSeconds(cpu_seconds=100.0),
            idle=ResourceSeconds(cpu_seconds=300.0),
        ),
        "train": Goodput(
            attempts=2,
            wall_seconds=7312.0,
            waiting_seconds=61.0,
            allocated=ResourceSeconds(cpu_seconds=8400.0, gpu_seconds=1400.0),
            startup=ResourceSeconds(cpu_seconds=600.0, gpu_seconds=100.0),
            productive=ResourceSeconds(cpu_seconds=7200.0, gpu_seconds=1200.0),
            lost=ResourceSeconds(cpu_seconds=600.0, gpu_seconds=100.0),
        ),
    },
    artifacts={"train": "s3://bucket/train-0123456789ab"},
    config={"train": {"trainer": {"beta": 0.1}}},
    versions={"mint_ray": "0.1.0"},
)


SUBGROUPS = {"rare labels": 31, "frequent labels": 29, "female": 33, "male": 27, "under 1 year": 9, "1 to 5 years": 14,
         "6 to 11 years": 12, "12 to 17 years": 6, "18 to 39 years": 11, "40 years and over": 4, "age unknown": 4}  # fmt: skip


def row(name: str | None, method: Method, role: Role, start: float, **more: Any) -> ComparisonRow:
    values = [start + 0.013 * place for place in range(len(METRICS))]
    is_trained = role in ("method", "control")
    return ComparisonRow(
        name=name,
        method=method,
        role=role,
        runs=3 if is_trained else 1,
        estimates={
            key: Estimate(value, value - 0.031, value + 0.043, 3 if key == "top_k_accuracy" else None)
            for key, value in zip(METRICS, values, strict=True)
        },
        paper={} if role == "ceiling" else {key: start + 0.011 * place for place, key in enumerate(PAPER_METRICS)},
        subgroups={name: Estimate(start, start - 0.2, start + 0.21) for name in SUBGROUPS},
        unparsed={"no_list": 2} if role == "baseline" else {},
        cost=Cost(pairs=243, tokens=71_234, steps=61, seconds=SECONDS) if is_trained else None,
        log_history=[
            {"step": step, "loss": 2.5 / (1 + step / 9), "rewards/accuracies": 0.5 + step / 200} for step in range(5, 61, 5)
        ] + [{"step": 30, "eval_loss": 0.9}, {"step": 60, "eval_loss": 0.6}] if is_trained else [],
        **more,
    )  # fmt: skip


SECONDS = {"pair": 2.1, "tokenize": 4.0, "train": 254.0}
ALIGNED = Method(student="aligned")
KEYS = ["base", "orpo/free", "sft/free", "sft on the truth/free", "dpo/free", "orpo, labels renamed/free"]

COMPARISON = ComparisonSummary(
    title="ORPO and other methods",
    rows=[
        row(None, Method(student="teacher"), "ceiling", 0.8),
        row(None, Method(student="teacher", ablated="face"), "ceiling", 0.7),
        row(None, Method(student="base"), "baseline", 0.05),
        row("orpo", ALIGNED, "method", 0.43),
        row("sft", ALIGNED, "method", 0.41),
        row("sft on the truth", ALIGNED, "method", 0.3),
        row("dpo", ALIGNED, "method", 0.12, differences=["train.trainer.learning_rate"]),
        row("orpo, preferences swapped", ALIGNED, "control", 0.2),
        row("orpo, labels renamed", ALIGNED, "control", 0.04),
        ComparisonRow(name="simpo", method=ALIGNED, role="method", runs=0, error="UserError-like text: margin drew no pair"),
    ],
    metric="top_1_accuracy",
    tests=[
        PairedTest(first="orpo/free", second="base", difference=Difference(0.38, 0.25, 0.51, 0.0001), adjusted_p=0.0006),
        PairedTest(first="orpo/free", second="sft/free", difference=Difference(0.02, -0.07, 0.11, 0.671), adjusted_p=0.999),
    ],
    subgroups=SUBGROUPS,
    confusions=[
        Confusion(truth="Noonan syndrome 1", predicted="Noonan syndrome 5", counts=dict.fromkeys(KEYS, 2.3)),
    ],
    disagreements=[
        Disagreement(
            record_id="PMID_123_case_7",
            prompt="A 3-year-old boy has short stature.",
            truth="Noonan syndrome 1",
            answers=dict.fromkeys(KEYS, "POTENTIAL_DISEASES:\n1. 'Marfan syndrome'"),
            correct=["orpo/free", "sft/free"],
        )
    ],
    near_duplicates=NearDuplicateCheck(
        compared=60, threshold=0.95, median=0.41,
        found=[NearDuplicate(record_id="h7", seen_id="t9", similarity=0.987, same_label=True, same_group=False)],
    ),
    counts={"records_train": 243, "records_test": 60},
    dropped={"no_label": 41},
    notes=["Controls must bring no gain."],
    spec={"seeds": [0, 1, 2]},
    manifests={"train-0123456789ab": {"versions": {"torch": "2.13.0"}}},
)  # fmt: skip


def trial(number: int, state: str, value: float | None, seconds: float, **more: object) -> TrialRow:
    sampler = "margin" if number % 2 else "hard"
    parameters = {"train.trainer.objective.beta": 0.1 * (number + 1), "pair.sampler": sampler}
    if sampler == "margin":
        parameters["pair.sampler[margin].margin"] = 0.02 * number
    return TrialRow(
        number=number, state=state, value=value, worker_seconds=seconds, parameters=parameters,
        changes={"train.trainer.objective.beta": 0.1 * (number + 1), "pair.sampler": {"kind": sampler}},
        curve=[(1, 3.0), (2, 2.0 + number / 10)], **more,
    )  # type: ignore[arg-type]  # fmt: skip


SWEEP = SweepSummary(
    title="A <b>sweep</b>",
    metric="top_k_accuracy",
    direction="maximize",
    trials=[
        trial(0, "complete", 0.4, 100),
        trial(1, "complete", 0.6, 120),
        trial(2, "pruned", None, 30),
        trial(3, "fail", None, 5, error="UserError: no pairs | to <train> on"),
        trial(4, "complete", 0.5, 200),
    ],
    importance={"pair.sampler": 0.7, "train.trainer.objective.beta": 0.3},
    data_parameters=["pair.sampler", "pair.sampler[margin].margin"],
    curve_metric="nll_loss",
    default_value=0.3,
    seeds={1: [0.6, 0.55, 0.5], 4: [0.5, 0.52]},
    winner=1,
    tested={
        "default": {"top_k_accuracy": Estimate(0.3, 0.2, 0.4, 3)},
        "winner": {"top_k_accuracy": Estimate(0.55, 0.4, 0.7, 3)},
    },
    config={"sweep": {"metric": "top_k_accuracy"}},
    study="sweep-0123456789ab",
)
