"""The conformance suite of layouts: log-probabilities and gradients are those of every completion in its own pass."""

from __future__ import annotations

import torch
from torch import Tensor

from mint_ray.layouts import Example, Layout
from tests.layouts.reference import gradients, largest_error
from tests.tiny import tiny_model

EXAMPLES = [
    Example(
        record_id="a", prompt_ids=[5, 6, 7], completions=[[8, 9, 10], [8, 9], [8, 11, 12, 13]], pairs=[(0, 1), (2, 1)],
        reference_logps=[-1.0, -2.0, -3.0],
    ),
    Example(record_id="b", prompt_ids=[5], completions=[[20, 21]], pairs=[]),
    Example(
        record_id="c", prompt_ids=[30] * 9, completions=[[31], [32, 33, 34]], pairs=[(1, 0)], reference_logps=[-4.0, -5.0]
    ),
]  # fmt: skip
"""Examples of different lengths, completions with a common start, and one example without pairs."""


def check_layout(layout: Layout) -> None:
    """Assert that a layout follows the `Layout` protocol."""
    assert layout.name
    assert layout.logits in ("chunked", "selected", "all")
    _check_batch(layout)
    _check_results(layout)


def _check_batch(layout: Layout) -> None:
    batch = layout.collate(EXAMPLES, score_prompt=True)
    assert next(iter(batch)) == "input_ids"
    assert all(isinstance(tensor, Tensor) for tensor in batch.values())
    assert batch["chosen_P"].tolist() == [0, 2, 5]
    assert batch["rejected_P"].tolist() == [1, 1, 4]
    assert batch["record_P"].tolist() == [0, 0, 2]
    assert batch["counts_C"].tolist() == [3, 2, 4, 2, 1, 3]
    assert batch["prompt_counts_B"].tolist() == [2, 0, 8]
    assert batch["nll_tokens"] == (3 + 2) + (4 + 2) + (3 + 8)
    assert batch["pairs"] == 3
    assert batch["reference_C"].tolist() == [-1.0, -2.0, -3.0, 0.0, -4.0, -5.0]
    # at least every prompt and every token of its own of a completion, at most every completion with its prompt
    assert (
        3 + 6 + 1 + 2 + 9 + 4
        <= batch["num_tokens"]
        <= sum(len(example.prompt_ids) + len(completion) for example in EXAMPLES for completion in example.completions)
    )
    without = layout.collate(EXAMPLES, score_prompt=False)
    assert without["prompt_counts_B"].tolist() == [0, 0, 0]
    assert without["nll_tokens"] == 3 + 4 + 3


def _check_results(layout: Layout) -> None:
    expected_model, model = tiny_model(), tiny_model()
    expected, expected_prompt = _separate_passes(expected_model)
    _loss(expected, expected_prompt).backward()  # type: ignore[no-untyped-call]
    logps = layout.compute_logps(model, layout.collate(EXAMPLES, score_prompt=True))
    _loss(logps.token_logps, logps.prompt_token_logps).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(logps.token_logps, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logps.prompt_token_logps, expected_prompt, rtol=1e-5, atol=1e-5)
    assert largest_error(gradients(model), gradients(expected_model)) < 1e-5
    assert logps.counts.tolist() == [3, 2, 4, 2, 1, 3]
    sums = [float(tokens.sum()) for tokens in expected.detach().split(logps.counts.tolist())]
    torch.testing.assert_close(logps.sums.detach(), torch.tensor(sums))


def _separate_passes(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of all completions' tokens, and of all prompts' tokens."""
    completions, prompts = [], []
    for example in EXAMPLES:
        for index, completion in enumerate(example.completions):
            ids = torch.tensor([example.prompt_ids + completion])
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            completions.append(logps[len(example.prompt_ids) - 1 :])
            if index == 0:
                prompts.append(logps[: len(example.prompt_ids) - 1])
    return torch.cat(completions), torch.cat(prompts)


def _loss(token_logps: Tensor, prompt_logps: Tensor) -> Tensor:
    """Return a sum with different weights, so that no error cancels another."""
    return (token_logps * torch.linspace(1, 2, len(token_logps))).sum() + 0.1 * prompt_logps.sum()
