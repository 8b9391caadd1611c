"""Read log-probabilities of scored tokens off a model without ever holding all of its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from mint_ray.config.loader import UserError
from mint_ray.layouts import Batch, Head, Logps, integers

CHUNK_BYTES = 128 * 2**20
"""Logits held at a time, in bytes: what the loss part costs in memory whatever the vocabulary and the tokens."""


def scored_cells(completions: list[int], targets: list[int], prompts: list[int], prompt_targets: list[int]) -> Batch:
    """Which cells of the flattened (rows, W) batch hold a needed logit, and which of them predicts which token.

    `completions` and `prompts` are the cells whose logits predict `targets` and `prompt_targets`, in scored order. A
    cell that predicts several tokens, as the end of a prefix does, is listed once.
    """
    cells_M, source = torch.unique(integers(completions + prompts), return_inverse=True)
    return {
        "cells_M": cells_M,
        "source_N": source[: len(completions)],
        "target_N": integers(targets),
        "prompt_source_N": source[len(completions) :],
        "prompt_target_N": integers(prompt_targets),
    }


def run_scored(model: nn.Module, inputs: dict[str, Any], batch: Batch, head: Head) -> Logps:
    """One forward pass of `model` on `inputs`, read at the cells of `scored_cells`.

    Raises UserError if `head` is "chunked" and the model's logits are not what its output embeddings return.
    """
    cells_M = batch["cells_M"]
    source_N = torch.cat([batch["source_N"], batch["prompt_source_N"]])
    target_N = torch.cat([batch["target_N"], batch["prompt_target_N"]])
    if head == "chunked":
        logps_N = _run_chunked(model, inputs, cells_M, source_N, target_N)
    elif head == "rows":
        needed_BW = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        needed_BW.view(-1)[cells_M] = True
        logits_MV = model(**inputs, logits_to_keep=needed_BW).logits
        logps_N = select_logps(logits_MV, source_N, target_N)
    else:
        logits_BWV = model(**inputs).logits
        logps_N = select_logps(logits_BWV.flatten(0, 1)[cells_M], source_N, target_N)
    scored = len(batch["source_N"])
    return Logps(
        token_logps_N=logps_N[:scored],
        counts_C=batch["counts_C"],
        prompt_token_logps_N=logps_N[scored:],
        prompt_counts_B=batch["prompt_counts_B"],
    )


def select_logps(logits_MV: Tensor, source_N: Tensor, target_N: Tensor) -> Tensor:
    """Log-probability of token `target_N` under row `source_N` of the logits, shape (N,), in float32 (or float64)."""
    logits_MV = logits_MV.to(_exact(logits_MV.dtype))
    return logits_MV[source_N, target_N] - torch.logsumexp(logits_MV, dim=-1)[source_N]


def chunked_logps(
    head: nn.Module, logits_of: Callable[[Tensor], Tensor], rows_MH: Tensor, source_N: Tensor, target_N: Tensor
) -> Tensor:
    """What `select_logps` makes of `logits_of(rows_MH)`, the forward of `head`, holding the logits of a few rows only.

    For a frozen linear head the gradient for the rows is worked out beside the forward pass, at the price of one
    product; any other head (trained, with LoRA, quantised) is run again in the backward pass.
    """
    # not a head that someone else has put a forward of their own on
    plain = getattr(logits_of, "__func__", None) is nn.Linear.forward
    if plain and not any(weight.requires_grad for weight in head.parameters()):
        frozen: Tensor = _FrozenHead.apply(  # type: ignore[no-untyped-call]
            rows_MH, head.weight, head.bias, source_N, target_N
        )
        return frozen

    def logps_of(rows_RH: Tensor, start: int) -> Tensor:
        inside_N, local_N = _locate(source_N, start, len(rows_RH))
        return torch.where(inside_N, select_logps(logits_of(rows_RH), local_N, target_N), 0.0)

    logps_N = torch.zeros(len(source_N), dtype=_exact(rows_MH.dtype), device=rows_MH.device)
    for start, stop in _chunks(len(rows_MH), int(cast(Any, head).out_features), logps_N.dtype):
        logps_N = logps_N + checkpoint(logps_of, rows_MH[start:stop], start, use_reentrant=False)
    return logps_N


class _FrozenHead(torch.autograd.Function):
    """`select_logps` behind a linear head that gets no gradient.

    The gradient of log p(target) for its row is W[target] - sum over v of p(v) W[v], so nothing of the vocabulary's
    size need be kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, source_N: Tensor, target_N: Tensor
    ) -> Tensor:
        device = rows_MH.device
        if torch.is_autocast_enabled(device.type):
            # once, and not for every chunk
            weight_VH = weight_VH.to(torch.get_autocast_dtype(device.type))
        logps_N = torch.zeros(len(source_N), dtype=_exact(rows_MH.dtype), device=device)
        expected_MH = torch.empty_like(rows_MH) if ctx.needs_input_grad[0] else None
        for start, stop in _chunks(len(rows_MH), len(weight_VH), logps_N.dtype):
            inside_N, local_N = _locate(source_N, start, stop - start)
            expected_RH = None if expected_MH is None else expected_MH[start:stop]
            chunk_N = _frozen_chunk(rows_MH[start:stop], weight_VH, bias_V, local_N, target_N, expected_RH)
            logps_N += torch.where(inside_N, chunk_N, 0.0)
        if expected_MH is not None:
            ctx.save_for_backward(weight_VH[target_N].to(rows_MH.dtype) - expected_MH[source_N], source_N)
            ctx.rows = len(rows_MH)
        return logps_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        slope_NH, source_N = ctx.saved_tensors
        gradient_NH = gradient_N[:, None].to(slope_NH.dtype) * slope_NH
        rows_MH = slope_NH.new_zeros(ctx.rows, slope_NH.shape[1]).index_add_(0, source_N, gradient_NH)
        return rows_MH, None, None, None, None


