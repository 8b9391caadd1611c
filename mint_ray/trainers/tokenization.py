"""Tokenization of preference pairs: one example per record; records that are too long are dropped or truncated."""

from __future__ import annotations

import dataclasses
import logging
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Literal

from transformers import PreTrainedTokenizerBase

from mint_ray.config.loader import UserError
from mint_ray.images import ImageError
from mint_ray.layouts import Example
from mint_ray.layouts.prefix import longest_common_prefix
from mint_ray.models.vision_processor import ProcessedImage, VisionProcessor
from mint_ray.records import Message, PreferencePair

logger = logging.getLogger(__name__)

MIN_NOTE_TOKENS = 32
"""Minimum number of tokens of a truncated note; a record that would keep fewer is dropped."""

Tokens = tuple[list[int], list[int], list[int]]
"""Prompt, chosen and rejected completion of one pair."""


@dataclasses.dataclass(kw_only=True)
class TokenizationCounts:
    """Counts of truncated and dropped records."""

    truncated: int = 0
    """Number of records with a truncated note."""
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    """Number of dropped records by reason: `prompt_too_long` or, if notes may be truncated,
    `note_too_short_to_truncate`; `no_image`, or a reason of `mint_ray.images` such as `image_missing`."""
    longest: tuple[int, str] = (0, "")
    """Number of tokens of the longest record before truncation (prompt plus longest completion), and its id."""


