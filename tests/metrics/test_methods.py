"""Metrics by method, written to plain rows and read back."""

from __future__ import annotations

import json

from mint_ray.metrics import Estimate
from mint_ray.metrics.methods import METHODS, read_methods, to_rows
from mint_ray.records import Method

MEASURED = {
    Method(student="teacher", ablated="face"): {"top_1_accuracy": Estimate(0.5, 0.4, 0.6)},
    Method(student="aligned", retrieval=True, mode="rank"): {"top_k_accuracy": Estimate(0.75, 0.5, 1.0, k=3)},
}


def test_rows_carry_the_method_and_its_metrics() -> None:
    row = to_rows(MEASURED)[1]
    assert (row["student"], row["retrieval"], row["mode"], row["ablated"]) == ("aligned", True, "rank", None)
    assert row["metrics"] == {"top_k_accuracy": {"value": 0.75, "low": 0.5, "high": 1.0, "k": 3}}


def test_rows_survive_json_in_order() -> None:
    read = read_methods(json.loads(json.dumps({METHODS: to_rows(MEASURED)})))
    assert read == MEASURED
    assert list(read) == list(MEASURED)
