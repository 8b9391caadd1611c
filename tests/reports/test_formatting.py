"""Titles of metrics and formats of numbers."""

from __future__ import annotations

import math

import pytest

from mint_ray.metrics import METRICS, PAPER_METRICS, Difference, Estimate
from mint_ray.reports.formatting import (
    describe_metrics,
    find_k,
    format_changes,
    format_difference,
    format_interval,
    format_number,
    format_p,
    format_seconds,
    format_share,
    format_value,
    metric_title,
    order_metrics,
)


def test_every_metric_has_a_title_and_a_description() -> None:
    described = describe_metrics([*METRICS, *PAPER_METRICS], 3)
    assert len(described) == len(METRICS) + len(PAPER_METRICS)
    assert not [title for title in described if "_" in title or "{" in title]


def test_the_title_of_top_k_accuracy_has_the_k_of_its_estimates() -> None:
    found = [{"car": Estimate(0.5, 0.4, 0.6)}, {"top_k_accuracy": Estimate(0.5, 0.4, 0.6, 3)}]
    assert metric_title("top_k_accuracy", find_k(found)) == "Top-3 accuracy"
    assert metric_title("top_k_accuracy", find_k([])) == "Top-k accuracy"
    assert describe_metrics(["top_k_accuracy"], 3) == {
        "Top-3 accuracy": "share of records whose true label is among the first 3 names of the answer"
    }


def test_an_unknown_metric_is_called_by_its_name_and_comes_last() -> None:
    assert metric_title("my_metric") == "my metric"
    assert order_metrics([{"my_metric": 1, "car": 1}, {"top_1_accuracy": 1}]) == ["top_1_accuracy", "car", "my_metric"]


def test_durations_have_two_units() -> None:
    assert [format_seconds(seconds) for seconds in (0.44, 59.6, 192, 3720, 360000)] == [
        "0.4 s", "1 min 00 s", "3 min 12 s", "1 h 02 min", "100 h 00 min"
    ]  # fmt: skip


def test_p_values_and_differences() -> None:
    assert [format_p(p) for p in (0.0004, 0.034, 1.0)] == ["< 0.001", "0.034", "1.000"]
    assert format_difference(Difference(-0.1, -0.2, 0.04, 0.5)) == "-0.10 [-0.20, +0.04]"


@pytest.mark.parametrize("missing", [None, Estimate(math.nan, math.nan, math.nan)])
def test_a_missing_estimate_has_no_number(missing: Estimate | None) -> None:
    assert (format_value(missing), format_interval(missing)) == ("n/a", "")


def test_missing_numbers() -> None:
    assert (format_share(None), format_share(0.4)) == ("n/a", "0.40")
    assert (format_number(None), format_number(0.43311)) == ("n/a", "0.4331")


def test_changes_to_a_spec_are_one_line() -> None:
    changes = {"pair.sampler": {"kind": "hard", "top": 3}, "train.student.lora_rank": 8, "x": [0.25, "a"]}
    assert format_changes(changes) == "pair.sampler kind hard, top 3; train.student.lora_rank 8; x [0.25, a]"
