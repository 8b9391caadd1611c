"""Training of the fusion network, in one process or several, with the same result.

Every process draws the random numbers (order, hidden modalities, dropout, augmentation) of all records, and computes
its share of the rows of a step; gradients are summed. So neither the number of processes nor the rows per pass change
what is learned, up to the order of floating-point additions.

Tested by tests/teachers/fusion/test_teacher.py.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from mint_ray.config.loader import UserError
from mint_ray.records import Label, Record
from mint_ray.teachers import Checkpointer, FitReport
from mint_ray.teachers.calibration import (
    Floats,
    accuracy,
    balanced_accuracy,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
)
from mint_ray.teachers.config import Fusion
from mint_ray.teachers.fusion.distributed import all_reduce_sum, device, shard
from mint_ray.teachers.fusion.feature_cache import ROWS_PER_PASS, EpochRandomness, FeatureCache
from mint_ray.teachers.fusion.features import TABULAR, ModalityEncoders
from mint_ray.teachers.fusion.network import FusionHead

logger = logging.getLogger("mint_ray")

Tensor = torch.Tensor

MAX_NORMALIZATION_ROWS = 1_024
"""Training records from which the normalization of a trained encoder's features is estimated at the start."""
MAX_GRAD_NORM = 1.0
STATE, PROGRESS = "state.safetensors", "progress.json"


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """The network at its best epoch, with its temperature."""

    encoders: ModalityEncoders
    head: FusionHead
    temperature: float
    report: FitReport


@dataclasses.dataclass
class TrainingProgress:
    """Position of a training run."""

    epoch: int = 0
    """Number of finished epochs."""
    best_epoch: int = 0
    best_loss: float = math.inf
    """Lowest validation loss; infinite without a validation split."""


def train(
    config: Fusion, labels: Sequence[Label], records: Sequence[Record], checkpointer: Checkpointer | None
) -> TrainingResult:
    """Train on the training split; stop early and calibrate on the validation split.

    Raises:
        UserError: No training record is left, none has one of the modalities, or more than `max_bad_share` of the
            images cannot be read.
    """
    labelled, dropped = _select_labelled(labels, records)
    train_records = [record for record in labelled if record.split == "train"]
    if not train_records:
        raise UserError("fusion: no record of the training split has a label of the task")
    _check_inputs(config, train_records)
    encoders = ModalityEncoders.fit(config, train_records).to(device())
    cache = FeatureCache(encoders, labelled)
    usable, failures = cache.build(config.max_bad_share, checkpointer.report_progress if checkpointer else _no_report)
    dropped.update(failures)
    index = {label.label_id: i for i, label in enumerate(labels)}
    label_N = torch.tensor([index[record.label_id or ""] for record in labelled], dtype=torch.long)
    rows = {split: [row for row in usable if labelled[row].split == split] for split in ("train", "validation")}
    if not rows["train"]:
        raise UserError("fusion: no record of the training split has a readable image")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sizes = {modality: encoders.feature_size(modality) for modality in encoders.names}
        head = FusionHead(config, sizes, len(labels)).to(device())
    trainer = FusionTrainer(head, cache, label_N, rows["train"], rows["validation"])
    trainer.fit_normalization()
    progress = trainer.run(checkpointer)
    temperature, metrics = trainer.evaluate()
    counts = {f"records_{split}": len(some) for split, some in rows.items()} | {"labels": len(labels)}
    counts |= {"epochs": progress.epoch, "best_epoch": progress.best_epoch}
    report = FitReport(counts=counts, dropped=dict(dropped), metrics=metrics)
    return TrainingResult(encoders, head, temperature, report)


def _no_report(_done: int, _total: int) -> None:
    pass


def _select_labelled(labels: Sequence[Label], records: Sequence[Record]) -> tuple[list[Record], Counter[str]]:
    """Return the training and validation records with a label of the task, training records first."""
    known = {label.label_id for label in labels}
    dropped: Counter[str] = Counter()
    by_split: dict[str, list[Record]] = {"train": [], "validation": []}
    for record in records:
        if record.split not in by_split:
            continue
        if record.label_id is None:
            dropped["no_label"] += 1
        elif record.label_id not in known:
            dropped["label_not_in_task"] += 1
        else:
            by_split[record.split].append(record)
    return [*by_split["train"], *by_split["validation"]], dropped


