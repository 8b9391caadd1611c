"""Many prompts at once, against greedy decoding as the textbook has it: one prompt, no padding, no cache."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

from mint_ray.students import generation
from mint_ray.students.generation import RoomyLayer, begin_answers, decode_greedily
from tests.tiny import tiny_model

PAD = 2
NEW = 37
"""More than two stretches, and no multiple of one."""


def draw(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 300) for _ in range(length)]


PREFIX = draw(9, 0)
PROMPTS = {
    "a prefix that all share": [PREFIX + draw(length, seed) for seed, length in enumerate((3, 12, 1, 7), 1)],
    "none": [draw(length, seed) for seed, length in enumerate((3, 12, 1, 7), 1)],
    "one prompt": [[*PREFIX, 5, 6]],
    "one that all others begin with": [PREFIX, [*PREFIX, 7, 8], [*PREFIX, 9]],
    "twice the same": [PREFIX, PREFIX],
}


def set_up(model: Any, end_ids: list[int]) -> Any:
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end_ids, pad_token_id=PAD)
    return model.eval()


@torch.inference_mode()
def textbook(model: Any, prompt: list[int], end_ids: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in end_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@torch.inference_mode()
def decoded(model: Any, prompts: list[list[int]], end_ids: list[int]) -> list[list[int]]:
    return decode_greedily(model, prompts, pad_id=PAD, end_ids=end_ids, max_new_tokens=NEW)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_answers_are_those_of_the_textbook(family: str, prompts: list[list[int]]) -> None:
    model = set_up(tiny_model(family=family), [PAD])
    said = [textbook(model, prompt, []) for prompt in prompts]
    # end tokens that come at different places: at once, within a stretch, in a later one, never
    ends = sorted({said[0][0], said[-1][20], said[len(said) // 2][3]})
    for end_ids in ([PAD], ends):
        model = set_up(model, end_ids)
        expected = [textbook(model, prompt, end_ids) for prompt in prompts]
        assert decoded(model, prompts, end_ids) == expected
    assert len({len(answer) for answer in expected}) > 1 or len(expected) < 3


def test_what_prompts_begin_with_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = set_up(tiny_model(), [PAD]), []
    forward = model.forward

    def counted(input_ids: torch.Tensor, **arguments: Any) -> Any:
        ran.append(tuple(input_ids.shape))
        return forward(input_ids, **arguments)

    monkeypatch.setattr(model, "forward", counted)
    prompts = PROMPTS["a prefix that all share"]
    decode_greedily(model, prompts, pad_id=PAD, end_ids=[PAD], max_new_tokens=2)
    assert ran == [(1, 9), (4, 12), (4, 1)]


def test_rows_that_have_ended_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model = set_up(tiny_model(), [PAD])
    prompts = PROMPTS["none"]
    said = [textbook(model, prompt, []) for prompt in prompts]
    end = next(token for token in said[0] if all(token not in other for other in said[1:]))
    model, rows = set_up(model, [end]), []
    generate = model.generate

    def counted(input_ids: torch.Tensor, **arguments: Any) -> Any:
        rows.append(len(input_ids))
        return generate(input_ids=input_ids, **arguments)

    monkeypatch.setattr(model, "generate", counted)
    answers = decode_greedily(model, prompts, pad_id=PAD, end_ids=[end], max_new_tokens=NEW)
    assert answers == [said[0][: said[0].index(end)], *said[1:]]
    assert rows[0] == 4
    assert rows[-1] == 3


def test_padding_in_the_wrong_place_would_show() -> None:
    model = set_up(tiny_model(), [PAD])
    prompts = PROMPTS["a prefix that all share"]
    begun = begin_answers(model, prompts, PAD)
    assert begun["attention_mask"].sum(1).tolist() == [len(prompt) for prompt in prompts]
    begun["attention_mask"] = torch.ones_like(begun["attention_mask"])
    with torch.inference_mode():
        seen = model.generate(**begun, max_new_tokens=NEW)[:, begun["input_ids"].shape[1] :].tolist()
    assert seen != [textbook(model, prompt, []) for prompt in prompts]


def test_a_layer_with_room_holds_what_one_without_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "ROOM", 3)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = RoomyLayer(), DynamicLayer()
    rows = 4
    for step, tokens in enumerate((5, 1, 1, 1, 1, 4, 1, 1)):
        new = [torch.randn(rows, 2, tokens, 3, generator=generator) for _ in range(2)]
        for given, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
            torch.testing.assert_close(given, wanted, rtol=0, atol=0)
        if step in (2, 4):
            # as many rows as before, in another order; and fewer
            kept = torch.tensor([2, 0, 3, 1] if step == 2 else [1, 3])
            for layer in (ours, theirs):
                layer.batch_select_indices(kept)
            rows = len(kept)
    for layer in (ours, theirs):
        layer.crop(-2)
    new = [torch.randn(rows, 2, 1, 3, generator=generator) for _ in range(2)]
    for given, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
        torch.testing.assert_close(given, wanted, rtol=0, atol=0)
