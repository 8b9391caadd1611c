"""TRL's trainers on tokenized examples: the expected log-probabilities, losses and gradients of the layouts."""

from __future__ import annotations

import dataclasses

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.utils import selective_log_softmax

from mint_ray.layouts import Example
from tests.tiny import tiny_model, tiny_tokenizer

BETA = 0.5
TEXT = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
"""A data set that TRL's trainers require; measurements use the tokens of examples."""


@dataclasses.dataclass
class Measured:
    loss: float
    token_logps: Tensor
    """Log-probabilities of the tokens of the chosen completion of each pair, then of the rejected."""
    gradients: dict[str, Tensor]


class OrpoReference:
    """TRL's ORPOTrainer with a tiny model."""

    def __init__(self, model: nn.Module, folder) -> None:
        self.trainer = ORPOTrainer(
            model=model,
            args=ORPOConfig(
                output_dir=str(folder), beta=BETA, max_length=2048, report_to="none", use_cpu=True, bf16=False
            ),
            train_dataset=TEXT,
            processing_class=tiny_tokenizer(),
        )

    def measure(self, examples: list[Example], *, nll_on: str = "full", pad_left: bool = False) -> Measured:
        """Return TRL's loss. TRL's likelihood includes the prompt; for `completion` it is recomputed from TRL's logits."""
        batch = self.trainer.data_collator([row for example in examples for row in features(example)])
        if pad_left:
            batch = moved_right(batch)
        model = self.trainer.model
        model.zero_grad(set_to_none=True)
        loss, _ = self.trainer.get_batch_loss_metrics(model, batch)
        if nll_on == "completion":
            chosen_P, rejected_P, logits, _, _ = self.trainer.concatenated_forward(model, batch)
            labels = batch["chosen_labels"][:, 1:]
            nll = cross_entropy(logits[:, : labels.shape[1]].flatten(0, 1), labels.flatten())
            loss = nll - self.trainer.odds_ratio_loss(chosen_P, rejected_P)[0].mean()
        loss.backward()
        return Measured(loss.item(), self.token_logps(batch), gradients(model))

    def measure_linear(self, examples: list[Example]) -> Measured:
        """Return a loss of the likelihood over prompt and completion and the mean log-probabilities of both completions.

        Unlike TRL's odds ratio, it is not cast to float32.
        """
        batch = self.trainer.data_collator([row for example in examples for row in features(example)])
        model = self.trainer.model
        model.zero_grad(set_to_none=True)
        chosen_P, rejected_P, _, _, nll = self.trainer.concatenated_forward(model, batch)
        loss = nll + chosen_P.sum() - 2 * rejected_P.sum()
        loss.backward()
        return Measured(loss.item(), self.token_logps(batch), gradients(model))

    @torch.no_grad()
    def token_logps(self, batch: dict[str, Tensor]) -> Tensor:
        sides = self.trainer.concatenated_forward(self.trainer.model, batch)[2:4]
        logps = []
        for side, logits in zip(("chosen", "rejected"), sides, strict=True):
            labels = batch[f"{side}_labels"][:, 1:]
            scored = selective_log_softmax(logits[:, : labels.shape[1]], labels.clamp(min=0))
            logps.append(scored[labels != -100])
        return torch.cat(logps)


class DpoReference:
    """TRL's DPOTrainer with a tiny model and another as its reference."""

    def __init__(self, model: nn.Module, base: nn.Module, folder) -> None:
        self.trainer = DPOTrainer(
            model=model,
            ref_model=base,
            args=DPOConfig(output_dir=str(folder), beta=BETA, report_to="none", use_cpu=True, bf16=False),
            train_dataset=TEXT,
            processing_class=tiny_tokenizer(),
        )

    def measure(self, examples: list[Example]) -> tuple[Measured, Tensor, Tensor]:
        """Return the loss, and the log-probability of each completion (chosen, then rejected) under model and reference."""
        rows = [
            {
                "prompt_ids": example.prompt_ids,
                "chosen_ids": example.completions[chosen],
                "rejected_ids": example.completions[rejected],
            }
            for example in examples
            for chosen, rejected in example.pairs
        ]
        batch = self.trainer.data_collator(rows)
        model = self.trainer.model
        sums = torch.cat(self.trainer.compute_ref_log_probs(model, batch))
        base_sums = torch.cat(self.trainer.compute_ref_log_probs(self.trainer.ref_model, batch))
        model.zero_grad(set_to_none=True)
        loss = self.trainer.compute_loss(model, batch)
        loss.backward()
        return Measured(loss.item(), torch.empty(0), gradients(model)), sums, base_sums


def features(example: Example) -> list[dict[str, list[int]]]:
    """Return the tokens of each pair in the columns of TRL's trainers."""
    rows = []
    for pair in example.pairs:
        row = {"prompt_input_ids": example.prompt_ids, "prompt_attention_mask": [1] * len(example.prompt_ids)}
        for side, index in zip(("chosen", "rejected"), pair, strict=True):
            ids = example.prompt_ids + example.completions[index]
            row[f"{side}_input_ids"] = ids
            row[f"{side}_attention_mask"] = [1] * len(ids)
            row[f"{side}_labels"] = [-100] * len(example.prompt_ids) + example.completions[index]
        rows.append(row)
    return rows


def moved_right(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch padded on the left, with both sides padded to one width, as TRL pads them on the right."""
    width = max(batch["chosen_input_ids"].shape[1], batch["rejected_input_ids"].shape[1])
    moved = dict(batch)
    for side in ("chosen", "rejected"):
        lengths = batch[f"{side}_attention_mask"].sum(1).tolist()
        for name, padding in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            rows = batch[f"{side}_{name}"]
            wide = torch.full((len(rows), width), padding)
            for index, length in enumerate(lengths):
                wide[index, width - length :] = rows[index, :length]
            moved[f"{side}_{name}"] = wide
    return moved


def exact_model(family: str) -> nn.Module:
    """Return a tiny model that computes in float64 throughout; the norms of transformers compute in float32."""
    model = tiny_model(family=family).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _exact_norm(module)
    return model


def _exact_norm(norm: nn.Module):
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0

    def forward(x: Tensor) -> Tensor:
        return (norm.weight + offset) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    return forward


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def largest_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest error of any gradient, relative to the norm of all gradients."""
    assert actual.keys() == expected.keys()
    norm = torch.sqrt(sum((gradient**2).sum() for gradient in expected.values()))
    return max(float((actual[name] - expected[name]).abs().max() / norm) for name in expected)