def _check_inputs(config: Fusion, records: Sequence[Record]) -> None:
    """Raise UserError for an input that no training record has."""
    for name, kind in config.fields.items():
        if not any(record.fields.get(name) for record in records):
            raise UserError(f"fusion.fields: no training record has the field {name!r} ({kind})")
    if config.image and not any(record.image_uri for record in records):
        raise UserError("fusion.image: no training record has an image")


class FusionTrainer:
    """Training loop of the fusion head and the trained encoders."""

    def __init__(
        self,
        head: FusionHead,
        cache: FeatureCache,
        label_N: Tensor,
        train_rows: Sequence[int],
        validation_rows: Sequence[int],
    ) -> None:
        """Create optimizer and schedule; `label_N` has the index of each record's label."""
        self.encoders, self.head, self.cache = cache.encoders, head, cache
        config = self.config = cache.encoders.config
        self.label_N, self.train_rows, self.validation_rows = label_N.to(device()), train_rows, validation_rows
        self.label_weights = _label_weights(
            label_N[list(train_rows)], head.classifier.out_features, balanced=config.class_balanced
        ).to(device())
        self.encoder_weights = [weight for weight in self.encoders.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(head.parameters()), "lr": config.learning_rate},
                {"params": self.encoder_weights, "lr": config.encoder_learning_rate},
            ],
            weight_decay=config.weight_decay,
        )
        steps_per_epoch = math.ceil(len(self.train_rows) / config.train_batch_size)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, T_max=config.num_train_epochs * steps_per_epoch
        )

    def fit_normalization(self) -> None:
        """Set the head's normalization to mean and standard deviation of the features over the training split."""
        for modality in self.encoders.names:
            if modality in TABULAR:
                continue
            rows = [row for row in self.train_rows if bool(self.cache.inputs.present[modality][row])]
            if self.encoders.is_trainable(modality):
                rows = rows[:: max(1, len(rows) // MAX_NORMALIZATION_ROWS)]
            features = torch.zeros(len(rows), self.encoders.feature_size(modality), device=device())
            for positions, batch in self._batches(rows):
                features[positions] = self._encode_train_batch(modality, batch)
            all_reduce_sum(features)
            if len(rows) > 1:
                self.head.set_normalization(modality, features.mean(dim=0), features.std(dim=0))

    def run(self, checkpointer: Checkpointer | None) -> TrainingProgress:
        """Train until the validation loss stops falling, then restore the weights of the best epoch."""
        config, progress, best = self.config, TrainingProgress(), self._copy_weights()
        checkpoint = None if checkpointer is None else checkpointer.resume_from()
        if checkpoint is not None:
            progress, best = self._resume(checkpoint)
        while (
            progress.epoch < config.num_train_epochs
            and progress.epoch - progress.best_epoch < config.early_stopping_patience
        ):
            randomness = EpochRandomness(
                config, progress.epoch, self.cache.inputs, self.cache.num_train, self.train_rows
            )
            loss, validation_loss = self._train_epoch(randomness), self._validation_loss()
            progress.epoch += 1
            if validation_loss is None:
                # without a validation split the last epoch is the best
                progress.best_epoch, best = progress.epoch, self._copy_weights()
            elif validation_loss < progress.best_loss:
                progress.best_epoch, progress.best_loss = progress.epoch, validation_loss
                best = self._copy_weights()
            message = f"loss {loss:.3f}" + ("" if validation_loss is None else f", validation {validation_loss:.3f}")
            self._checkpoint(checkpointer, progress, best, message)
        load_weights(self.encoders, self.head, best)
        return progress

    def evaluate(self) -> tuple[float, dict[str, float]]:
        """Return the temperature, and metrics on the validation split, with all modalities and with each alone."""
        rows = self.validation_rows
        if not rows:
            return 1.0, {}
        features, label_N = self._gather_features(rows), self.label_N[list(rows)].cpu().numpy()
        logits_NL = self._logits(features, rows)
        temperature = fit_temperature(logits_NL, label_N)
        calibrated_NL = logits_NL / temperature
        metrics = {
            "top_1_accuracy": accuracy(logits_NL, label_N),
            "balanced_accuracy": balanced_accuracy(logits_NL, label_N),
            "nll_uncalibrated": negative_log_likelihood(logits_NL, label_N),
            "nll": negative_log_likelihood(calibrated_NL, label_N),
            "ece_uncalibrated": expected_calibration_error(logits_NL, label_N),
            "ece": expected_calibration_error(calibrated_NL, label_N),
            "temperature": temperature,
        }
        alone = {name: name for name in self.encoders.names} if len(self.encoders.names) > 1 else {}
        for name, modality in {**alone, "all": None}.items():
            unimodal_NL = self._logits(features, rows, modality)
            metrics[f"accuracy/{name}"] = accuracy(unimodal_NL, label_N)
            metrics[f"balanced_accuracy/{name}"] = balanced_accuracy(unimodal_NL, label_N)
        return temperature, {name: round(value, 4) for name, value in metrics.items()}

    def _train_epoch(self, randomness: EpochRandomness) -> float:
        """Run one pass over the training split and return the mean loss."""
        sums = torch.zeros(2, device=device())
        for start in range(0, len(randomness.order), self.config.train_batch_size):
            sums += self._train_step(randomness.order[start : start + self.config.train_batch_size], randomness)
        loss, weight = all_reduce_sum(sums).tolist()
        return float(loss / weight)

    def _train_step(self, rows: Sequence[int], randomness: EpochRandomness) -> Tensor:
        """Update the weights by the gradient of `rows`; return this process's sums of weighted losses and weights."""
        dropout_mask = randomness.dropout_mask(len(rows), self.config.hidden_size)
        total_weight = self.label_weights[self.label_N[list(rows)]].sum()
        sums = torch.zeros(2, device=device())
        own = shard(range(len(rows)))
        # a trained encoder keeps its activations until the backward pass
        size = ROWS_PER_PASS if self.encoder_weights else len(rows)
        for start in range(0, len(own), size):
            positions = own[start : start + size]
            batch = [rows[i] for i in positions]
            logits = self.head(
                self.cache.get_features(batch, randomness),
                self.cache.get_present(batch, randomness.hidden[batch]),
                None if dropout_mask is None else dropout_mask[positions],
            )
            losses = functional.cross_entropy(
                logits, self.label_N[batch], reduction="none", label_smoothing=self.config.label_smoothing
            )
            weights = self.label_weights[self.label_N[batch]]
            loss = (losses * weights).sum()
            (loss / total_weight).backward()  # type: ignore[no-untyped-call]
            sums += torch.stack([loss.detach(), weights.sum()])
        self._update_weights()
        return sums

    def _update_weights(self) -> None:
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        # summed here and not by DDP, which averages: a process may have fewer rows of a step than the others, or none
        grads = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights]
        summed = torch.split(
            all_reduce_sum(torch.cat([grad.flatten() for grad in grads])), [grad.numel() for grad in grads]
        )
        for weight, grad in zip(weights, summed, strict=True):
            weight.grad = grad.view_as(weight)
        nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _validation_loss(self) -> float | None:
        """Return the cross-entropy on the validation split, weighted as in training; None without such a split."""
        rows = self.validation_rows
        if not rows:
            return None
        logits = torch.from_numpy(self._logits(self._gather_features(rows), rows))
        labels, weight = self.label_N[list(rows)].cpu(), self.label_weights.cpu().double()
        return float(functional.cross_entropy(logits, labels, weight=weight))

    @torch.no_grad()
    def _encode_train_batch(self, modality: str, rows: Sequence[int]) -> Tensor:
        """Return features of training records without augmentation."""
        if modality in self.cache.features:
            return self.cache.features[modality][list(rows)]
        images = self.cache.read_images(rows) if modality in ("image", "joint") else [None] * len(rows)
        return self.encoders.encode(modality, self.cache.inputs, rows, images)

    @torch.no_grad()
    def _gather_features(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the features of `rows`, each process computing a share."""
        gathered = {
            modality: torch.zeros(len(rows), self.encoders.feature_size(modality), device=device())
            for modality in self.encoders.names
        }
        for positions, batch in self._batches(rows):
            for modality, features in self.cache.get_features(batch, None).items():
                gathered[modality][positions] = features
        return {modality: all_reduce_sum(features) for modality, features in gathered.items()}

    @torch.no_grad()
    def _logits(self, features: dict[str, Tensor], rows: Sequence[int], modality: str | None = None) -> Floats:
        """Return logits (rows, labels), with all modalities or with one alone."""
        present = self.cache.get_present(rows)
        if modality is not None:
            present = {name: mask & (name == modality) for name, mask in present.items()}
        logits: Floats = self.head(features, present, None).cpu().double().numpy()
        return logits

    def _batches(self, rows: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Yield this process's share of `rows` in batches, as positions in `rows` and as rows."""
        own = shard(range(len(rows)))
        for start in range(0, len(own), ROWS_PER_PASS):
            positions = own[start : start + ROWS_PER_PASS]
            yield positions, [rows[i] for i in positions]

    def _copy_weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in trained_weights(self.encoders, self.head).items()}

    def _checkpoint(
        self, checkpointer: Checkpointer | None, progress: TrainingProgress, best: dict[str, Tensor], message: str
    ) -> None:
        if checkpointer is None:
            logger.info("fusion: epoch %d of %d, %s", progress.epoch, self.config.num_train_epochs, message)
            return

        def save(folder: Path) -> None:
            self._save(folder, progress, best)

        checkpointer.save_checkpoint(save, progress.epoch, self.config.num_train_epochs, message)

    def _save(self, folder: Path, progress: TrainingProgress, best: dict[str, Tensor]) -> None:
        optimizer = self.optimizer.state_dict()
        tensors = {f"current.{name}": tensor for name, tensor in self._copy_weights().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
        for index, slots in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in slots.items()}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / STATE)
        state = {
            "progress": dataclasses.asdict(progress),
            "param_groups": optimizer["param_groups"],
            "scheduler": self.scheduler.state_dict(),
        }
        (folder / PROGRESS).write_text(json.dumps(state))

    def _resume(self, folder: Path) -> tuple[TrainingProgress, dict[str, Tensor]]:
        """Restore weights, optimizer and schedule; return the progress and the weights of the best epoch."""
        tensors: dict[str, dict[str, Tensor]] = {"current": {}, "best": {}, "optimizer": {}}
        for key, tensor in load_file(folder / STATE).items():
            group, _, name = key.partition(".")
            tensors[group][name] = tensor
        load_weights(self.encoders, self.head, tensors["current"])
        slots: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors["optimizer"].items():
            index, _, name = key.partition(".")
            slots.setdefault(int(index), {})[name] = tensor
        state = json.loads((folder / PROGRESS).read_text())
        self.optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})
        self.scheduler.load_state_dict(state["scheduler"])
        return TrainingProgress(**state["progress"]), tensors["best"]


