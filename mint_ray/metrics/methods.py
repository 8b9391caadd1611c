"""Metrics by method, as the manifest of `evaluate` lists them: one row per method, with the fields of `Method`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mint_ray.metrics.ranking import Estimate
from mint_ray.records import Method

METHODS = "methods"
"""Key of the rows in `Manifest.metrics`."""


def to_rows(measured: Mapping[Method, Mapping[str, Estimate]]) -> list[dict[str, Any]]:
    """Return plain rows `{"student", "retrieval", "mode", "ablated", "metrics"}`, in the order given."""
    return [
        {
            **dataclasses.asdict(method),
            "metrics": {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()},
        }
        for method, estimates in measured.items()
    ]


def read_methods(metrics: Mapping[str, Any]) -> dict[Method, dict[str, Estimate]]:
    """Return the estimates by method of the metrics of an `evaluate` manifest."""
    return {
        Method(**{key: value for key, value in row.items() if key != "metrics"}): {
            name: Estimate(**estimate) for name, estimate in row["metrics"].items()
        }
        for row in metrics[METHODS]
    }
