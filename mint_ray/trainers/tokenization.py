"""Turn preference pairs into token ids, one example per record and prompt."""

from __future__ import annotations

from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from mint_ray.layouts import Example
from mint_ray.loading import UserError
from mint_ray.records import Message, PreferencePair

Text = TypeVar("Text", str, list[int])


def tokenize_pairs(
    rows: list[PreferencePair], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Example], dict[str, int]]:
    """Pairs as examples, one per record and prompt in order of appearance, and the dropped pairs by reason.

    Text becomes tokens as in TRL's ORPOTrainer: the prompt with the generation prompt of the chat template, the
    completion as what the template adds for it, a BOS in front and an EOS behind where there is none. Where the
    tokenizer merges across the boundary in one completion only, both are scored from the last token they share.
    Raises UserError naming the record for an empty answer, or one that repeats the prompt.
    """
    examples: dict[tuple[str, tuple[int, ...]], Example] = {}
    dropped: dict[str, int] = {}
    for row in rows:
        prompt_ids, chosen_ids, rejected_ids = _tokenize(row, tokenizer)
        if len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)) > max_length:
            dropped["prompt_too_long"] = dropped.get("prompt_too_long", 0) + 1
            continue
        example = examples.setdefault(
            (row.record_id, tuple(prompt_ids)),
            Example(record_id=row.record_id, prompt_ids=prompt_ids, completions=[], pairs=[]),
        )
        for completion in (chosen_ids, rejected_ids):
            if completion not in example.completions:
                example.completions.append(completion)
        example.pairs.append((example.completions.index(chosen_ids), example.completions.index(rejected_ids)))
    return list(examples.values()), dropped


def _tokenize(row: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """Token ids of prompt, chosen and rejected."""
    for name, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
        if not any(message.content.strip() for message in answer):
            raise UserError(f"record {row.record_id!r}: {name} is empty")
        if answer[: len(row.prompt)] == row.prompt:
            raise UserError(f"record {row.record_id!r}: {name} repeats the prompt")
    prompt = _render(row.prompt, tokenizer, add_generation_prompt=True)
    chosen = _render(row.prompt + row.chosen, tokenizer)
    rejected = _render(row.prompt + row.rejected, tokenizer)
    # some templates open the answer differently when they wait for it; only what all three share is prompt
    prompt = _shared(prompt, chosen, rejected)
    prompt_ids, chosen_ids, rejected_ids = (
        list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, chosen, rejected)
    )
    length = len(_shared(prompt_ids, chosen_ids, rejected_ids))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    head = [] if bos is None or prompt_ids[:1] == [bos] else [bos]
    completions = [ids[length:] for ids in (chosen_ids, rejected_ids)]
    for completion in completions:
        if eos is not None and completion[-1:] != [eos]:
            completion.append(eos)
    return head + prompt_ids[:length], completions[0], completions[1]


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, **options))


def _shared(first: Text, *others: Text) -> Text:
    for index, items in enumerate(zip(first, *others, strict=False)):
        if len(set(items)) > 1:
            return first[:index]
    return first[: min(len(first), *(len(other) for other in others))]
