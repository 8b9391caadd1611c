"""Notes that the student has seen are found again."""

from __future__ import annotations

import pytest

from mint_ray.metrics.near_duplicates import ROWS_AT_ONCE, find_nearest

NOTE = "A 3-year-old boy has short stature, seizures, a broad nasal bridge and a cleft palate."


def test_the_same_note_is_found_whatever_its_case_and_marks() -> None:
    held_out = {"h1": NOTE.upper().replace(",", ";"), "h2": "A woman has hearing loss."}
    seen = {"s1": "A man has a webbed neck and a heart defect.", "s2": NOTE}
    first, second = find_nearest(held_out, seen)
    assert (first.record_id, first.seen_id) == ("h1", "s2")
    assert first.similarity == pytest.approx(1)
    assert second.record_id == "h2"
    assert second.similarity < 0.5


def test_one_finding_more_is_nearer_than_another_case() -> None:
    seen = {"near": NOTE.replace("seizures", "ataxia"), "far": "A 3-year-old boy has a cleft lip and deafness."}
    [leak] = find_nearest({"h": NOTE}, seen)
    assert leak.seen_id == "near"
    assert 0.6 < leak.similarity < 1


def test_similarity_is_the_cosine_of_tf_idf_by_hand() -> None:
    # single letters: words a, b and c, pairs "a b" and "a c"; in both texts or in one of two
    shared, own = 1.0, 1.0 + 0.4054651081081644  # ln((1 + 2) / (1 + 1)) + 1
    [leak] = find_nearest({"h": "a b"}, {"s": "a c"})
    assert leak.similarity == pytest.approx(shared**2 / (shared**2 + 2 * own**2))


def test_every_text_of_many_gets_its_own_nearest() -> None:
    count = ROWS_AT_ONCE + 3
    seen = {f"s{number}": f"finding{number} note" for number in range(count)}
    found = find_nearest({f"h{number}": f"finding{number} note" for number in range(count)}, seen)
    assert {(leak.record_id[1:], leak.seen_id[1:]) for leak in found} == {(str(n), str(n)) for n in range(count)}


def test_texts_without_words_are_like_nothing() -> None:
    assert find_nearest({"h": ""}, {"s": "a note"}) == []
    assert find_nearest({"h": "..."}, {"s": "..."}) == []
    assert find_nearest({}, {"s": "a note"}) == []
