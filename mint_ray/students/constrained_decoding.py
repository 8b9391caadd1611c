"""The answers that a student may give, as tokens: worked out while one is written, for there are too many to list."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from mint_ray.config.loader import UserError

LISTS_KEPT = 64
"""Beginnings of answers whose continuations are remembered; with a thousand labels each takes about a megabyte."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """What may be answered: `length` of the labels in any order, each of them once, as the task writes them."""

    labels: tuple[str, ...]
    length: int
    write: Callable[[Sequence[str]], str]
    """The answer that names these labels in order; that of a longer list goes on from that of a shorter one."""

    def __post_init__(self) -> None:
        if not 1 <= self.length <= len(self.labels):
            raise ValueError(f"length must lie between 1 and the number of labels, got {self.length}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """An answer that begins with `named`, as tokens."""

    named: tuple[str, ...]
    ids: list[int]
    known: int
    """So many of `ids` say nothing of what is named next."""


class Vocabulary:
    """Looks up how an answer can go on. Every answer is tokenised whole, behind the words that open a student's turn.

    A name has other tokens behind a quotation mark than alone, and a tokenizer may write the end of a line and the
    beginning of the next as one; so no name is ever tokenised by itself.
    """

    def __init__(self, tokenizer: Any, answers: Answers, model_id: str, turn: str | None = None) -> None:
        """`turn` is a conversation up to where the student's turn opens; None asks the tokenizer's template for one.

        Raises UserError for a tokenizer that cannot say which characters a token stands for.
        """
        if not tokenizer.is_fast:
            raise UserError(f"model_id: {model_id}: its tokenizer does not say where tokens stand in the text")
        self.tokenizer, self.answers, self.model_id = tokenizer, answers, model_id
        self.end: int = tokenizer.eos_token_id
        turns = [{"role": "user", "content": "?"}]
        self.turn: str = turn or tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        self.turn_ids: list[int] = self._encode([""])[0][0]
        whole = self._encode([answers.write(answers.labels[:1])])[0][0]
        if whole[: len(self.turn_ids)] != self.turn_ids:
            # the prompt that a student is given ends where its turn opens, whatever a tokenizer would make of both
            self.turn, self.turn_ids = "", []
        self.following = functools.lru_cache(maxsize=LISTS_KEPT)(self._following)
        self.first_lines = self._following(())
        self.opening = shared_prefix([line.ids[: max(line.known - 1, 0)] for line in self.first_lines])
        """What every answer begins with."""

    @functools.cached_property
    def longest(self) -> int:
        """An answer takes no more tokens than these."""
        length = {line.named[0]: line.known for line in self.first_lines}
        longest = sorted(self.answers.labels, key=lambda label: -length[label])[: self.answers.length]
        [(ids, _)] = self._encode([self.answers.write(longest)])
        # other names in another order may cost a token more at each border; and the end
        return len(ids) - len(self.turn_ids) + 2 * len(longest) + 1

    @functools.cached_property
    def first_names(self) -> list[list[int]]:
        """Tokens of an answer up to its first name and the token behind, which says that the name is over; one for each
        label."""
        return [line.ids[: line.known + 1] for line in self.first_lines]

    def _following(self, named: tuple[str, ...]) -> list[Line]:
        """The answers that begin with `named`, one for each label that can come next."""
        complete = len(named) + 1 == self.answers.length
        lines = []
        encoded = self._encode(self._texts(named))
        for label, (ids, places) in zip(self._left(named), encoded, strict=True):
            now, own = (*named, label), ids[len(self.turn_ids) :]
            if complete:
                lines.append(Line(named=now, ids=[*own, self.end], known=len(own) + 1))
                continue
            stop = len(self.turn) + len(self.answers.write(now))
            known = sum(end <= stop for _, end in places[len(self.turn_ids) :])
            lines.append(Line(named=now, ids=own, known=known))
        return lines

    def _texts(self, named: tuple[str, ...]) -> list[str]:
        """An answer for each label that can follow `named`, and one more behind it: what follows can change a token."""
        left, more = self._left(named), len(named) + 1 < self.answers.length
        behind = [left[1], *[left[0]] * (len(left) - 1)] if more else [""] * len(left)
        return [
            self.answers.write([*named, label, *([other] if more else [])])
            for label, other in zip(left, behind, strict=True)
        ]

    def _left(self, named: tuple[str, ...]) -> list[str]:
        return [label for label in self.answers.labels if label not in named]

    def _encode(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Tokens of each text in the student's turn, those of the turn's opening included, and where they stand."""
        encoded = self.tokenizer(
            [self.turn + text for text in texts], add_special_tokens=False, return_offsets_mapping=True
        )
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


class Walk:
    """One answer as it is written, token by token; nothing but the answers of a vocabulary can be."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.ids = list(vocabulary.opening)
        self.lines = vocabulary.first_lines
        """Answers that go on from here."""

    @property
    def named(self) -> tuple[str, ...] | None:
        """The labels of the answer, once it has ended."""
        return self.lines[0].named if self.ids[-1:] == [self.vocabulary.end] else None

    def allowed(self) -> list[int]:
        """The tokens that may come next; none where the answer has ended."""
        if self.named is not None:
            return []
        at, pending, self.lines = len(self.ids), list(self.lines), []
        while pending:
            line = pending.pop()
            if at < line.known:
                self.lines.append(line)
            else:
                following = self.vocabulary.following(line.named)
                pending += [longer for longer in following if longer.ids[:at] == self.ids]
        return sorted({line.ids[at] for line in self.lines})

    def step(self, token: int) -> None:
        """Write one of the tokens that `allowed` has just returned."""
        self.lines = [line for line in self.lines if line.ids[len(self.ids)] == token]
        self.ids.append(token)

    def text(self) -> str:
        """The answer, once it has ended. Raises UserError if its tokens do not read as what they were made from."""
        if self.named is None:
            raise RuntimeError(
                f"an answer of more than {len(self.ids)} tokens, {self.vocabulary.longest} were expected"
            )
        ids, expected = self.ids[:-1], self.vocabulary.answers.write(self.named)
        text: str = self.vocabulary.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text.strip() != expected.strip():
            raise UserError(
                f"model_id: {self.vocabulary.model_id}: its tokenizer reads {text!r} where {expected!r} was written"
            )
        return text


def shared_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """The tokens that all sequences begin with."""
    low, high = min(sequences), max(sequences)  # what the first and last in order share, all share
    for index, (one, other) in enumerate(zip(low, high, strict=False)):
        if one != other:
            return low[:index]
    return low
