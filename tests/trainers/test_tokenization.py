"""Tokens are those of TRL, and of a record that is too long only the note is cut."""

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
from mint_ray.trainers.tokenization import LEAST_NOTE_TOKENS, tokenize_pairs
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
    """Pairs of a record, its first answer chosen over each other one."""
    head = "Read this. "
    pairs = [to_pair(record_id, head + note + request, answers[0], other) for other in answers[1:]]
    return [dataclasses.replace(pair, note_span=[len(head), len(head) + len(note)]) for pair in pairs]


def length(tokenizer: PreTrainedTokenizerFast, note: str, answer: str) -> int:
    """Tokens of the whole conversation as the template alone writes it, and the EOS that has to follow its line end."""
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


def test_a_record_with_one_long_answer_is_dropped_with_all_its_pairs_and_counted_once() -> None:
    tokenizer, long = tiny_tokenizer(), "cough " * 100
    pairs = [
        to_pair("a", "Case.", "Noonan", "Rett"),
        to_pair("a", "Case.", "Noonan", long),
        to_pair("b", "Case.", "Noonan", "Rett"),
    ]
    examples, tally = tokenize_pairs(pairs, tokenizer, max_length=64)
    assert [example.record_id for example in examples] == ["b"]
    assert (tally.dropped, tally.cut) == ({"prompt_too_long": 1}, 0)
    conversation = [{"role": "user", "content": "Case."}, {"role": "assistant", "content": long}]
    assert tally.longest == (len(tokenizer.apply_chat_template(conversation)["input_ids"]) + 1, "a")


@pytest.mark.parametrize("max_length", range(200, 230, 3))
def test_a_note_keeps_every_whole_word_that_fits_and_nothing_else_changes(max_length: int) -> None:
    tokenizer, answers = tiny_tokenizer(), ["1. Rett", "1. Noonan syndrome 2. Kabuki", "1. Marfan"]
    pairs = [*with_note("a", NOTE, answers), *with_note("b", "Short.", answers)]
    (cut, whole), tally = tokenize_pairs(pairs, tokenizer, max_length, "cut")
    assert (tally.cut, tally.dropped) == (1, {})
    assert cut.pairs == [(0, 1), (0, 2)]
    assert cut.completions == whole.completions
    prompt = tokenizer.decode(cut.prompt_ids)
    before, after = tokenizer.decode(whole.prompt_ids).split("Short.")
    assert prompt.startswith(before)
    assert prompt.endswith(after)
    kept = prompt[len(before) : -len(after)]
    following = NOTE.removeprefix(kept)
    assert following.startswith(" ")
    assert kept + following == NOTE
    longer = f"{kept} {following.split()[0]}"
    longest = max(answers, key=lambda answer: length(tokenizer, "", answer))
    assert length(tokenizer, kept, longest) <= max_length < length(tokenizer, longer, longest)


def test_a_record_that_fits_exactly_is_left_alone() -> None:
    tokenizer, pairs = tiny_tokenizer(), with_note("a", NOTE, ["1. Rett", "1. Noonan"])
    exact = max(length(tokenizer, NOTE, answer) for answer in ("1. Rett", "1. Noonan"))
    (example,), tally = tokenize_pairs(pairs, tokenizer, exact, "cut")
    assert NOTE in tokenizer.decode(example.prompt_ids)
    assert tally.cut == 0
    assert tokenize_pairs(pairs, tokenizer, exact - 1, "cut")[1].cut == 1


def test_a_record_of_whose_note_too_little_would_be_left_is_dropped() -> None:
    tokenizer, answers = tiny_tokenizer(), ["1. Rett", "1. Noonan"]
    pairs = with_note("a", NOTE, answers)
    words = NOTE.split(" ")
    tokens = [len(tokenizer(" ".join(words[:count]))["input_ids"]) for count in range(len(words))]
    enough = next(" ".join(words[:count]) for count, n in enumerate(tokens) if n >= LEAST_NOTE_TOKENS)
    least = max(length(tokenizer, enough, answer) for answer in answers)
    assert len(tokenize_pairs(pairs, tokenizer, least, "cut")[0]) == 1
    examples, tally = tokenize_pairs(pairs, tokenizer, least - 1, "cut")
    assert (examples, tally.dropped, tally.cut) == ([], {"note_too_short_to_cut": 1}, 0)


def test_a_record_whose_note_cannot_be_found_is_not_cut() -> None:
    pairs = [dataclasses.replace(pair, note_span=None) for pair in with_note("a", NOTE, ["1. Rett", "1. Noonan"])]
    examples, tally = tokenize_pairs(pairs, tiny_tokenizer(), 200, "cut")
    assert (examples, tally.dropped) == ([], {"note_too_short_to_cut": 1})


def test_an_empty_answer_is_refused_by_the_name_of_its_record() -> None:
    with pytest.raises(UserError, match="'case-7': rejected is empty"):
        tokenize_pairs([to_pair("case-7", "Case.", "Noonan", " ")], tiny_tokenizer(), max_length=64)


def test_an_answer_that_repeats_the_prompt_is_refused() -> None:
    pair = to_pair("case-7", "Case.", "Noonan", "Rett")
    pair.chosen.insert(0, pair.prompt[0])
    with pytest.raises(UserError, match="'case-7': chosen repeats the prompt"):
        tokenize_pairs([pair], tiny_tokenizer(), max_length=64)


def test_a_record_whose_pairs_are_scattered_or_differ_in_their_prompts_is_refused() -> None:
    a, b = to_pair("a", "Case.", "Noonan", "Rett"), to_pair("b", "Case.", "Noonan", "Rett")
    with pytest.raises(UserError, match="'a': its pairs do not follow each other"):
        tokenize_pairs([a, b, a], tiny_tokenizer(), max_length=64)
    with pytest.raises(UserError, match="'a': its pairs differ in their prompts"):
        tokenize_pairs([a, to_pair("a", "Another.", "Noonan", "Rett")], tiny_tokenizer(), max_length=64)


def test_a_pair_with_an_image_is_refused() -> None:
    pair = dataclasses.replace(to_pair("case-7", "Which?", "1. Rett", "1. Marfan"), image_uri="x.jpg")
    with pytest.raises(UserError, match="'case-7': its pairs carry an image, and the student reads text alone"):
        tokenize_pairs([pair], tiny_tokenizer(), 512)