def _frozen_chunk(
    rows_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    source_N: Tensor,
    target_N: Tensor,
    expected_RH: Tensor | None,
) -> Tensor:
    """Log-probabilities as of `select_logps`; the sum over v of p(v) W[v] is written into `expected_RH`.

    Holds one block of logits, and lets it go on return.
    """
    exact = _exact(rows_RH.dtype)
    logits_RV = linear(rows_RH, weight_VH, bias_V).to(exact)
    logits_N = logits_RV[source_N, target_N]
    # log-sum-exp by hand and in place: torch's own takes a second block
    largest_R1 = logits_RV.amax(dim=-1, keepdim=True)
    weights_RV = logits_RV.sub_(largest_R1).exp_()
    total_R1 = weights_RV.sum(dim=-1, keepdim=True)
    if expected_RH is not None:
        expected_RH.copy_((weights_RV.to(weight_VH.dtype) @ weight_VH) / total_R1)
    return logits_N - (largest_R1 + total_R1.log()).squeeze(-1)[source_N]


def _run_chunked(
    model: nn.Module, inputs: dict[str, Any], cells_M: Tensor, source_N: Tensor, target_N: Tensor
) -> Tensor:
    """Run the model with a head that returns log-probabilities where its logits would be.

    The model is entered by its front door, and its head too: DDP, DeepSpeed and PEFT have hooks on both.
    """
    head = _output_embeddings(model)
    logits_of = head.forward
    returned: list[Tensor] = []

    def score(hidden_BWH: Tensor) -> Tensor:
        rows_MH = hidden_BWH.flatten(0, 1).index_select(0, cells_M)
        returned.append(chunked_logps(head, logits_of, rows_MH, source_N, target_N))
        return returned[-1]

    with _forward(head, score):
        logps_N: Tensor = model(**inputs).logits
    if len(returned) != 1:
        raise UserError(f"{type(model).__name__}: ran its output embeddings {len(returned)} times, expected once")
    # the usual case, the very same memory, is told without waiting for a GPU
    if logps_N.data_ptr() != returned[0].data_ptr() and not torch.equal(logps_N, returned[0]):
        raise UserError(f"{type(model).__name__}: changes its logits behind its output embeddings")
    return logps_N


def _output_embeddings(model: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(model, "module", None), nn.Module):  # DDP, DeepSpeed
        model = inner
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module) or not hasattr(head, "out_features"):
        raise UserError(f"{type(model).__name__}: its output embeddings are no linear layer, got {type(head).__name__}")
    return head


@contextmanager
def _forward(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block `module.forward` is `function`."""
    before = {name: value for name, value in vars(module).items() if name == "forward"}
    vars(module)["forward"] = function
    try:
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update(before)


def _locate(source_N: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """Which tokens a chunk's rows predict, and from which of its rows; the others point anywhere in it."""
    local_N = source_N - start
    return (local_N >= 0) & (local_N < rows), local_N.clamp(0, rows - 1)


def _chunks(rows: int, vocabulary: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    size = max(1, CHUNK_BYTES // (vocabulary * dtype.itemsize))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _exact(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
