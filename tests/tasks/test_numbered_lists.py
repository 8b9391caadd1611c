"""Numbered lists: written, parsed, and matched with labels."""

from __future__ import annotations

import pytest

from mint_ray.config.loader import UserError
from mint_ray.records import Label
from mint_ray.tasks import Answer
from mint_ray.tasks.numbered_lists import (
    describe_random_lists,
    fold_accents,
    index_names,
    parse_list,
    write_list,
    write_request,
)

HEADER = "MOST_LIKELY:"


def test_a_request_ends_with_the_skeleton_of_the_answer() -> None:
    assert write_request("List 2", HEADER, 2) == "List 2, best first, exactly as:\nMOST_LIKELY:\n1. ''\n2. ''"


def test_a_list_is_numbered_and_quoted() -> None:
    assert write_list(HEADER, ["a", "b"]) == "MOST_LIKELY:\n1. 'a'\n2. 'b'"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("MOST_LIKELY:\n1. 'a'\n2. 'b'", ["a", "b"]),
        ("1) a\n2) b.", ["a", "b"]),
        ("Sure!\nmost likely: \n**1.** `a`\n**2.** *b*", ["a", "b"]),
        ("1. x\nMOST-LIKELY:\n1. “a”, because of b", ["a"]),
        ("1. 'Alzheimer's disease' (late)", ["Alzheimer's disease"]),
        ("1. 'no closing quote", ["no closing quote"]),
    ],
)
def test_names_are_parsed_without_numbers_quotes_and_emphasis(text: str, names: list[str]) -> None:
    assert parse_list(text, HEADER, 2, str.upper) == Answer(labels=[name.upper() for name in names], names=names)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n", "empty"),
        ("It could be a.", "no_list"),
        ("1. a\nMOST_LIKELY:\n", "no_list"),
        ("1. a\n2. b\n3. c", "too_many"),
    ],
)
def test_other_texts_have_a_reason(text: str, reason: str) -> None:
    assert parse_list(text, HEADER, 2, str) == Answer(reason=reason)


def test_names_synonyms_and_ids_are_indexed() -> None:
    labels = [Label(label_id="A:1", name="Alpha", synonyms=["First"]), Label(label_id="B:2", name="Beta")]
    assert index_names(labels, str.lower) == {
        "alpha": "A:1", "a:1": "A:1", "first": "A:1", "beta": "B:2", "b:2": "B:2",
    }  # fmt: skip
    with pytest.raises(UserError, match="labels A:1 and C:3 are both called 'alpha'"):
        index_names([*labels, Label(label_id="C:3", name="alpha")], str.lower)


def test_accents_and_case_are_folded() -> None:
    assert fold_accents("Sjögren Ménière ẞ") == "sjogren meniere ss"


def test_the_accuracy_of_random_lists_is_described() -> None:
    assert (
        describe_random_lists(5, 19) == "A random list of 5 of the 19 labels contains the true one in 26.3% of cases."
    )
    assert "in 100.0% of cases" in describe_random_lists(5, 3)
