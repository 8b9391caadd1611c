"""Log-probabilities of scored tokens from the language-modelling head, without materializing all logits."""

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
from mint_ray.layouts import LOGITS_CHUNK_BYTES, Batch, LogitsMode, Logps
from mint_ray.layouts.batches import int_tensor


def logit_index(
    positions: list[int], targets: list[int], prompt_positions: list[int], prompt_targets: list[int]
) -> Batch:
    """Return the positions whose logits are needed, and the position and token of each scored token.

    `positions` and `prompt_positions` index the flattened (rows, W) batch; their logits predict `targets` and
    `prompt_targets`, in the order in which tokens are scored. A position that predicts several tokens, such as the end
    of a shared prefix, is listed once in `positions_M`; `source_N` indexes `positions_M`.
    """
    positions_M, source = torch.unique(int_tensor(positions + prompt_positions), return_inverse=True)
    return {
        "positions_M": positions_M,
        "source_N": source[: len(positions)],
        "target_N": int_tensor(targets),
        "prompt_source_N": source[len(positions) :],
        "prompt_target_N": int_tensor(prompt_targets),
    }


def scored_logps(model: nn.Module, inputs: dict[str, Any], batch: Batch, logits: LogitsMode) -> Logps:
    """Run `model` once on `inputs` and return the log-probabilities at the positions of `logit_index`.

    Raises UserError if `logits` is "chunked" and the model's logits are not the output of its output embeddings.
    """
    positions_M = batch["positions_M"]
    source_N = torch.cat([batch["source_N"], batch["prompt_source_N"]])
    target_N = torch.cat([batch["target_N"], batch["prompt_target_N"]])
    if logits == "chunked":
        logps_N = _run_chunked(model, inputs, positions_M, source_N, target_N)
    elif logits == "selected":
        selected_BW = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        selected_BW.view(-1)[positions_M] = True
        logits_MV = model(**inputs, logits_to_keep=selected_BW).logits
        logps_N = select_logps(logits_MV, source_N, target_N)
    else:
        logits_BWV = model(**inputs).logits
        logps_N = select_logps(logits_BWV.flatten(0, 1)[positions_M], source_N, target_N)
    num_scored = len(batch["source_N"])
    return Logps(
        token_logps=logps_N[:num_scored],
        counts=batch["counts_C"],
        prompt_token_logps=logps_N[num_scored:],
        prompt_counts=batch["prompt_counts_B"],
    )


def select_logps(logits_MV: Tensor, source_N: Tensor, target_N: Tensor) -> Tensor:
    """Return the log-probability of token `target_N` under row `source_N` of the logits.

    The result has shape (N,) and is in float32, or in float64 for float64 logits.
    """
    logits_MV = logits_MV.to(_full_precision(logits_MV.dtype))
    return logits_MV[source_N, target_N] - torch.logsumexp(logits_MV, dim=-1)[source_N]


def chunked_logps(
    head: nn.Module, logits_of: Callable[[Tensor], Tensor], rows_MH: Tensor, source_N: Tensor, target_N: Tensor
) -> Tensor:
    """Return `select_logps(logits_of(rows_MH), source_N, target_N)` with the logits of only a few rows in memory.

    For a frozen linear head the gradient of the rows is computed in the forward pass, at the cost of one matrix
    product. Any other head (trained, with LoRA, quantized) is recomputed in the backward pass.
    """
    # false for a head whose forward was replaced
    is_plain = getattr(logits_of, "__func__", None) is nn.Linear.forward
    if is_plain and not any(weight.requires_grad for weight in head.parameters()):
        frozen: Tensor = _FrozenHead.apply(  # type: ignore[no-untyped-call]
            rows_MH, head.weight, head.bias, source_N, target_N
        )
        return frozen

    def logps_of(rows_RH: Tensor, start: int) -> Tensor:
        inside_N, local_N = _locate(source_N, start, len(rows_RH))
        return torch.where(inside_N, select_logps(logits_of(rows_RH), local_N, target_N), 0.0)

    logps_N = torch.zeros(len(source_N), dtype=_full_precision(rows_MH.dtype), device=rows_MH.device)
    for start, stop in _chunks(len(rows_MH), int(cast(Any, head).out_features), logps_N.dtype):
        logps_N = logps_N + checkpoint(logps_of, rows_MH[start:stop], start, use_reentrant=False)
    return logps_N


