"""Train a student with TRL's own trainers, as the reference that ours are compared with."""

from __future__ import annotations

import dataclasses
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, assert_never

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from mint_ray.config.loader import UserError
from mint_ray.layouts import Example
from mint_ray.objectives.config import AnyObjective, Cpo, Dpo, Ipo, NllOn, Orpo, Sft, SimPo
from mint_ray.trainers import TrainResult
from mint_ray.trainers.arguments import training_arguments
from mint_ray.trainers.checkpoints import WholeCheckpoints
from mint_ray.trainers.config import Arguments, TrainResources
from mint_ray.trainers.examples import Examples
from mint_ray.trainers.kernels import compile_layers, set_kernels

try:
    import datasets
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
except ModuleNotFoundError as error:
    raise UserError(f"train.trainer.kind: trl needs the package {error.name}; pip install 'mint-ray[trl]'") from error

Row = dict[str, Any]
"""One pair in the columns that a trainer of TRL makes itself when it tokenises."""

IGNORED = -100
"""Label of a token that is no part of the loss."""


class TrlTrainer:
    """The live trainer of `Arguments` with kind `trl`.

    Each pair is a row of its own: `train_batch_size` and the batch sizes per device count pairs, and a prompt runs
    again for each. The loss is normalised as TRL does it: ORPO and CPO take the mean likelihood of a micro-batch, not
    of the step. Dropout of the adapter stays on, as in our own trainer.
    """

    def __init__(self, config: Arguments) -> None:
        """Raises UserError naming a setting that TRL's trainer of this objective does not have."""
        self.config = config
        self._method = _method(config.objective)

    def run(
        self,
        *,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        train: Examples,
        validation: Examples,
        output_dir: Path,
        resources: TrainResources,
        run_name: str,
        callbacks: list[TrainerCallback],
        resume_from_checkpoint: Path | None,
    ) -> TrainResult:
        """Validate, save and stop early as the config says, and leave the best weights in `model`; see `Trainer`."""
        if not len(train):
            raise UserError("no pairs to train on")
        if train[0].image_uri is not None:
            raise UserError("train.trainer.kind: trl has no path for images; take shared_prefix")
        config, method = self.config, self._method
        world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        together = resources.per_device_train_batch_size * world_size
        if config.train_batch_size % together:
            raise UserError(
                f"train.trainer.train_batch_size: got {config.train_batch_size}, no multiple of "
                f"per_device_train_batch_size {resources.per_device_train_batch_size} times {world_size} workers"
            )
        options = dict(method.options)
        if method.trainer is _Dpo:
            options["precompute_ref_log_probs"] = train[0].reference_logps is not None
            if train[0].reference_logps is None and not isinstance(model, PeftModel):
                raise UserError(f"train.trainer.objective: {config.objective.kind} needs reference log-probabilities")
        args = training_arguments(
            method.arguments,
            config,
            resources,
            output_dir=output_dir,
            validate=bool(len(validation)),
            world_size=world_size,
            run_name=run_name,
            max_length=config.max_length,
            **options,
        )
        set_kernels(model, resources)
        compile_layers(model, resources)
        stopping = EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience)
        trainer = method.trainer(
            model=model,
            args=args,
            processing_class=tokenizer,
            train=_Rows(train, method.to_row),
            validation=_Rows(validation, method.to_row) if len(validation) else None,
            callbacks=[*callbacks, *([stopping] if len(validation) else [])],
        )
        # it prints every row of the log; callers bring callbacks of their own
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(resume_from_checkpoint) if resume_from_checkpoint else None)
        state = trainer.state
        return TrainResult(
            log_history=list(state.log_history),
            best_metric=state.best_metric,
            best_step=state.best_global_step,
            global_step=state.global_step,
            train_tokens=int(state.num_input_tokens_seen),
            layout="concatenated",
        )


class _OnOurTokens(WholeCheckpoints):
    """What is put in front of each of TRL's trainers: our rows, our order, our checkpoints."""

    def __init__(self, *, train: _Rows, validation: _Rows | None, **arguments: Any) -> None:
        # TRL tokenises, each trainer in a way of its own, whatever data set it is made with. So it is made with a line
        # of text, and given our rows behind that; they have the columns that its collator looks for.
        datasets.disable_progress_bars()
        text = datasets.Dataset.from_list([{"prompt": "a", "completion": " b", "chosen": " b", "rejected": " c"}])
        super().__init__(train_dataset=text, eval_dataset=text if validation else None, **arguments)
        self.train_dataset, self.eval_dataset = train, validation

    def _send_telemetry(self) -> None:
        """TRL would tell its makers of every run; nobody here was asked."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return _Order(self.train_dataset, self.args.seed)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Any]:
        """The micro-batches of one optimiser step; their tokens, padding left out, are added to those seen so far."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        masks = [batch[name] for batch in batches for name in batch if name.endswith("attention_mask")]
        tokens = torch.stack([mask.sum() for mask in masks]).sum().to(device)
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens, reduction="sum"))
        return batches, items


class _Orpo(_OnOurTokens, ORPOTrainer): ...


class _Sft(_OnOurTokens, SFTTrainer): ...


class _Cpo(_OnOurTokens, CPOTrainer): ...


