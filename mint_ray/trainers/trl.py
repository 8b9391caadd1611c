"""TRL's own trainers on our tokens: the reference that the shared-prefix trainer is compared with."""

from __future__ import annotations

import dataclasses
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, assert_never

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from mint_ray.config.loader import UserError
from mint_ray.layouts import Example
from mint_ray.objectives.config import AnyObjective, Cpo, Dpo, Ipo, NllOn, Orpo, Sft, SimPo
from mint_ray.trainers import TrainingRun, TrainResult
from mint_ray.trainers.checkpoints import UnshardedCheckpointTrainer
from mint_ray.trainers.config import TrainerArguments
from mint_ray.trainers.distributed import world_size
from mint_ray.trainers.examples import Examples
from mint_ray.trainers.huggingface import check_examples, run_training, trainer_callbacks, training_arguments
from mint_ray.trainers.kernels import compile_layers, set_attention_kernel

try:
    import datasets
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
except ModuleNotFoundError as error:
    raise UserError(f"train.trainer.kind: trl needs the package {error.name}; pip install 'mint-ray[trl]'") from error

Row = dict[str, Any]
"""One pair, in the columns that TRL's trainers produce when they tokenize."""

IGNORED = -100
"""Label of tokens that the loss ignores."""


class TrlTrainer:
    """The trainer of `TrainerArguments` with kind `trl`.

    Each pair is a row: `train_batch_size` and the batch sizes per device count pairs, and a prompt runs once per pair.
    The loss is normalized as in TRL: ORPO and CPO average the likelihood over a micro-batch, not over the step. Dropout
    of the adapter stays on, as in the shared-prefix trainer.
    """

    def __init__(self, config: TrainerArguments) -> None:
        """Raise UserError naming a setting that TRL's trainer of the objective does not support."""
        self.config = config
        self._method = _method(config.objective)

    def train(self, run: TrainingRun) -> TrainResult:
        """Train, validate, save and stop early as configured; see `Trainer.train`."""
        check_examples(run)
        config, method, size = self.config, self._method, run.resources.per_device_train_batch_size
        if run.train.read(0).image_uri is not None:
            raise UserError("train.trainer.kind: trl does not support images; use shared_prefix")
        if config.train_batch_size % (size * world_size()):
            raise UserError(
                f"train.trainer.train_batch_size: got {config.train_batch_size}, not a multiple of "
                f"per_device_train_batch_size {size} times {world_size()} workers"
            )
        options = method.options | self._reference_options(run)
        args = training_arguments(method.arguments, config, run, max_length=config.max_length, **options)
        set_attention_kernel(run.model, run.resources)
        compile_layers(run.model, run.resources)
        trainer = method.trainer(
            model=run.model,
            args=args,
            processing_class=run.tokenizer,
            train=_PairDataset(run.train, method.to_row),
            validation=_PairDataset(run.validation, method.to_row) if len(run.validation) else None,
            callbacks=trainer_callbacks(config, run),
        )
        return run_training(trainer, run, "concatenated")

    def _reference_options(self, run: TrainingRun) -> dict[str, Any]:
        if self._method.trainer is not _Dpo:
            return {}
        has_reference = run.train.read(0).reference_logps is not None
        if not has_reference and not isinstance(run.model, PeftModel):
            raise UserError(f"train.trainer.objective: {self.config.objective.kind} needs reference log-probabilities")
        return {"precompute_ref_log_probs": has_reference}


class _PretokenizedTrainer(UnshardedCheckpointTrainer):
    """A mixin for TRL's trainers: our rows, our order, our checkpoints."""

    def __init__(self, *, train: _PairDataset, validation: _PairDataset | None, **arguments: Any) -> None:
        # TRL's trainers tokenize any data set that they are created with, each in its own way. So they are created with
        # a line of text and get our rows, which have the columns that their collators expect, afterwards.
        datasets.disable_progress_bars()
        text = datasets.Dataset.from_list([{"prompt": "a", "completion": " b", "chosen": " b", "rejected": " c"}])
        super().__init__(train_dataset=text, eval_dataset=text if validation else None, **arguments)
        self.train_dataset, self.eval_dataset = train, validation

    def _send_telemetry(self) -> None:
        """Do nothing: TRL would report every run to its maintainers."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return _RecordOrderSampler(self.train_dataset, self.args.seed)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Any]:
        """Return the micro-batches of one optimizer step, and count their tokens without padding."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        masks = [batch[name] for batch in batches for name in batch if name.endswith("attention_mask")]
        tokens = torch.stack([mask.sum() for mask in masks]).sum().to(device)
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens, reduction="sum"))
        return batches, items


class _Orpo(_PretokenizedTrainer, ORPOTrainer):
    """ORPOTrainer on our rows."""


class _Sft(_PretokenizedTrainer, SFTTrainer):
    """SFTTrainer on our rows."""


class _Cpo(_PretokenizedTrainer, CPOTrainer):
    """CPOTrainer on our rows."""


