"""Metrics of predictions, against hand computations."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_ray.metrics import (
    METRICS,
    Estimate,
    LabelCount,
    Resampling,
    Transitions,
    count_label_hits,
    count_top_1_confusions,
    count_transitions,
    effective_k,
    measure,
    measure_runs,
)
from mint_ray.records import Prediction

RANKING = ["a", "b", "c", "d", "e", "f"]


def answer(record_id: str, *labels: str, reason: str | None = None) -> Prediction:
    return Prediction(record_id=record_id, student="aligned", labels=list(labels), text="", reason=reason)


def values(predictions: list[Prediction], truth: dict[str, str], **changes: object) -> dict[str, float]:
    arguments: dict[str, object] = {
        "truth": truth,
        "teacher": dict.fromkeys(truth, RANKING),
        "group": {record_id: record_id for record_id in truth},
        "top": 2,
        "bottom": 2,
        "resampling": Resampling(resamples=20),
    }
    estimates = measure(predictions, **{**arguments, **changes})  # type: ignore[arg-type]
    return {name: estimate.value for name, estimate in estimates.items()}


def test_metrics_equal_a_hand_computation() -> None:
    predictions = [
        answer("1", "a", "e"),  # right first; one of two covered, one of two in the bottom
        answer(
            "2", "c", "b", "", "f"
        ),  # right second; a quarter covered, a quarter in the bottom, one name is no label
        answer("3", reason="no_list"),
        answer("4", "b", "b", "a"),  # wrong; all covered, nothing in the bottom
    ]
    found = values(predictions, {"1": "a", "2": "b", "3": "a", "4": "d"})
    coverage, avoidance = (1 / 2 + 1 / 4 + 0 + 1) / 4, (1 / 2 + 3 / 4 + 0 + 1) / 4
    assert found == pytest.approx(
        {
            "top_1_accuracy": 1 / 4,
            "top_k_accuracy": 2 / 4,
            "mean_reciprocal_rank": (1 + 1 / 2 + 0 + 0) / 4,
            "macro_top_1_accuracy": (1 / 2 + 0 + 0) / 3,  # a is the truth twice, b and d once
            "hallucination_free_accuracy": 2 / 4,
            "hallucination_rate": (0 + 1 + 1 + 0) / (2 + 4 + 1 + 3),  # an empty answer counts as one such item
            "coverage": coverage,
            "avoidance": avoidance,
            "car": 2 * coverage * avoidance / (coverage + avoidance),
            "readable": 3 / 4,
        }
    )
    assert list(found) == [name for name in METRICS if name not in ("expected_calibration_error", "brier_score")]


def test_car_weighs_coverage_and_avoidance_as_the_paper_does() -> None:
    truth = {"1": "a"}
    found = values([answer("1", "a", "c", "d", "e")], truth, car_weight=0.5)
    assert found["coverage"] == 0.25
    assert found["avoidance"] == 0.75
    assert found["car"] == pytest.approx(1.5 * 0.25 * 0.75 / (0.5 * 0.25 + 0.75))


def test_a_repeated_label_counts_once_and_each_name_that_is_no_label_counts() -> None:
    assert values([answer("1", "a", "a", "c")], {"1": "a"})["coverage"] == 1 / 2
    assert values([answer("1", "a", "", "")], {"1": "a"})["coverage"] == pytest.approx(1 / 3)
    assert values([answer("1", "f", "", "")], {"1": "a"})["avoidance"] == pytest.approx(2 / 3)


def test_repeated_names_occupy_places_of_the_first_k() -> None:
    assert values([answer("1", "b", "a")], {"1": "a"}, top=2)["top_k_accuracy"] == 1
    assert values([answer("1", "b", "b", "a")], {"1": "a"}, top=2)["top_k_accuracy"] == 0


def test_k_is_the_list_length_up_to_ten_and_stands_beside_the_estimate() -> None:
    assert [effective_k(top) for top in (1, 3, 10, 30)] == [1, 3, 10, 10]
    found = measure([answer("1", "a")], truth={"1": "a"}, teacher={}, group={"1": "g"}, top=3, bottom=1)
    assert {name: estimate.k for name, estimate in found.items() if estimate.k is not None} == {"top_k_accuracy": 3}
    ranking = [f"L{number}" for number in range(12)]
    for place, right in ((9, 1), (10, 0)):
        named = measure(
            [answer("1", *ranking)], truth={"1": ranking[place]}, teacher={}, group={"1": "g"}, top=12, bottom=1
        )
        assert named["top_k_accuracy"] == Estimate(right, right, right, k=10)


@pytest.mark.parametrize("silent", [answer("1", reason="no_list"), answer("1")])
def test_an_answer_without_names_scores_zero(silent: Prediction) -> None:
    found = values([silent], {"1": "a"})
    assert found.pop("readable") == (silent.reason is None)
    assert found.pop("hallucination_rate") == 1
    assert set(found.values()) == {0.0}


def test_the_labels_of_an_unparsed_answer_do_not_count() -> None:
    found = values([answer("1", "a", reason="cut_off")], {"1": "a"})
    assert found.pop("hallucination_rate") == 1
    assert set(found.values()) == {0.0}


def test_records_without_a_teacher_ranking_are_left_out_of_coverage_only() -> None:
    predictions = [answer("1", "a", "c"), answer("2", "b")]
    found = values(predictions, {"1": "a", "2": "a"}, teacher={"1": RANKING, "2": []})
    assert (found["top_1_accuracy"], found["coverage"]) == (0.5, 0.5)
    assert "car" not in values(predictions, {"1": "a", "2": "a"}, teacher={})


def test_predictions_outside_the_truth_are_ignored() -> None:
    assert values([answer("1", "a"), answer("2", "b")], {"1": "a"})["top_1_accuracy"] == 1


@pytest.mark.parametrize(
    ("predictions", "changes", "message"),
    [
        ([answer("r1", "a")], {}, "'r2' has no prediction"),
        ([answer("r1", "a"), answer("r2"), answer("r2")], {}, "'r2' has more than one prediction"),
        ([answer("r1"), answer("r2")], {"group": {"r1": "g"}}, "'r2' has no group"),
        ([answer("r1"), answer("r2")], {"top": 5}, "'r1': the teacher ranks 6 labels, fewer than top . bottom = 7"),
        ([answer("r1"), answer("r2")], {"bottom": 0}, "got 2 and 0"),
        ([answer("r1"), answer("r2")], {"car_weight": math.nan}, "got nan"),
    ],
)
def test_unusable_input_is_refused_with_its_name(
    predictions: list[Prediction], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        values(predictions, {"r1": "a", "r2": "a"}, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"resamples": 0}, "got 0 and 10000"), ({"permutations": 0}, "got 1000 and 0"), ({"confidence": 95}, "got 95")],
)
def test_resampling_settings_out_of_range_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Resampling(**changes)  # type: ignore[arg-type]


def test_no_records_are_refused() -> None:
    with pytest.raises(ValueError, match="no records"):
        values([], {})


def test_the_interval_of_many_groups_is_that_of_a_binomial_share() -> None:
    truth = {str(number): "a" for number in range(400)}
    predictions = [answer(key, "a" if int(key) < 120 else "b") for key in truth]
    estimate = measure(
        predictions,
        truth=truth,
        teacher={},
        group={key: key for key in truth},
        top=1,
        bottom=1,
        resampling=Resampling(resamples=4000),
    )["top_1_accuracy"]
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert estimate.value == pytest.approx(0.3)
    assert estimate.low == pytest.approx(0.3 - half, abs=0.006)
    assert estimate.high == pytest.approx(0.3 + half, abs=0.006)


def test_records_of_one_group_are_drawn_together() -> None:
    truth = {str(number): "a" for number in range(200)}
    predictions = [answer(key, "a" if int(key) % 2 else "b") for key in truth]
    pairs = {key: str(int(key) % 2) for key in truth}
    together = measure(predictions, truth=truth, teacher={}, group=pairs, top=1, bottom=1)["top_1_accuracy"]
    assert together == Estimate(0.5, 0.0, 1.0)
    one = measure(predictions, truth=truth, teacher={}, group=dict.fromkeys(truth, "g"), top=1, bottom=1)
    assert one["top_1_accuracy"] == Estimate(0.5, 0.5, 0.5)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Prediction], dict[str, str], dict[str, list[str]], dict[str, str]]:
    count = draw(st.integers(1, 12))
    keys = [f"r{number}" for number in range(count)]
    named = st.lists(st.sampled_from([*RANKING, ""]), max_size=12)
    reasons = st.sampled_from([None, None, None, "no_list"])
    predictions = [answer(key, *draw(named), reason=draw(reasons)) for key in keys]
    truth = {key: draw(st.sampled_from(RANKING)) for key in keys}
    teacher = {key: draw(st.one_of(st.permutations(RANKING), st.just([]))) for key in keys}
    group = {key: draw(st.sampled_from("xyz")) for key in keys}
    return predictions, truth, teacher, group


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), st.floats(0, 4), st.randoms(use_true_random=False))
def test_intervals_contain_their_value_and_the_order_of_rows_does_not_matter(
    case: tuple[list[Prediction], dict[str, str], dict[str, list[str]], dict[str, str]],
    weight: float,
    rng: random.Random,
) -> None:
    predictions, truth, teacher, group = case
    found = measure(
        predictions,
        truth=truth,
        teacher=teacher,
        group=group,
        top=2,
        bottom=3,
        car_weight=weight,
        resampling=Resampling(resamples=30),
    )
    for estimate in found.values():
        assert -1e-12 <= estimate.low <= estimate.value <= estimate.high <= 1 + 1e-12
    assert found["top_1_accuracy"].value <= found["top_k_accuracy"].value <= found["readable"].value
    assert found["hallucination_free_accuracy"].value <= found["readable"].value
    shuffled, keys = list(predictions), list(truth)
    rng.shuffle(shuffled)
    rng.shuffle(keys)
    again = measure(
        shuffled,
        truth={key: truth[key] for key in keys},
        teacher=teacher,
        group=group,
        top=2,
        bottom=3,
        car_weight=weight,
        resampling=Resampling(resamples=30),
    )
    assert again == found


def test_hits_are_counted_for_each_true_label() -> None:
    predictions = [answer("1", "a"), answer("2", "b", "a"), answer("3", "a"), answer("4", reason="no_list")]
    truth = {"1": "a", "2": "a", "3": "b", "4": "b"}
    assert count_label_hits(predictions, truth, k=2) == {
        "a": LabelCount(count=2, top_1=1, top_k=2),
        "b": LabelCount(count=2, top_1=0, top_k=0),
    }
    assert count_label_hits(predictions, truth, k=1)["a"] == LabelCount(count=2, top_1=1, top_k=1)


def test_each_record_is_counted_as_one_transition() -> None:
    truth = dict.fromkeys("12345", "a")
    before = [answer("1", "a"), answer("2", "b"), answer("3", "b", "a"), answer("4"), answer("5", "b")]
    after = [answer("1", "b", "a"), answer("2", "a"), answer("3", "b"), answer("4"), answer("5", "a")]
    assert count_transitions(before, after, truth, k=10) == Transitions(kept=1, gained=2, lost=1, neither=1)
    assert count_transitions(before, after, truth, k=1) == Transitions(kept=0, gained=2, lost=1, neither=2)


def ranked(record_id: str, **scores: float) -> Prediction:
    return Prediction(
        record_id=record_id, student="aligned", mode="rank", labels=list(scores), text="", scores=list(scores.values())
    )


def test_calibration_equals_a_hand_computation() -> None:
    predictions = [
        ranked("1", a=0.7, b=0.2, c=0.1),  # right
        ranked("2", b=0.72, a=0.18, c=0.1),  # wrong; in one bin with the first
        ranked("3", c=0.5, a=0.3, b=0.2),  # right
        answer("4", reason="empty"),
    ]
    found = values(predictions, {"1": "a", "2": "a", "3": "c", "4": "a"}, top=1, bottom=1, teacher={})
    # bins: (0.7, right) and (0.72, wrong); (0.5, right); the empty answer has no probabilities
    assert found["expected_calibration_error"] == pytest.approx((abs(1 - 0.7 + 0 - 0.72) + abs(1 - 0.5)) / 4)
    brier = [0.3**2 + 0.2**2 + 0.1**2, 0.82**2 + 0.72**2 + 0.1**2, 0.5**2 + 0.3**2 + 0.2**2, 1.0]
    assert found["brier_score"] == pytest.approx(sum(brier) / 4)
    assert found["mean_reciprocal_rank"] == pytest.approx((1 + 1 / 2 + 1 + 0) / 4)


def test_a_perfect_and_certain_ranking_has_no_calibration_error() -> None:
    found = values([ranked("1", a=1.0, b=0.0)], {"1": "a"}, teacher={})
    assert (found["expected_calibration_error"], found["brier_score"]) == (0, 0)


def test_a_ranking_of_all_labels_is_truncated_to_the_list_length() -> None:
    whole = ranked("1", c=0.4, a=0.3, b=0.2, f=0.05, e=0.04, d=0.01)
    found = values([whole], {"1": "b"})
    assert found["top_k_accuracy"] == 0, "b stands behind the first two"
    assert (found["coverage"], found["avoidance"]) == (1 / 2, 1)
    assert found["mean_reciprocal_rank"] == pytest.approx(1 / 3)


def test_scores_of_another_length_than_the_labels_are_refused_by_name() -> None:
    broken = Prediction(record_id="1", student="aligned", labels=["a", "b"], text="", scores=[1.0])
    with pytest.raises(ValueError, match="'1': 1 scores for 2 labels"):
        values([broken], {"1": "a"})


def test_several_runs_are_measured_by_their_mean_with_both_sources_of_variation() -> None:
    truth = {str(number): "a" for number in range(100)}
    group = {key: key for key in truth}
    good, bad = [answer(key, "a") for key in truth], [answer(key, "b") for key in truth]
    settings = {"truth": truth, "teacher": {}, "group": group, "top": 1, "bottom": 1}
    both = measure_runs([good, bad], **settings)["top_1_accuracy"]  # type: ignore[arg-type]
    # drawing two of two runs gives 0, 1/2, 1/2 or 1, whatever groups are drawn
    assert both == Estimate(0.5, 0.0, 1.0)
    assert measure_runs([good, good], **settings)["top_1_accuracy"] == Estimate(1, 1, 1)  # type: ignore[arg-type]
    half = [answer(key, "a" if int(key) % 2 else "b") for key in truth]
    assert measure_runs([half], **settings) == measure(half, **settings)  # type: ignore[arg-type]
    same = measure_runs([half, half], **settings)["top_1_accuracy"]  # type: ignore[arg-type]
    assert same == measure(half, **settings)["top_1_accuracy"]  # type: ignore[arg-type]


def test_a_row_missing_from_one_run_is_named() -> None:
    truth = {"1": "a", "2": "a"}
    with pytest.raises(ValueError, match="'2' has no prediction"):
        measure_runs(
            [[answer("1", "a"), answer("2", "a")], [answer("1", "a")]],
            truth=truth, teacher={}, group={"1": "g", "2": "h"}, top=1, bottom=1,
        )  # fmt: skip
    with pytest.raises(ValueError, match="no runs"):
        measure_runs([], truth=truth, teacher={}, group={}, top=1, bottom=1)


def test_top_1_confusions_are_counted_over_all_runs() -> None:
    truth = {"1": "a", "2": "a", "3": "b"}
    first = [answer("1", "b", "a"), answer("2", "a"), answer("3", "")]
    second = [answer("1", "b"), answer("2", "b"), answer("3", reason="empty")]
    assert count_top_1_confusions([first, second], truth) == {("a", "b"): 3}