class _Dpo(_OnOurTokens, DPOTrainer):
    def __init__(self, *, model: nn.Module, **arguments: Any) -> None:
        super().__init__(model=model, **arguments)
        # TRL keeps a copy of the adapter as it came for a reference; without the copy it switches the adapter off,
        # which gives the base student also when the adapter has been trained before
        if isinstance(model, PeftModel):
            model.delete_adapter("ref")

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Nothing: the rows bring them."""
        return dataset


@dataclasses.dataclass(frozen=True, slots=True)
class _Method:
    """How an objective is spelled in TRL."""

    trainer: type[_OnOurTokens]
    arguments: type[Any]
    options: dict[str, Any]
    """Arguments of its own, beside those that all trainers share."""
    to_row: Callable[[Example, int], Row]
    """One pair of an example, by its index, as the trainer's collator takes it."""


def _method(objective: AnyObjective) -> _Method:
    """Raises UserError naming a setting that TRL's trainer does not have."""
    keep_dropout = {"disable_dropout": False}
    match objective:
        case Orpo():
            _check_nll_on(objective, "full", "ORPOTrainer")
            return _Method(_Orpo, ORPOConfig, {"beta": objective.beta, **keep_dropout}, _to_sides)
        case Sft():
            to_row = _to_labels if objective.nll_on == "full" else _to_completion_labels
            return _Method(_Sft, SFTConfig, {}, to_row)
        case Dpo() | Ipo():
            loss_type = "sigmoid" if isinstance(objective, Dpo) else "ipo"
            options = {"beta": objective.beta, "loss_type": loss_type, **keep_dropout}
            return _Method(_Dpo, DPOConfig, options, _to_prompt_and_completions)
        case SimPo():
            options = {"beta": objective.beta, "loss_type": "simpo", "simpo_gamma": objective.gamma, "cpo_alpha": 0.0}
            return _Method(_Cpo, CPOConfig, {**options, **keep_dropout}, _to_sides)
        case Cpo():
            _check_nll_on(objective, "completion", "CPOTrainer")
            options = {"beta": objective.beta, "cpo_alpha": objective.nll_weight}
            return _Method(_Cpo, CPOConfig, {**options, **keep_dropout}, _to_sides)
        case _:
            assert_never(objective)


def _check_nll_on(objective: Orpo | Cpo, only: NllOn, trainer: str) -> None:
    if objective.nll_on != only:
        raise UserError(
            f"train.trainer.objective.nll_on: got {objective.nll_on}; TRL's {trainer} has the likelihood of {only} only"
        )


def _to_sides(example: Example, pair: int) -> Row:
    """For DPODataCollatorWithPadding, which ORPOTrainer and CPOTrainer use: whole sequences, no labels on prompts."""
    row: Row = {}
    for side, index in zip(("chosen", "rejected"), example.pairs[pair], strict=True):
        completion = example.completions[index]
        row[f"{side}_input_ids"] = example.prompt_ids + completion
        row[f"{side}_attention_mask"] = [1] * (len(example.prompt_ids) + len(completion))
        row[f"{side}_labels"] = [IGNORED] * len(example.prompt_ids) + completion
    return row


def _to_prompt_and_completions(example: Example, pair: int) -> Row:
    """For DataCollatorForPreference, which DPOTrainer uses: prompt and completions apart, the reference if known."""
    row: Row = {"prompt_ids": example.prompt_ids}
    for side, index in zip(("chosen", "rejected"), example.pairs[pair], strict=True):
        row[f"{side}_ids"] = example.completions[index]
        if example.reference_logps is not None:
            row[f"ref_{side}_logps"] = example.reference_logps[index]
    return row


def _to_labels(example: Example, pair: int) -> Row:
    """For DataCollatorForLanguageModeling, which SFTTrainer uses: the chosen sequence, all of it labelled."""
    ids = example.prompt_ids + example.completions[example.pairs[pair][0]]
    return {"input_ids": ids, "labels": ids}


def _to_completion_labels(example: Example, pair: int) -> Row:
    """The same, the prompt left unlabelled."""
    prompt = len(example.prompt_ids)
    ids = _to_labels(example, pair)["input_ids"]
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


class _Rows(Dataset[Row]):
    """Examples pair by pair; those of one record follow each other."""

    def __init__(self, examples: Examples, to_row: Callable[[Example, int], Row]) -> None:
        """Reads every example once, to know how many pairs it has."""
        self._examples, self._to_row = examples, to_row
        self._ends = list(accumulate(len(examples[index].pairs) for index in range(len(examples))))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> Row:
        record = bisect_right(self._ends, row)
        return self._to_row(self._examples[record], row - self._start(record))

    def order(self, rng: random.Random) -> list[int]:
        """Rows in the order of their records."""
        records = self._examples.order(rng)
        return [row for record in records for row in range(self._start(record), self._ends[record])]

    def _start(self, record: int) -> int:
        return self._ends[record - 1] if record else 0


class _Order(Sampler[int]):
    """The records in the order in which our own trainer sees them."""

    def __init__(self, rows: _Rows, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Told by Hugging Face's trainer."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows.order(random.Random(f"{self._seed}:{self._epoch}")))
