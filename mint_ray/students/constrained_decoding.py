"""The allowed answers as token sequences, for constrained decoding and label ranking.

There are too many answers to list, so the tokens that may come next are computed while an answer is generated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from mint_ray.config.loader import UserError
from mint_ray.layouts.prefix import longest_common_prefix

CACHE_SIZE = 64
"""Number of label lists whose continuations are cached; with a thousand labels each takes about a megabyte."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllowedAnswers:
    """Answers that name `length` different labels, in any order, in the task's format."""

    labels: tuple[str, ...]
    length: int
    to_text: Callable[[Sequence[str]], str]
    """Function that returns the answer naming these labels in this order. The answer with more labels has to begin as
    the one with fewer does."""

    def __post_init__(self) -> None:
        if not 1 <= self.length <= len(self.labels):
            raise ValueError(f"length must lie between 1 and the number of labels, got {self.length}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An answer that begins with `labels`, as tokens."""

    labels: tuple[str, ...]
    token_ids: list[int]
    num_determined: int
    """Number of leading tokens that do not depend on the labels that follow."""


class AnswerTokens:
    """The tokens with which an allowed answer can begin or continue.

    Every answer is tokenized as a whole, after the text that opens the assistant's turn: a name has other tokens after
    a quotation mark than alone, and a tokenizer may merge the end of one line with the start of the next.
    """

    def __init__(
        self, tokenizer: Any, answers: AllowedAnswers, model_id: str, generation_prompt: str | None = None
    ) -> None:
        """Tokenize the answers that consist of one label.

        Args:
            tokenizer: The student's tokenizer.
            answers: The allowed answers.
            model_id: Id of the student, for errors.
            generation_prompt: Any conversation as text, up to the opening of the assistant's turn; None to render one
                with the tokenizer's chat template.

        Raises:
            UserError: The tokenizer does not map tokens to characters.
        """
        if not tokenizer.is_fast:
            raise UserError(f"model_id: {model_id}: its tokenizer does not map tokens to characters")
        self.tokenizer, self.answers, self.model_id = tokenizer, answers, model_id
        self.eos_id: int = tokenizer.eos_token_id
        conversation = [{"role": "user", "content": "?"}]
        self.prompt: str = generation_prompt or tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        self.prompt_ids: list[int] = self._encode([""])[0][0]
        ids = self._encode([answers.to_text(answers.labels[:1])])[0][0]
        if ids[: len(self.prompt_ids)] != self.prompt_ids:
            # the tokenizer merges across the end of the prompt, but a student's prompt is tokenized separately
            self.prompt, self.prompt_ids = "", []
        self.continuations = functools.lru_cache(maxsize=CACHE_SIZE)(self._continuations)
        self.first_candidates = self._continuations(())
        self.common_prefix = longest_common_prefix(
            [candidate.token_ids[: max(candidate.num_determined - 1, 0)] for candidate in self.first_candidates]
        )
        """Tokens with which every answer begins."""

    @functools.cached_property
    def max_tokens(self) -> int:
        """Upper bound on the number of tokens of an answer."""
        num_tokens = {candidate.labels[0]: candidate.num_determined for candidate in self.first_candidates}
        longest = sorted(self.answers.labels, key=lambda label: -num_tokens[label])[: self.answers.length]
        [(ids, _)] = self._encode([self.answers.to_text(longest)])
        # other labels in another order may need one token more at each border, and there is EOS
        return len(ids) - len(self.prompt_ids) + 2 * len(longest) + 1

    @functools.cached_property
    def first_label_tokens(self) -> list[list[int]]:
        """Tokens of an answer up to its first label, and the next token, which ends the name; one entry per label."""
        return [candidate.token_ids[: candidate.num_determined + 1] for candidate in self.first_candidates]

    def _continuations(self, labels: tuple[str, ...]) -> list[Candidate]:
        """Return the answers that begin with `labels`, one for each label that can come next."""
        is_complete = len(labels) + 1 == self.answers.length
        candidates = []
        encoded = self._encode(self._texts(labels))
        for label, (all_ids, offsets) in zip(self._unused(labels), encoded, strict=True):
            extended, ids = (*labels, label), all_ids[len(self.prompt_ids) :]
            if is_complete:
                candidates.append(
                    Candidate(labels=extended, token_ids=[*ids, self.eos_id], num_determined=len(ids) + 1)
                )
                continue
            stop = len(self.prompt) + len(self.answers.to_text(extended))
            num_determined = sum(end <= stop for _, end in offsets[len(self.prompt_ids) :])
            candidates.append(Candidate(labels=extended, token_ids=ids, num_determined=num_determined))
        return candidates

    def _texts(self, labels: tuple[str, ...]) -> list[str]:
        """Return an answer for each label that can follow, and one more label: what follows can change a token."""
        unused, has_next = self._unused(labels), len(labels) + 1 < self.answers.length
        next_labels = [unused[1], *[unused[0]] * (len(unused) - 1)] if has_next else [""] * len(unused)
        return [
            self.answers.to_text([*labels, label, *([next_label] if has_next else [])])
            for label, next_label in zip(unused, next_labels, strict=True)
        ]

    def _unused(self, labels: tuple[str, ...]) -> list[str]:
        return [label for label in self.answers.labels if label not in labels]

    def _encode(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return tokens and character offsets of each text after the prompt, those of the prompt included."""
        encoded = self.tokenizer(
            [self.prompt + text for text in texts], add_special_tokens=False, return_offsets_mapping=True
        )
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


class DecodingState:
    """One answer during constrained decoding: the tokens so far, and those that may come next."""

    def __init__(self, answer_tokens: AnswerTokens) -> None:
        self.answer_tokens = answer_tokens
        self.token_ids = list(answer_tokens.common_prefix)
        self.candidates = answer_tokens.first_candidates
        """Answers that begin with the tokens so far."""

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels of the answer when it is complete; None before."""
        return self.candidates[0].labels if self.token_ids[-1:] == [self.answer_tokens.eos_id] else None

    def allowed_tokens(self) -> list[int]:
        """Return the tokens that may come next, sorted; an empty list when the answer is complete."""
        if self.labels is not None:
            return []
        position, pending, self.candidates = len(self.token_ids), list(self.candidates), []
        while pending:
            candidate = pending.pop()
            if position < candidate.num_determined:
                self.candidates.append(candidate)
            else:
                longer = self.answer_tokens.continuations(candidate.labels)
                pending += [other for other in longer if other.token_ids[:position] == self.token_ids]
        return sorted({candidate.token_ids[position] for candidate in self.candidates})

    def append(self, token: int) -> None:
        """Append one of the tokens that `allowed_tokens` has just returned."""
        position = len(self.token_ids)
        self.candidates = [candidate for candidate in self.candidates if candidate.token_ids[position] == token]
        self.token_ids.append(token)

    def text(self) -> str:
        """Return the complete answer.

        Raises:
            UserError: The tokenizer decodes the tokens to another text than it encoded.
            RuntimeError: The answer is not complete.
        """
        if self.labels is None:
            raise RuntimeError(
                f"an answer of more than {len(self.token_ids)} tokens, expected at most {self.answer_tokens.max_tokens}"
            )
        ids, expected = self.token_ids[:-1], self.answer_tokens.answers.to_text(self.labels)
        text: str = self.answer_tokens.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if text.strip() != expected.strip():
            raise UserError(
                f"model_id: {self.answer_tokens.model_id}: its tokenizer encoded {expected!r} and decoded {text!r}"
            )
        return text
