"""Tokens are those of TRL, and only the note of a record that is too long is truncated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from mint_ray.config.loader import UserError
from mint_ray.records import Message, PreferencePair
from mint_ray.trainers.tokenization import MIN_NOTE_TOKENS, tokenize_pairs
from tests.tiny import tiny_model, tiny_tokenizer

NOTE = " ".join(f"On day {day} the boy had seizures, short stature and a fever." for day in range(40))
REQUEST = "\n\nWhich diseases fit this case best?"


def to_pair(record_id: str, prompt: str, chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(
        prompt=[Message(role="user", content=prompt)],
        chosen=[Message(role="assistant", content=chosen)],
        rejected=[Message(role="assistant", content=rejected)],
        record_id=record_id, split="train", teacher="", sampler="", chosen_labels=[], rejected_labels=[],
    )  # fmt: skip


def with_note(record_id: str, note: str, answers: Sequence[str], request: str = REQUEST) -> list[PreferencePair]:
    """Return the pairs of a record: the first answer is preferred to each other one."""
    head = "Read this. "
    pairs = [to_pair(record_id, head + note + request, answers[0], other) for other in answers[1:]]
    return [dataclasses.replace(pair, note_span=[len(head), len(head) + len(note)]) for pair in pairs]


def length(tokenizer: PreTrainedTokenizerFast, note: str, answer: str) -> int:
    """Return the number of tokens of the conversation as the template writes it, and of the EOS after its newline."""
    turns = [("user", f"Read this. {note}{REQUEST}"), ("assistant", answer)]
    conversation = [{"role": role, "content": content} for role, content in turns]
    return len(tokenizer.apply_chat_template(conversation)["input_ids"]) + 1


def test_tokens_are_those_of_trl(tmp_path: Path) -> None:
    pairs = [
        to_pair("a", "A boy with seizures.", "1. Noonan syndrome", "1. Rett syndrome 2. Marfan"),
        to_pair("b", "", "é", "\n\n1. Rett"),
    ]
    rows = [
        {name: [dataclasses.asdict(turn) for turn in getattr(pair, name)] for name in ("prompt", "chosen", "rejected")}
        for pair in pairs
    ]
    trl = ORPOTrainer(
        model=tiny_model(),
        args=ORPOConfig(output_dir=str(tmp_path), max_length=2048, report_to="none", use_cpu=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    examples, _ = tokenize_pairs(pairs, tiny_tokenizer(), max_length=512)
    for example, row in zip(examples, trl.train_dataset, strict=True):
        for side, index in zip(("chosen", "rejected"), example.pairs[0], strict=True):
            completion = example.completions[index]
            assert example.prompt_ids + completion == row[f"{side}_input_ids"]
            assert [-100] * len(example.prompt_ids) + completion == row[f"{side}_labels"]


def test_pairs_of_one_record_become_one_example() -> None:
    pairs = [
        to_pair("a", "Case.", "Noonan", "Rett"),
        to_pair("a", "Case.", "Noonan", "Marfan"),
        to_pair("b", "Case.", "Noonan", "Rett"),
    ]
    examples, _ = tokenize_pairs(pairs, tiny_tokenizer(), max_length=64)
    assert [example.record_id for example in examples] == ["a", "b"]
    assert [example.pairs for example in examples] == [[(0, 1), (0, 2)], [(0, 1)]]
    alone, _ = tokenize_pairs(pairs[2:], tiny_tokenizer(), max_length=64)
    assert alone == examples[1:]


def test_a_record_with_one_long_completion_is_dropped_with_all_its_pairs_and_counted_once() -> None:
    tokenizer, long = tiny_tokenizer(), "cough " * 100
    pairs = [
        to_pair("a", "Case.", "Noonan", "Rett"),
        to_pair("a", "Case.", "Noonan", long),
        to_pair("b", "Case.", "Noonan", "Rett"),
    ]
    examples, counts = tokenize_pairs(pairs, tokenizer, max_length=64)
    assert [example.record_id for example in examples] == ["b"]
    assert (counts.dropped, counts.truncated) == ({"prompt_too_long": 1}, 0)
    conversation = [{"role": "user", "content": "Case."}, {"role": "assistant", "content": long}]
    assert counts.longest == (len(tokenizer.apply_chat_template(conversation)["input_ids"]) + 1, "a")


@pytest.mark.parametrize("max_length", range(200, 230, 3))
def test_a_note_keeps_every_whole_word_that_fits_and_nothing_else_changes(max_length: int) -> None:
    tokenizer, answers = tiny_tokenizer(), ["1. Rett", "1. Noonan syndrome 2. Kabuki", "1. Marfan"]
    pairs = [*with_note("a", NOTE, answers), *with_note("b", "Short.", answers)]
    (truncated, full), counts = tokenize_pairs(pairs, tokenizer, max_length, "truncate")
    assert (counts.truncated, counts.dropped) == (1, {})
    assert truncated.pairs == [(0, 1), (0, 2)]
    assert truncated.completions == full.completions
    prompt = tokenizer.decode(truncated.prompt_ids)
    before, after = tokenizer.decode(full.prompt_ids).split("Short.")
    assert prompt.startswith(before)
    assert prompt.endswith(after)
    kept = prompt[len(before) : -len(after)]
    following = NOTE.removeprefix(kept)
    assert following.startswith(" ")
    assert kept + following == NOTE
    longer = f"{kept} {following.split()[0]}"
    longest = max(answers, key=lambda answer: length(tokenizer, "", answer))
    assert length(tokenizer, kept, longest) <= max_length < length(tokenizer, longer, longest)


def test_a_record_that_fits_exactly_is_unchanged() -> None:
    tokenizer, pairs = tiny_tokenizer(), with_note("a", NOTE, ["1. Rett", "1. Noonan"])
    exact = max(length(tokenizer, NOTE, answer) for answer in ("1. Rett", "1. Noonan"))
    (example,), counts = tokenize_pairs(pairs, tokenizer, exact, "truncate")
    assert NOTE in tokenizer.decode(example.prompt_ids)
    assert counts.truncated == 0
    assert tokenize_pairs(pairs, tokenizer, exact - 1, "truncate")[1].truncated == 1


def test_a_record_that_would_keep_too_little_of_its_note_is_dropped() -> None:
    tokenizer, answers = tiny_tokenizer(), ["1. Rett", "1. Noonan"]
    pairs = with_note("a", NOTE, answers)
    words = NOTE.split(" ")
    tokens = [len(tokenizer(" ".join(words[:count]))["input_ids"]) for count in range(len(words))]
    enough = next(" ".join(words[:count]) for count, n in enumerate(tokens) if n >= MIN_NOTE_TOKENS)
    least = max(length(tokenizer, enough, answer) for answer in answers)
    assert len(tokenize_pairs(pairs, tokenizer, least, "truncate")[0]) == 1
    examples, counts = tokenize_pairs(pairs, tokenizer, least - 1, "truncate")
    assert (examples, counts.dropped, counts.truncated) == ([], {"note_too_short_to_truncate": 1}, 0)


def test_a_record_without_a_note_span_is_not_truncated() -> None:
    pairs = [dataclasses.replace(pair, note_span=None) for pair in with_note("a", NOTE, ["1. Rett", "1. Noonan"])]
    examples, counts = tokenize_pairs(pairs, tiny_tokenizer(), 200, "truncate")
    assert (examples, counts.dropped) == ([], {"note_too_short_to_truncate": 1})


def test_an_empty_completion_raises_an_error_with_the_id_of_its_record() -> None:
    with pytest.raises(UserError, match="'case-7': rejected is empty"):
        tokenize_pairs([to_pair("case-7", "Case.", "Noonan", " ")], tiny_tokenizer(), max_length=64)


def test_a_completion_that_repeats_the_prompt_raises_an_error() -> None:
    pair = to_pair("case-7", "Case.", "Noonan", "Rett")
    pair.chosen.insert(0, pair.prompt[0])
    with pytest.raises(UserError, match="'case-7': chosen repeats the prompt"):
        tokenize_pairs([pair], tiny_tokenizer(), max_length=64)


def test_pairs_of_a_record_that_are_not_consecutive_or_have_different_prompts_raise_an_error() -> None:
    a, b = to_pair("a", "Case.", "Noonan", "Rett"), to_pair("b", "Case.", "Noonan", "Rett")
    with pytest.raises(UserError, match="'a': its pairs are not consecutive"):
        tokenize_pairs([a, b, a], tiny_tokenizer(), max_length=64)
    with pytest.raises(UserError, match="'a': its pairs have different prompts"):
        tokenize_pairs([a, to_pair("a", "Another.", "Noonan", "Rett")], tiny_tokenizer(), max_length=64)


def test_a_pair_with_an_image_raises_an_error_for_a_text_student() -> None:
    pair = dataclasses.replace(to_pair("case-7", "Which?", "1. Rett", "1. Marfan"), image_uri="x.jpg")
    with pytest.raises(UserError, match="'case-7': its pairs have an image, but the student is a text student"):
        tokenize_pairs([pair], tiny_tokenizer(), 512)