class _Dpo(_PretokenizedTrainer, DPOTrainer):
    """DPOTrainer on our rows, with the base student as the reference."""

    def __init__(self, *, model: nn.Module, **arguments: Any) -> None:
        super().__init__(model=model, **arguments)
        # TRL copies the initial adapter as the reference; without the copy it disables the adapter, so that the
        # reference is the base student even if the adapter has been trained before
        if isinstance(model, PeftModel):
            model.delete_adapter("ref")

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Return the data set unchanged: the rows have the reference log-probabilities."""
        return dataset


@dataclasses.dataclass(frozen=True, slots=True)
class _TrlMethod:
    """The trainer and arguments of TRL for an objective."""

    trainer: type[_PretokenizedTrainer]
    arguments: type[Any]
    options: dict[str, Any]
    """Arguments of this trainer, in addition to those that all trainers share."""
    to_row: Callable[[Example, int], Row]
    """Function that returns one pair of an example, by its index, in the columns of the trainer's collator."""


def _method(objective: AnyObjective) -> _TrlMethod:
    """Return TRL's trainer. Raises UserError naming a setting that it does not support."""
    keep_dropout = {"disable_dropout": False}
    match objective:
        case Orpo():
            _check_nll_on(objective, "full", "ORPOTrainer")
            return _TrlMethod(_Orpo, ORPOConfig, {"beta": objective.beta, **keep_dropout}, _to_sides)
        case Sft():
            to_row = _to_labels if objective.nll_on == "full" else _to_completion_labels
            return _TrlMethod(_Sft, SFTConfig, {}, to_row)
        case Dpo() | Ipo():
            loss_type = "sigmoid" if isinstance(objective, Dpo) else "ipo"
            options = {"beta": objective.beta, "loss_type": loss_type, **keep_dropout}
            return _TrlMethod(_Dpo, DPOConfig, options, _to_prompt_and_completions)
        case SimPo():
            options = {
                "beta": objective.beta,
                "loss_type": "simpo",
                "simpo_gamma": objective.simpo_gamma,
                "cpo_alpha": 0.0,
            }
            return _TrlMethod(_Cpo, CPOConfig, {**options, **keep_dropout}, _to_sides)
        case Cpo():
            _check_nll_on(objective, "completion", "CPOTrainer")
            options = {"beta": objective.beta, "cpo_alpha": objective.cpo_alpha}
            return _TrlMethod(_Cpo, CPOConfig, {**options, **keep_dropout}, _to_sides)
        case _:
            assert_never(objective)


def _check_nll_on(objective: Orpo | Cpo, only: NllOn, trainer: str) -> None:
    if objective.nll_on != only:
        raise UserError(f"train.trainer.objective.nll_on: got {objective.nll_on}; TRL's {trainer} supports {only} only")


def _to_sides(example: Example, pair: int) -> Row:
    """Return a row for DPODataCollatorWithPadding of ORPOTrainer and CPOTrainer: sequences, prompts without labels."""
    row: Row = {}
    for side, index in zip(("chosen", "rejected"), example.pairs[pair], strict=True):
        completion = example.completions[index]
        row[f"{side}_input_ids"] = example.prompt_ids + completion
        row[f"{side}_attention_mask"] = [1] * (len(example.prompt_ids) + len(completion))
        row[f"{side}_labels"] = [IGNORED] * len(example.prompt_ids) + completion
    return row


def _to_prompt_and_completions(example: Example, pair: int) -> Row:
    """Return a row for DataCollatorForPreference of DPOTrainer: prompt, completions, and the reference if known."""
    row: Row = {"prompt_ids": example.prompt_ids}
    for side, index in zip(("chosen", "rejected"), example.pairs[pair], strict=True):
        row[f"{side}_ids"] = example.completions[index]
        if example.reference_logps is not None:
            row[f"ref_{side}_logps"] = example.reference_logps[index]
    return row


def _to_labels(example: Example, pair: int) -> Row:
    """Return a row for DataCollatorForLanguageModeling of SFTTrainer: the chosen sequence, all of it labeled."""
    ids = example.prompt_ids + example.completions[example.pairs[pair][0]]
    return {"input_ids": ids, "labels": ids}


def _to_completion_labels(example: Example, pair: int) -> Row:
    """Return the row of `_to_labels` without labels on the prompt."""
    prompt = len(example.prompt_ids)
    ids = _to_labels(example, pair)["input_ids"]
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


class _PairDataset(Dataset[Row]):
    """The pairs of all examples; pairs of one record are consecutive."""

    def __init__(self, examples: Examples, to_row: Callable[[Example, int], Row]) -> None:
        """Read every example once to count its pairs."""
        self._examples, self._to_row = examples, to_row
        self._ends = list(accumulate(len(examples[index].pairs) for index in range(len(examples))))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> Row:
        record = bisect_right(self._ends, row)
        return self._to_row(self._examples[record], row - self._start(record))

    def order(self, rng: random.Random) -> list[int]:
        """Return the indices of all pairs, in the order of their records."""
        records = self._examples.order(rng)
        return [row for record in records for row in range(self._start(record), self._ends[record])]

    def _start(self, record: int) -> int:
        return self._ends[record - 1] if record else 0


class _RecordOrderSampler(Sampler[int]):
    """Pairs, with records in the order of the shared-prefix trainer."""

    def __init__(self, rows: _PairDataset, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by Hugging Face's trainer."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows.order(random.Random(f"{self._seed}:{self._epoch}")))