class _FrozenHead(torch.autograd.Function):
    """`select_logps` after a linear head without gradient.

    The gradient of log p(target) with respect to its row is W[target] - sum over v of p(v) W[v], so that no tensor of
    the vocabulary's size is saved for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, source_N: Tensor, target_N: Tensor
    ) -> Tensor:
        """Return the log-probabilities (N,) and save their gradient with respect to `rows_MH`."""
        device = rows_MH.device
        if torch.is_autocast_enabled(device.type):
            # cast once, not for every chunk
            weight_VH = weight_VH.to(torch.get_autocast_dtype(device.type))
        logps_N = torch.zeros(len(source_N), dtype=_full_precision(rows_MH.dtype), device=device)
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
        """Return the gradient of `rows_MH`."""
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
    """Return log-probabilities as `select_logps` does; write the sum over v of p(v) W[v] into `expected_RH`.

    Allocates one block of logits, which is freed on return.
    """
    precise = _full_precision(rows_RH.dtype)
    logits_RV = linear(rows_RH, weight_VH, bias_V).to(precise)
    logits_N = logits_RV[source_N, target_N]
    # log-sum-exp in place: torch.logsumexp allocates a second block
    max_R1 = logits_RV.amax(dim=-1, keepdim=True)
    weights_RV = logits_RV.sub_(max_R1).exp_()
    total_R1 = weights_RV.sum(dim=-1, keepdim=True)
    if expected_RH is not None:
        expected_RH.copy_((weights_RV.to(weight_VH.dtype) @ weight_VH) / total_R1)
    return logits_N - (max_R1 + total_R1.log()).squeeze(-1)[source_N]


def _run_chunked(
    model: nn.Module, inputs: dict[str, Any], positions_M: Tensor, source_N: Tensor, target_N: Tensor
) -> Tensor:
    """Run the model with a head that returns log-probabilities in place of logits.

    Both the model and its head are called as modules, because DDP, DeepSpeed and PEFT register hooks on them.
    """
    head = _output_embeddings(model)
    logits_of = head.forward
    returned: list[Tensor] = []

    def score(hidden_BWH: Tensor) -> Tensor:
        rows_MH = hidden_BWH.flatten(0, 1).index_select(0, positions_M)
        returned.append(chunked_logps(head, logits_of, rows_MH, source_N, target_N))
        return returned[-1]

    with _replaced_forward(head, score):
        logps_N: Tensor = model(**inputs).logits
    if len(returned) != 1:
        raise UserError(f"{type(model).__name__}: called its output embeddings {len(returned)} times, expected once")
    # comparing addresses first avoids waiting for the GPU in the usual case
    if logps_N.data_ptr() != returned[0].data_ptr() and not torch.equal(logps_N, returned[0]):
        raise UserError(f"{type(model).__name__}: changes its logits after its output embeddings")
    return logps_N


def _output_embeddings(model: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(model, "module", None), nn.Module):  # DDP, DeepSpeed
        model = inner
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module) or not hasattr(head, "out_features"):
        raise UserError(
            f"{type(model).__name__}: its output embeddings are not a linear layer, got {type(head).__name__}"
        )
    return head


@contextmanager
def _replaced_forward(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace `module.forward` by `function` inside the block."""
    before = {name: value for name, value in vars(module).items() if name == "forward"}
    vars(module)["forward"] = function
    try:
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update(before)


def _locate(source_N: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return the tokens that a chunk's rows predict as a mask, and each token's row in the chunk (0 if outside)."""
    local_N = source_N - start
    return (local_N >= 0) & (local_N < rows), local_N.clamp(0, rows - 1)


def _chunks(rows: int, vocabulary: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    size = max(1, LOGITS_CHUNK_BYTES // (vocabulary * dtype.itemsize))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _full_precision(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
