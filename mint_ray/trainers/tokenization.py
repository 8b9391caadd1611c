"""Turn preference pairs into token ids, one example per record, and cut or drop what is too long."""

from __future__ import annotations

import dataclasses
import logging
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from mint_ray.config.loader import UserError
from mint_ray.images import ImageError
from mint_ray.layouts import Example
from mint_ray.models.vision_processor import Sight, View
from mint_ray.records import Message, PreferencePair

logger = logging.getLogger(__name__)

LEAST_NOTE_TOKENS = 32
"""A note of which less would be left says too little of its case; its record is dropped instead."""

Text = TypeVar("Text", str, list[int])
Tokens = tuple[list[int], list[int], list[int]]
"""Prompt, chosen and rejected of one pair."""


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What became of the records besides examples."""

    cut: int = 0
    """Records whose note was cut."""
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    """Records left out, by reason: `prompt_too_long` or, where notes may be cut, `note_too_short_to_cut`; `no_image`,
    or why an image cannot be looked at, such as `image_missing` (`mint_ray.images`)."""
    longest: tuple[int, str] = (0, "")
    """Tokens of the longest record as it came (prompt plus longest completion), and its id."""


def tokenize_pairs(
    rows: Iterable[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlong: Literal["drop", "cut"] = "drop",
    sight: Sight | None = None,
) -> tuple[list[Example], Tally]:
    """Pairs as examples, one per record in order of appearance.

    Text becomes tokens as in TRL's ORPOTrainer: the prompt with the generation prompt of the chat template, the
    completion as what the template adds for it, a BOS in front and an EOS behind where there is none. Where the
    tokenizer merges across the boundary in one completion only, both are scored from the last token they share, and
    a record whose pairs differ in that has an example for each boundary.

    A record is too long if its prompt and the longest completion of any of its pairs take more than `max_length`
    tokens. It is then dropped with all its pairs, or its note is cut behind the last word that lets it fit; prompts of
    one record stay equal, and instructions and answers whole.

    With `sight`, whose tokenizer is then used, every record has an image, and its prompt as many tokens as the image
    takes. It is read here and let go again; a record whose image cannot be is dropped.

    Raises UserError naming the record for an image that nobody sees, an empty answer, one that repeats the prompt or
    holds the token of an image, or a record whose pairs do not follow each other or differ in their prompts.
    """
    examples: list[Example] = []
    tally = Tally()
    for record_id, group in _by_record(rows, sight):
        try:
            writer = _Writer(tokenizer, sight, group[0].image_uri)
            tokens = writer.tokenize(group)
        except ImageError as error:
            logger.warning("record %r is left out: %s", record_id, error)
            tally.dropped[error.reason] += 1
            continue
        if sight and any(sight.token_id in completion for _, *sides in tokens for completion in sides):
            raise UserError(f"record {record_id!r}: an answer holds {sight.word!r}, the token of an image")
        tally.longest = max(tally.longest, (_length(tokens), record_id))
        if _length(tokens) <= max_length:
            examples += _to_examples(group[0], tokens)
            continue
        if overlong == "drop":
            tally.dropped["prompt_too_long"] += 1
            continue
        longest = max(range(len(group)), key=lambda index: _length(tokens[index : index + 1]))
        cut = _cut(group, longest, writer, max_length)
        if not cut:
            tally.dropped["note_too_short_to_cut"] += 1
            continue
        examples += _to_examples(group[0], cut)
        tally.cut += 1
    return examples, tally


def _by_record(rows: Iterable[PreferencePair], sight: Sight | None) -> Iterator[tuple[str, list[PreferencePair]]]:
    seen: set[str] = set()
    for record_id, group in groupby(rows, key=lambda row: row.record_id):
        if record_id in seen:
            raise UserError(f"record {record_id!r}: its pairs do not follow each other")
        seen.add(record_id)
        pairs = list(group)
        for pair in pairs:
            if pair.prompt != pairs[0].prompt or pair.note_span != pairs[0].note_span:
                raise UserError(f"record {record_id!r}: its pairs differ in their prompts")
            if pair.image_uri != pairs[0].image_uri:
                raise UserError(f"record {record_id!r}: its pairs differ in their images")
            if pair.image_uri is not None and sight is None:
                raise UserError(f"record {record_id!r}: its pairs carry an image, and the student reads text alone")
            for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                if not any(message.content.strip() for message in answer):
                    raise UserError(f"record {record_id!r}: {name} is empty")
                if answer[: len(pair.prompt)] == pair.prompt:
                    raise UserError(f"record {record_id!r}: {name} repeats the prompt")
        yield record_id, pairs


class _Writer:
    """Writes pairs of one record as tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sight: Sight | None, image_uri: str | None) -> None:
        """Raises ImageError if the record's image cannot be looked at."""
        self.tokenizer, self.sight = sight.tokenizer if sight else tokenizer, sight
        self.view: View | None = None
        if sight is not None:
            if image_uri is None:
                raise ImageError("no_image", "it has no image")
            self.view = sight.look(image_uri)

    def tokenize(self, pairs: list[PreferencePair]) -> list[Tokens]:
        rendered = []
        for pair in pairs:
            prompt = self._render(pair.prompt, add_generation_prompt=True)
            chosen = self._render(pair.prompt + pair.chosen)
            rejected = self._render(pair.prompt + pair.rejected)
            # some templates open the answer differently when they wait for it; only what all three share is prompt
            rendered.append((_shared(prompt, chosen, rejected), chosen, rejected))
        # pairs of one record share most of their texts
        texts = list(dict.fromkeys(text for pair_texts in rendered for text in pair_texts))
        ids = dict(zip(texts, self.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
        return [
            _divide(ids[prompt], ids[chosen], ids[rejected], self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            for prompt, chosen, rejected in rendered
        ]

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: list[Message], **options: bool) -> str:
        if self.sight is not None:
            return self.sight.render(messages, self.view, **options)
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        return str(self.tokenizer.apply_chat_template(conversation, tokenize=False, **options))


def _divide(prompt: list[int], chosen: list[int], rejected: list[int], bos: int | None, eos: int | None) -> Tokens:
    """Prompt and completions of two whole conversations, with BOS and EOS where they are missing."""
    length = len(_shared(prompt, chosen, rejected))
    head = [] if bos is None or prompt[:1] == [bos] else [bos]
    completions = [ids[length:] for ids in (chosen, rejected)]
    for completion in completions:
        if eos is not None and completion[-1:] != [eos]:
            completion.append(eos)
    return head + prompt[:length], completions[0], completions[1]


def _length(tokens: list[Tokens]) -> int:
    return max(len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in tokens)


def _cut(pairs: list[PreferencePair], longest: int, writer: _Writer, max_length: int) -> list[Tokens]:
    """The record with as many words of its note as fit, of which the pair at `longest` needs most; nothing if too few
    are left."""
    start, stop = pairs[0].note_span or (0, 0)
    note = pairs[0].prompt[-1].content[start:stop]
    ends = [gap.start() for gap in re.finditer(r"\s+", note)]

    def measure(end: int) -> int:
        return _length(writer.tokenize([_until(pairs[longest], end)]))

    fitting = bisect_right(ends, max_length, key=measure)
    for end in reversed(ends[:fitting]):
        if writer.count(note[:end]) < LEAST_NOTE_TOKENS:
            break
        # the search measured one pair; another may have become the longest by a token at the boundary
        tokens = writer.tokenize([_until(pair, end) for pair in pairs])
        if _length(tokens) <= max_length:
            return tokens
    return []


def _until(pair: PreferencePair, end: int) -> PreferencePair:
    """The pair with the first `end` characters of its note."""
    start, stop = pair.note_span or (0, 0)
    *before, last = pair.prompt
    shorter = dataclasses.replace(last, content=last.content[: start + end] + last.content[stop:])
    return dataclasses.replace(pair, prompt=[*before, shorter])


def _to_examples(pair: PreferencePair, tokens: list[Tokens]) -> list[Example]:
    examples: dict[tuple[int, ...], Example] = {}
    for prompt_ids, chosen_ids, rejected_ids in tokens:
        example = examples.setdefault(
            tuple(prompt_ids),
            Example(
                record_id=pair.record_id, prompt_ids=prompt_ids, completions=[], pairs=[], image_uri=pair.image_uri
            ),
        )
        for completion in (chosen_ids, rejected_ids):
            if completion not in example.completions:
                example.completions.append(completion)
        example.pairs.append((example.completions.index(chosen_ids), example.completions.index(rejected_ids)))
    return list(examples.values())


def _shared(*sequences: Text) -> Text:
    low, high = min(sequences), max(sequences)  # what the first and last in order share, all share
    for index, (one, other) in enumerate(zip(low, high, strict=False)):
        if one != other:
            return low[:index]
    return low
