"""The paper's evaluator compared with ours, on answers that the two judge differently."""

from __future__ import annotations

import pytest

from mint_ray.metrics import PAPER_METRICS, Resampling, measure, measure_as_paper
from mint_ray.records import Label, Prediction
from mint_ray.tasks import build_task
from mint_ray.tasks.config import RareDisease

NAMES = {
    "OMIM:163950": "Noonan syndrome 1",
    "OMIM:609942": "Noonan syndrome 5",
    "OMIM:154700": "Marfan syndrome",
    "OMIM:147920": "Kabuki syndrome 1",
}
LABELS = [
    Label(label_id=label_id, name=name, synonyms=["Male Turner syndrome"] if name == "Noonan syndrome 1" else [])
    for label_id, name in NAMES.items()
]
TRUTH = {"r1": "OMIM:163950", "r2": "OMIM:154700"}
RANKINGS = {
    "r1": ["OMIM:163950", "OMIM:609942", "OMIM:154700", "OMIM:147920"],
    "r2": ["OMIM:154700", "OMIM:147920", "OMIM:163950", "OMIM:609942"],
}


def written(*names: str) -> str:
    return "\n".join(["POTENTIAL_DISEASES:", *(f"{place}. '{name}'" for place, name in enumerate(names, start=1))])


def read(texts: dict[str, str]) -> list[Prediction]:
    """Parse answers as the evaluation does."""
    task = build_task(RareDisease(), LABELS, 2)
    found = {record_id: task.parse(text) for record_id, text in texts.items()}
    return [
        Prediction(record_id=key, student="aligned", labels=answer.labels, text=texts[key], reason=answer.reason)
        for key, answer in found.items()
    ]


def ours(texts: dict[str, str]) -> dict[str, float]:
    found = measure(
        read(texts),
        truth=TRUTH,
        teacher=RANKINGS,
        group={key: key for key in TRUTH},
        top=1,
        bottom=1,
        resampling=Resampling(resamples=10),
    )
    return {name: estimate.value for name, estimate in found.items()}


def as_paper(texts: dict[str, str]) -> dict[str, float]:
    return measure_as_paper(read(texts), truth=TRUTH, teacher=RANKINGS, name=NAMES, top=1, bottom=1)


NONSENSE = {"r1": written("blue bicycle", "seven of nine"), "r2": written("qwerty", "asdf")}


def test_nonsense_scores_zero_here_and_passes_the_papers_first_metric() -> None:
    found = ours(NONSENSE)
    assert found.pop("hallucination_rate") == 1
    assert found.pop("readable") == 1
    # a name that is no label is not at the bottom of the ranking either
    assert found.pop("avoidance") == 1
    assert set(found.values()) == {0.0}
    paper = as_paper(NONSENSE)
    assert paper["paper_e1"] == 1
    assert paper["paper_e2"] == paper["paper_e3"] == paper["paper_coverage"] == paper["paper_car"] == 0


def test_text_without_a_list_scores_zero() -> None:
    found = ours({"r1": "lorem ipsum dolor", "r2": "@@@"})
    assert found.pop("hallucination_rate") == 1
    assert set(found.values()) == {0.0}


def test_another_number_of_a_syndrome_is_wrong_here_and_right_in_the_paper() -> None:
    texts = {"r1": written("Noonan syndrome 5"), "r2": written("Marfan syndrome")}
    assert ours(texts)["top_1_accuracy"] == 1 / 2
    assert as_paper(texts)["paper_e3"] == as_paper(texts)["paper_e2"] == 1


def test_a_synonym_is_right_here_and_wrong_in_the_paper() -> None:
    texts = {"r1": written("Male Turner syndrome"), "r2": written("Marfan syndrome")}
    assert ours(texts)["top_1_accuracy"] == 1
    assert as_paper(texts)["paper_e3"] == 1 / 2


def test_an_empty_answer_shifts_the_rows_in_the_paper_and_is_wrong_here() -> None:
    texts = {"r1": "", "r2": written("Marfan syndrome")}
    assert ours(texts)["top_1_accuracy"] == 1 / 2
    # the only answer is compared with the truth of the first record
    assert as_paper(texts)["paper_e3"] == 0
    shifted = {"r1": "", "r2": written("Noonan syndrome 1")}
    assert ours(shifted)["top_1_accuracy"] == 0
    assert as_paper(shifted)["paper_e3"] == 1


def test_a_missing_row_and_a_repeated_row_are_refused() -> None:
    rows = read({"r1": written("Marfan syndrome"), "r2": written("Marfan syndrome")})
    settings = {"truth": TRUTH, "teacher": {}, "group": {key: key for key in TRUTH}, "top": 1, "bottom": 1}
    with pytest.raises(ValueError, match="'r1' has no prediction"):
        measure(rows[1:], **settings)  # type: ignore[arg-type]
    # two rows of the second record, as if every row had moved up by one
    with pytest.raises(ValueError, match="'r2' has more than one prediction"):
        measure([rows[1], *rows], **settings)  # type: ignore[arg-type]


def test_the_papers_numbers_equal_a_hand_computation() -> None:
    texts = {"r1": written("Marfan syndrome", "Noonan syndrome 1"), "r2": written("Marfan syndrom", "x")}
    found = measure_as_paper(read(texts), truth=TRUTH, teacher=RANKINGS, name=NAMES, top=2, bottom=1)
    # r1: one of the two names matches the teacher's first two, which are both Noonan; r2: only Marfan
    coverage = (1 / 2 + 1 / 2) / 2
    # the last label of r1, Kabuki syndrome 1, matches no Noonan (0.71); that of r2, Noonan 5, none of its first two
    assert found == pytest.approx(
        {
            "paper_e1": 1.0, "paper_e2": 1.0, "paper_e3": 1 / 2, "paper_coverage": coverage, "paper_avoidance": 1.0,
            "paper_car": 1.5 * 0.5 * 1 / (0.5 * 0.5 + 1),
        }
    )  # fmt: skip
    assert list(found) == list(PAPER_METRICS)


def test_the_papers_avoidance_ignores_the_answer() -> None:
    bottom = {"r1": written("Kabuki syndrome 1"), "r2": written("Noonan syndrome 5")}
    assert as_paper(bottom)["paper_avoidance"] == as_paper(NONSENSE)["paper_avoidance"] == 1
    assert ours(bottom)["avoidance"] == 0


def test_empty_answers_give_no_metrics() -> None:
    assert as_paper({"r1": "", "r2": " "}) == {}
