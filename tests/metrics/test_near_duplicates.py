"""Near-duplicate search, against similarities computed by hand."""

from __future__ import annotations

import pytest

from mint_ray.metrics import near_duplicates
from mint_ray.metrics.near_duplicates import find_most_similar

NOTE = "A 3-year-old boy has short stature, seizures, a broad nasal bridge and a cleft palate."


def test_case_and_punctuation_do_not_hide_the_same_note() -> None:
    held_out = {"h1": NOTE.upper().replace(",", ";"), "h2": "A woman has hearing loss."}
    seen = {"s1": "A man has a webbed neck and a heart defect.", "s2": NOTE}
    first, second = find_most_similar(held_out, seen)
    assert (first.record_id, first.seen_id) == ("h1", "s2")
    assert first.similarity == pytest.approx(1)
    assert second.record_id == "h2"
    assert second.similarity < 0.5


def test_a_note_with_one_other_finding_is_more_similar_than_another_case() -> None:
    seen = {"near": NOTE.replace("seizures", "ataxia"), "far": "A 3-year-old boy has a cleft lip and deafness."}
    [match] = find_most_similar({"h": NOTE}, seen)
    assert match.seen_id == "near"
    assert 0.6 < match.similarity < 1


def test_similarity_is_the_cosine_of_tf_idf_by_hand() -> None:
    # terms: a, b, c, "a b" and "a c"; only a is in both texts
    shared, own = 1.0, 1.0 + 0.4054651081081644  # ln((1 + 2) / (1 + 1)) + 1
    [match] = find_most_similar({"h": "a b"}, {"s": "a c"})
    assert match.similarity == pytest.approx(shared**2 / (shared**2 + 2 * own**2))


def test_each_text_is_matched_in_every_block_of_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 400
    # a block of 1 MiB has room for 327 rows of 400 similarities
    monkeypatch.setattr(near_duplicates, "WORKING_MEMORY_MIB", 1)
    seen = {f"s{number}": f"finding{number} note" for number in range(count)}
    found = find_most_similar({f"h{number}": f"finding{number} note" for number in range(count)}, seen)
    assert {(match.record_id[1:], match.seen_id[1:]) for match in found} == {(str(n), str(n)) for n in range(count)}


def test_texts_without_words_are_left_out() -> None:
    assert find_most_similar({"h": ""}, {"s": "a note"}) == []
    assert find_most_similar({"h": "..."}, {"s": "..."}) == []
    assert find_most_similar({}, {"s": "a note"}) == []
    assert [match.record_id for match in find_most_similar({"h": "", "i": "a"}, {"s": "a note"})] == ["i"]


def test_of_equal_texts_the_first_by_id_is_returned() -> None:
    [match] = find_most_similar({"h": NOTE}, {"b": NOTE, "a": NOTE, "c": "A man has a heart defect."})
    assert (match.seen_id, match.similarity) == ("a", pytest.approx(1))
