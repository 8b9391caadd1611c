"""Batched greedy decoding, compared with plain greedy decoding: one prompt, no padding, no cache."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

from mint_ray.students import greedy_decoding
from mint_ray.students.greedy_decoding import PreallocatedLayer, decode_greedily, prefill
from tests.tiny import tiny_model

PAD = 2
NEW = 37
"""More than two rounds, and no multiple of one."""


def draw(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 300) for _ in range(length)]


PREFIX = draw(9, 0)
PROMPTS = {
    "common prefix": [PREFIX + draw(length, seed) for seed, length in enumerate((3, 12, 1, 7), 1)],
    "no common prefix": [draw(length, seed) for seed, length in enumerate((3, 12, 1, 7), 1)],
    "one prompt": [[*PREFIX, 5, 6]],
    "one prompt is a prefix of the others": [PREFIX, [*PREFIX, 7, 8], [*PREFIX, 9]],
    "identical prompts": [PREFIX, PREFIX],
}


def set_up(model: Any, eos_ids: list[int]) -> Any:
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos_ids, pad_token_id=PAD)
    return model.eval()


@torch.inference_mode()
def plain_decoding(model: Any, prompt: list[int], eos_ids: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in eos_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@torch.inference_mode()
def batched_decoding(model: Any, prompts: list[list[int]], eos_ids: list[int]) -> list[list[int]]:
    return decode_greedily(model, prompts, pad_id=PAD, eos_ids=eos_ids, max_new_tokens=NEW)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_batched_and_plain_decoding_agree(family: str, prompts: list[list[int]]) -> None:
    model = set_up(tiny_model(family=family), [PAD])
    completions = [plain_decoding(model, prompt, []) for prompt in prompts]
    # EOS tokens at different positions: the first, within a round, in a later round, never
    ends = sorted({completions[0][0], completions[-1][20], completions[len(completions) // 2][3]})
    for eos_ids in ([PAD], ends):
        model = set_up(model, eos_ids)
        expected = [plain_decoding(model, prompt, eos_ids) for prompt in prompts]
        assert batched_decoding(model, prompts, eos_ids) == expected
    assert len({len(answer) for answer in expected}) > 1 or len(expected) < 3


def test_a_common_prefix_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = set_up(tiny_model(), [PAD]), []
    forward = model.forward

    def counted(input_ids: torch.Tensor, **arguments: Any) -> Any:
        ran.append(tuple(input_ids.shape))
        return forward(input_ids, **arguments)

    monkeypatch.setattr(model, "forward", counted)
    prompts = PROMPTS["common prefix"]
    decode_greedily(model, prompts, pad_id=PAD, eos_ids=[PAD], max_new_tokens=2)
    assert ran == [(1, 9), (4, 12), (4, 1)]


def test_finished_sequences_are_removed_from_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = set_up(tiny_model(), [PAD])
    prompts = PROMPTS["no common prefix"]
    completions = [plain_decoding(model, prompt, []) for prompt in prompts]
    end = next(token for token in completions[0] if all(token not in other for other in completions[1:]))
    model, rows = set_up(model, [end]), []
    generate = model.generate

    def counted(input_ids: torch.Tensor, **arguments: Any) -> Any:
        rows.append(len(input_ids))
        return generate(input_ids=input_ids, **arguments)

    monkeypatch.setattr(model, "generate", counted)
    answers = decode_greedily(model, prompts, pad_id=PAD, eos_ids=[end], max_new_tokens=NEW)
    assert answers == [completions[0][: completions[0].index(end)], *completions[1:]]
    assert rows[0] == 4
    assert rows[-1] == 3


def test_a_wrong_attention_mask_changes_the_answers() -> None:
    model = set_up(tiny_model(), [PAD])
    prompts = PROMPTS["common prefix"]
    inputs = prefill(model, prompts, PAD)
    assert inputs["attention_mask"].sum(1).tolist() == [len(prompt) for prompt in prompts]
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with torch.inference_mode():
        seen = model.generate(**inputs, max_new_tokens=NEW)[:, inputs["input_ids"].shape[1] :].tolist()
    assert seen != [plain_decoding(model, prompt, []) for prompt in prompts]


def test_a_preallocated_layer_stores_the_same_as_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_decoding, "PREALLOCATED_TOKENS", 3)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = PreallocatedLayer(), DynamicLayer()
    rows = 4
    for step, tokens in enumerate((5, 1, 1, 1, 1, 4, 1, 1)):
        new = [torch.randn(rows, 2, tokens, 3, generator=generator) for _ in range(2)]
        for given, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
            torch.testing.assert_close(given, wanted, rtol=0, atol=0)
        if step in (2, 4):
            # the same number of rows in another order, then fewer
            kept = torch.tensor([2, 0, 3, 1] if step == 2 else [1, 3])
            for layer in (ours, theirs):
                layer.batch_select_indices(kept)
            rows = len(kept)
    for layer in (ours, theirs):
        layer.crop(-2)
    new = [torch.randn(rows, 2, 1, 3, generator=generator) for _ in range(2)]
    for given, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
        torch.testing.assert_close(given, wanted, rtol=0, atol=0)