def trained_weights(encoders: ModalityEncoders, head: FusionHead) -> dict[str, Tensor]:
    """Return all tensors that training changes; weights of frozen encoders are left out."""
    trainable = {name for name, weight in encoders.named_parameters() if weight.requires_grad}
    weights = {f"encoders.{name}": tensor for name, tensor in encoders.state_dict().items() if name in trainable}
    return weights | {f"head.{name}": tensor for name, tensor in head.state_dict().items()}


def load_weights(encoders: nn.Module, head: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load what `trained_weights` returned. Raises ValueError if it does not fit."""
    for prefix, module in (("encoders.", encoders), ("head.", head)):
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        missing, unexpected = module.load_state_dict(own, strict=False)
        if unexpected or (prefix == "head." and missing):
            raise ValueError(f"weights do not fit: {[*unexpected, *missing][0]}")


def _label_weights(label_N: Tensor, num_labels: int, *, balanced: bool) -> Tensor:
    """Return the weight of each label in the loss; the mean over training records is 1."""
    counts = torch.bincount(label_N, minlength=num_labels).float()
    weight = 1 / counts if balanced else torch.ones_like(counts)
    # a label that occurs in the validation split only gets the mean weight
    weight = torch.where(counts > 0, weight, weight[counts > 0].mean())
    return weight / weight[label_N].mean()
