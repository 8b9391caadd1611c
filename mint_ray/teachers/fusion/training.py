"""Train the network on the records of the training split, alone or with other processes, to the same end.

Every draw (order, hidden parts, dropout, how an image is varied) is made for all records alike by every process, each
of which then computes its share of the rows of a step; gradients are summed. So neither the number of processes nor
the rows of one pass change what is learned, up to the order in which floats are added.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from mint_ray.config.loader import UserError
from mint_ray.records import Label, Record
from mint_ray.teachers import Checkpoints, FitReport
from mint_ray.teachers.config import Fusion
from mint_ray.teachers.fusion import calibration
from mint_ray.teachers.fusion.distributed import device, share_of, total
from mint_ray.teachers.fusion.feature_cache import ROWS_PER_PASS, Draws, Shelf
from mint_ray.teachers.fusion.features import Parts
from mint_ray.teachers.fusion.network import Head

logger = logging.getLogger("mint_ray")

Tensor = torch.Tensor

ROWS_MEASURED = 1_024
"""Training records whose vectors say how the numbers of an encoder that learns are spread at the start."""
MAX_NORM = 1.0
"""Longest gradient of one step."""
STATE, PROGRESS = "state.safetensors", "progress.json"


@dataclasses.dataclass(frozen=True)
class Trained:
    """The network at its best epoch, and what is to be told of it."""

    parts: Parts
    head: Head
    temperature: float
    report: FitReport


def train(
    config: Fusion, labels: Sequence[Label], records: Sequence[Record], checkpoints: Checkpoints | None
) -> Trained:
    """Learn from the training split, stop by the validation split, calibrate on it.

    Raises UserError when no training record is left, when none has one of the parts, and when the images of more than
    `max_bad_share` of the records cannot be read.
    """
    usable, dropped = _usable(labels, records)
    learned = [record for record in usable if record.split == "train"]
    if not learned:
        raise UserError("fusion: no record of the training split has a label to learn from")
    _check_parts(config, learned)
    parts = Parts.learn(config, learned).to(device())
    shelf = Shelf(parts, usable)
    kept, bad = shelf.look(config.max_bad_share, checkpoints.tell if checkpoints else lambda done, whole: None)
    dropped.update(bad)
    place = {label.label_id: i for i, label in enumerate(labels)}
    truth = torch.tensor([place[record.label_id or ""] for record in usable], dtype=torch.long)
    rows = {split: [row for row in kept if usable[row].split == split] for split in ("train", "validation")}
    if not rows["train"]:
        raise UserError("fusion: no record of the training split is left to learn from")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = Head(config, {part: parts.width(part) for part in parts.names}, len(labels)).to(device())
    course = Course(config, parts, head, shelf, truth, rows["train"], rows["validation"])
    course.measure()
    epochs = course.run(checkpoints)
    temperature, metrics = course.judge()
    counts = {f"records_{split}": len(some) for split, some in rows.items()} | {"labels": len(labels)} | epochs
    return Trained(parts, head, temperature, FitReport(counts=counts, dropped=dict(dropped), metrics=metrics))


def _usable(labels: Sequence[Label], records: Sequence[Record]) -> tuple[list[Record], Counter[str]]:
    """The records to learn and to judge by, those of the training split first."""
    known = {label.label_id for label in labels}
    dropped: Counter[str] = Counter()
    found: dict[str, list[Record]] = {"train": [], "validation": []}
    for record in records:
        if record.split not in found:
            continue
        if record.label_id is None:
            dropped["no_label"] += 1
        elif record.label_id not in known:
            dropped["label_not_in_task"] += 1
        else:
            found[record.split].append(record)
    return [*found["train"], *found["validation"]], dropped


def _check_parts(config: Fusion, records: Sequence[Record]) -> None:
    """Raise UserError for a part that no training record has."""
    for name, kind in config.fields.items():
        if not any(record.fields.get(name) for record in records):
            raise UserError(f"fusion.fields: no training record has the field {name!r} ({kind})")
    if config.image and not any(record.image_uri for record in records):
        raise UserError("fusion.image: no training record has an image")


class Course:
    """The training itself."""

    def __init__(
        self,
        config: Fusion,
        parts: Parts,
        head: Head,
        shelf: Shelf,
        truth: Tensor,
        train: Sequence[int],
        validation: Sequence[int],
    ) -> None:
        self.config, self.parts, self.head, self.shelf = config, parts, head, shelf
        self.truth, self.train_rows, self.validation_rows = truth.to(device()), list(train), list(validation)
        counts = torch.bincount(truth[self.train_rows], minlength=head.last.out_features).float()
        weight = 1 / counts if config.class_balanced else torch.ones_like(counts)
        # a label that only the validation split has weighs as much as the others do on average
        weight = torch.where(counts > 0, weight, weight[counts > 0].mean())
        self.weight = (weight / weight[truth[self.train_rows]].mean()).to(device())
        self.encoder_weights = [weight for weight in parts.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(head.parameters()), "peak": config.learning_rate},
                {"params": self.encoder_weights, "peak": config.encoder_learning_rate},
            ],
            lr=0.0,
            weight_decay=config.weight_decay,
        )
        self.steps = config.epochs * math.ceil(len(self.train_rows) / config.batch_size)
        self.step = 0

    def measure(self) -> None:
        """Have the head scale every number of the encoders by its spread over the training split."""
        for part in self.parts.names:
            rows = [row for row in self.train_rows if bool(self.shelf.read.present[part][row])]
            if part in ("fields", "findings"):
                continue  # scaled by their code already
            if self.parts.learns(part):
                step = max(1, len(rows) // ROWS_MEASURED)
                rows = rows[::step]
            vectors = torch.zeros(len(rows), self.parts.width(part), device=device())
            for places, some in self._passes(rows):
                with torch.no_grad():
                    if part in self.shelf.plain:
                        made = self.shelf.plain[part][some]
                    else:
                        images = self.shelf.images(some) if part in ("image", "joint") else [None] * len(some)
                        made = self.parts.vectors(part, self.shelf.read, some, images)
                vectors[places] = made
            total(vectors)
            if len(rows) > 1:
                self.head.scale(part, vectors.mean(dim=0), vectors.std(dim=0))

    def run(self, checkpoints: Checkpoints | None) -> dict[str, int]:
        """Epochs until the validation loss has not fallen for a while; ends with the weights of the best."""
        progress: dict[str, Any] = {"epoch": 0, "best_epoch": 0, "best_loss": math.inf}
        best = self._weights()
        place = None if checkpoints is None else checkpoints.last()
        if place is not None:
            progress, best = self._resume(place)
        epochs = self.config.epochs
        while progress["epoch"] < epochs and progress["epoch"] - progress["best_epoch"] < self.config.patience:
            draws = Draws(self.config, progress["epoch"], self.shelf.read, self.shelf.train, self.train_rows)
            loss = self._epoch(draws)
            progress["epoch"] += 1
            judged = self._validation_loss()
            if judged is None or judged < progress["best_loss"]:
                # without a validation split the last epoch is the best
                progress |= {"best_epoch": progress["epoch"], "best_loss": judged if judged is not None else math.inf}
                best = self._weights()
            note = f"loss {loss:.3f}" + ("" if judged is None else f", validation {judged:.3f}")
            if checkpoints is None:
                logger.info("fusion: epoch %d of %d, %s", progress["epoch"], epochs, note)
            else:
                told, weights = dict(progress), best

                def save(folder: Path, told: dict[str, Any] = told, weights: dict[str, Tensor] = weights) -> None:
                    self._save(folder, told, weights)

                checkpoints.keep(save, progress["epoch"], epochs, note)
        load_weights(self.parts, self.head, best)
        return {"epochs": progress["epoch"], "best_epoch": progress["best_epoch"]}

    def judge(self) -> tuple[float, dict[str, float]]:
        """The temperature, and how good all parts and each of them alone are on the validation split."""
        rows = self.validation_rows
        if not rows:
            return 1.0, {}
        vectors, truth_N = self._vectors(rows), self.truth[rows].cpu().numpy()
        logits_NL = self._logits(vectors, rows, None)
        temperature = calibration.best_temperature(logits_NL, truth_N)
        calibrated_NL = logits_NL / temperature
        metrics = {
            "top_1_accuracy": calibration.accuracy(logits_NL, truth_N),
            "balanced_accuracy": calibration.balanced_accuracy(logits_NL, truth_N),
            "nll_uncalibrated": calibration.negative_log_likelihood(logits_NL, truth_N),
            "nll": calibration.negative_log_likelihood(calibrated_NL, truth_N),
            "ece_uncalibrated": calibration.calibration_error(logits_NL, truth_N),
            "ece": calibration.calibration_error(calibrated_NL, truth_N),
            "temperature": temperature,
        }
        alone = {part: part for part in self.parts.names} if len(self.parts.names) > 1 else {}
        for name, only in {**alone, "all": None}.items():
            part_NL = self._logits(vectors, rows, only)
            metrics[f"accuracy/{name}"] = calibration.accuracy(part_NL, truth_N)
            metrics[f"balanced_accuracy/{name}"] = calibration.balanced_accuracy(part_NL, truth_N)
        return temperature, {name: round(value, 4) for name, value in metrics.items()}

    def _epoch(self, draws: Draws) -> float:
        """One pass over the training split; the mean loss."""
        summed = torch.zeros(2, device=device())
        for start in range(0, len(draws.order), self.config.batch_size):
            rows = draws.order[start : start + self.config.batch_size]
            summed += self._step(rows, draws)
        loss, weight = total(summed).tolist()
        return float(loss / weight)

    def _step(self, rows: Sequence[int], draws: Draws) -> Tensor:
        """Move the weights once, by the gradient of all `rows`; the summed loss of this process's share."""
        mask = draws.dropped(len(rows), self.config.width)
        whole = self.weight[self.truth[list(rows)]].sum()
        summed = torch.zeros(2, device=device())
        mine = share_of(range(len(rows)))
        # an encoder that learns keeps what it computed until the pass is over
        size = ROWS_PER_PASS if self.encoder_weights else len(rows)
        for start in range(0, len(mine), size):
            places = mine[start : start + size]
            some = [rows[i] for i in places]
            logits = self.head(
                self.shelf.vectors(some, draws),
                self.shelf.present(some, draws.hidden[some]),
                None if mask is None else mask[places],
            )
            losses = functional.cross_entropy(
                logits, self.truth[some], reduction="none", label_smoothing=self.config.label_smoothing
            )
            weights = self.weight[self.truth[some]]
            loss = (losses * weights).sum()
            (loss / whole).backward()  # type: ignore[no-untyped-call]
            summed += torch.stack([loss.detach(), weights.sum()])
        self._move()
        return summed

    def _move(self) -> None:
        learning = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        # a process without a row in this step, or a weight that none needed, has no gradient
        grads = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in learning]
        flat = total(torch.cat([grad.flatten() for grad in grads]))
        flat *= min(1.0, MAX_NORM / max(float(flat.norm()), 1e-12))
        pieces = torch.split(flat, [grad.numel() for grad in grads])
        for weight, grad in zip(learning, pieces, strict=True):
            weight.grad = grad.view_as(weight)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * (1 + math.cos(math.pi * self.step / self.steps)) / 2
        self.step += 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _validation_loss(self) -> float | None:
        """Mean negative log-likelihood, labels weighted as in training."""
        rows = self.validation_rows
        if not rows:
            return None
        logits = torch.from_numpy(self._logits(self._vectors(rows), rows, None))
        truth, weight = self.truth[rows].cpu(), self.weight.cpu().double()
        return float(functional.cross_entropy(logits, truth, weight=weight))

    def _vectors(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The vectors of `rows`, worked out in shares."""
        held: dict[str, Tensor] = {}
        for places, some in self._passes(rows):
            with torch.no_grad():
                for part, made in self.shelf.vectors(some, None).items():
                    held.setdefault(part, torch.zeros(len(rows), made.shape[1], device=device()))[places] = made
        for part in self.parts.names:
            # a process may have had no row at all
            total(held.setdefault(part, torch.zeros(len(rows), self.parts.width(part), device=device())))
        return held

    def _logits(self, vectors: dict[str, Tensor], rows: Sequence[int], only: str | None) -> np.ndarray[Any, Any]:
        present = self.shelf.present(rows)
        if only is not None:
            present = {part: there & (part == only) for part, there in present.items()}
        with torch.no_grad():
            logits: np.ndarray[Any, Any] = self.head(vectors, present, None).cpu().double().numpy()
        return logits

    def _passes(self, rows: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """This process's share of `rows`, some at a time, as places in `rows` and as rows."""
        mine = share_of(range(len(rows)))
        for start in range(0, len(mine), ROWS_PER_PASS):
            places = mine[start : start + ROWS_PER_PASS]
            yield places, [rows[i] for i in places]

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in learned_weights(self.parts, self.head).items()}

    def _save(self, folder: Path, progress: dict[str, Any], best: dict[str, Tensor]) -> None:
        state = {f"now.{name}": tensor for name, tensor in self._weights().items()}
        state |= {f"best.{name}": tensor for name, tensor in best.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": tensor for name, tensor in slots.items()}
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, folder / STATE)
        (folder / PROGRESS).write_text(json.dumps(progress | {"step": self.step}))

    def _resume(self, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "optimizer": {}}
        for name, tensor in load_file(folder / STATE).items():
            group, _, rest = name.partition(".")
            state[group][rest] = tensor
        load_weights(self.parts, self.head, state["now"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state["optimizer"].items():
            index, _, slot = name.partition(".")
            slots.setdefault(int(index), {})[slot] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        progress = json.loads((folder / PROGRESS).read_text())
        self.step = progress.pop("step")
        return progress, state["best"]


def learned_weights(parts: Parts, head: Head) -> dict[str, Tensor]:
    """Everything that training changes; what was published and stayed as it was is left out."""
    encoders = {name for name, weight in parts.named_parameters() if weight.requires_grad}
    weights = {f"parts.{name}": tensor for name, tensor in parts.state_dict().items() if name in encoders}
    return weights | {f"head.{name}": tensor for name, tensor in head.state_dict().items()}


def load_weights(parts: nn.Module, head: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put back what `learned_weights` gave."""
    for prefix, module in (("parts.", parts), ("head.", head)):
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        missing, unexpected = module.load_state_dict(own, strict=False)
        if unexpected or (prefix == "head." and missing):
            raise ValueError(f"weights do not fit: {[*unexpected, *missing][0]}")