def tokenize_pairs(
    rows: Iterable[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlong: Literal["drop", "truncate"] = "drop",
    vision_processor: VisionProcessor | None = None,
) -> tuple[list[Example], TokenizationCounts]:
    """Return the pairs as examples, one per record in order of appearance, and counts of the other records.

    Text is tokenized as in TRL's ORPOTrainer: the prompt with the generation prompt of the chat template, the
    completion as the text that the template adds for it, a BOS in front and an EOS at the end if missing. If the
    tokenizer merges tokens across the boundary in one completion only, both completions are scored from the last shared
    token; a record whose pairs differ in this has one example per boundary.

    A record is too long if its prompt and the longest completion of any of its pairs have more than `max_length`
    tokens. It is dropped with all its pairs, or its note is truncated after the last word that fits; all pairs of the
    record keep the same prompt, and instructions and completions are never truncated.

    With `vision_processor`, whose tokenizer is then used, every record has an image, and its prompt the image's tokens.
    The image is not kept in memory; a record whose image cannot be read is dropped.

    Raises UserError naming the record for: an image without a vision processor; a completion that is empty, repeats the
    prompt or contains an image token; pairs of a record that are not consecutive or have different prompts or images.
    """
    examples: list[Example] = []
    counts = TokenizationCounts()
    for record_id, group in _by_record(rows, vision_processor):
        try:
            record_tokenizer = _RecordTokenizer(tokenizer, vision_processor, group[0].image_uri)
            tokens = record_tokenizer.tokenize(group)
        except ImageError as error:
            logger.warning("record %r is dropped: %s", record_id, error)
            counts.dropped[error.reason] += 1
            continue
        if vision_processor:
            _check_image_tokens(record_id, tokens, vision_processor)
        counts.longest = max(counts.longest, (_length(tokens), record_id))
        if _length(tokens) > max_length:
            if overlong == "drop":
                counts.dropped["prompt_too_long"] += 1
                continue
            tokens = _truncate(group, tokens, record_tokenizer, max_length)
            if not tokens:
                counts.dropped["note_too_short_to_truncate"] += 1
                continue
            counts.truncated += 1
        examples += _to_examples(group[0], tokens)
    return examples, counts


def _by_record(
    rows: Iterable[PreferencePair], vision_processor: VisionProcessor | None
) -> Iterator[tuple[str, list[PreferencePair]]]:
    seen: set[str] = set()
    for record_id, group in groupby(rows, key=lambda row: row.record_id):
        if record_id in seen:
            raise UserError(f"record {record_id!r}: its pairs are not consecutive")
        seen.add(record_id)
        pairs = list(group)
        for pair in pairs:
            if pair.prompt != pairs[0].prompt or pair.note_span != pairs[0].note_span:
                raise UserError(f"record {record_id!r}: its pairs have different prompts")
            if pair.image_uri != pairs[0].image_uri:
                raise UserError(f"record {record_id!r}: its pairs have different images")
            if pair.image_uri is not None and vision_processor is None:
                raise UserError(f"record {record_id!r}: its pairs have an image, but the student is a text student")
            for name, completion in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                if not any(message.content.strip() for message in completion):
                    raise UserError(f"record {record_id!r}: {name} is empty")
                if completion[: len(pair.prompt)] == pair.prompt:
                    raise UserError(f"record {record_id!r}: {name} repeats the prompt")
        yield record_id, pairs


def _check_image_tokens(record_id: str, tokens: list[Tokens], vision_processor: VisionProcessor) -> None:
    token_id = vision_processor.image_token_id
    if any(token_id in completion for _, *completions in tokens for completion in completions):
        raise UserError(f"record {record_id!r}: a completion contains the image token {vision_processor.image_token!r}")


class _RecordTokenizer:
    """A tokenizer for the pairs of one record, with its image."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vision_processor: VisionProcessor | None, image_uri: str | None
    ) -> None:
        """Read the image. Raises ImageError if it is missing or cannot be read."""
        self.tokenizer = vision_processor.tokenizer if vision_processor else tokenizer
        self.vision_processor = vision_processor
        self.image: ProcessedImage | None = None
        if vision_processor is not None:
            if image_uri is None:
                raise ImageError("no_image", "it has no image")
            self.image = vision_processor.read(image_uri)

    def tokenize(self, pairs: list[PreferencePair]) -> list[Tokens]:
        """Return the tokens of each pair."""
        rendered = []
        for pair in pairs:
            prompt = self._render(pair.prompt, add_generation_prompt=True)
            chosen = self._render(pair.prompt + pair.chosen)
            rejected = self._render(pair.prompt + pair.rejected)
            # some templates start the answer differently in a generation prompt; the prompt is what all three share
            rendered.append((longest_common_prefix([prompt, chosen, rejected]), chosen, rejected))
        # pairs of one record have most of their texts in common
        texts = list(dict.fromkeys(text for pair_texts in rendered for text in pair_texts))
        ids = dict(zip(texts, self.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return [
            _split_tokens(ids[prompt], ids[chosen], ids[rejected], bos, eos) for prompt, chosen, rejected in rendered
        ]

    def count(self, text: str) -> int:
        """Return the number of tokens of `text`."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: list[Message], **options: bool) -> str:
        if self.vision_processor is not None:
            return self.vision_processor.render(messages, self.image, **options)
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        return str(self.tokenizer.apply_chat_template(conversation, tokenize=False, **options))


def _split_tokens(
    prompt: list[int], chosen: list[int], rejected: list[int], bos: int | None, eos: int | None
) -> Tokens:
    """Return the prompt and the completions of two conversations, with BOS and EOS if missing."""
    length = len(longest_common_prefix([prompt, chosen, rejected]))
    head = [] if bos is None or prompt[:1] == [bos] else [bos]
    completions = [ids[length:] for ids in (chosen, rejected)]
    for completion in completions:
        if eos is not None and completion[-1:] != [eos]:
            completion.append(eos)
    return head + prompt[:length], completions[0], completions[1]


def _length(tokens: list[Tokens]) -> int:
    return max(len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in tokens)


def _truncate(
    pairs: list[PreferencePair], tokens: list[Tokens], tokenizer: _RecordTokenizer, max_length: int
) -> list[Tokens]:
    """Return the tokens with as many words of the note as fit; an empty list if too few would remain."""
    longest = max(range(len(pairs)), key=lambda index: _length(tokens[index : index + 1]))
    start, stop = pairs[0].note_span or (0, 0)
    note = pairs[0].prompt[-1].content[start:stop]
    ends = [gap.start() for gap in re.finditer(r"\s+", note)]

    def measure(end: int) -> int:
        return _length(tokenizer.tokenize([_truncate_note(pairs[longest], end)]))

    fitting = bisect_right(ends, max_length, key=measure)
    for end in reversed(ends[:fitting]):
        if tokenizer.count(note[:end]) < MIN_NOTE_TOKENS:
            break
        # the search measured one pair; another may now be longer by a token at the boundary
        truncated = tokenizer.tokenize([_truncate_note(pair, end) for pair in pairs])
        if _length(truncated) <= max_length:
            return truncated
    return []


def _truncate_note(pair: PreferencePair, end: int) -> PreferencePair:
    """Return the pair with the first `end` characters of its note."""
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
