"""Train a student on pairs that share their prompt's forward pass, on one worker or many."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from mint_ray.config.loader import UserError
from mint_ray.layouts import Batch, Example, Layout, chosen_only
from mint_ray.layouts.choice import choose_layout
from mint_ray.layouts.shared_prefix import SharedPrefixLayout
from mint_ray.objectives import Answers, Objective, build_objective
from mint_ray.objectives.losses import log_odds_ratio
from mint_ray.trainers import TrainResult
from mint_ray.trainers.arguments import training_arguments
from mint_ray.trainers.checkpoints import WholeCheckpoints
from mint_ray.trainers.config import Arguments, TrainResources
from mint_ray.trainers.examples import Examples
from mint_ray.trainers.kernels import compile_layers, set_kernels

FILLER = -1
"""Index of an example without pairs, for a worker that has no record left in a step that all must take."""


class SharedPrefixTrainer:
    """The live trainer of `Arguments` with kind `shared_prefix`."""

    def __init__(self, config: Arguments) -> None:
        self.config = config

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
        config, objective = self.config, build_objective(self.config.objective)
        if objective.uses_reference and train[0].reference_logps is None:
            raise UserError(f"train.trainer.objective: {config.objective.kind} needs reference log-probabilities")
        args = training_arguments(
            TrainingArguments,
            config,
            resources,
            output_dir=output_dir,
            validate=bool(len(validation)),
            world_size=_world_size(),
            run_name=run_name,
        )
        # ZeRO-3 scatters weights that may not fit one device: no forward pass before the engine has the model
        set_kernels(model, resources)
        layout: Layout = SharedPrefixLayout(row_tokens=resources.row_tokens)
        if resources.zero_stage != 3:
            layout = choose_layout(model.to(args.device), [train[0]], row_tokens=resources.row_tokens)
        compile_layers(model, resources)
        stopping = EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience)
        trainer = PairTrainer(
            objective,
            layout,
            records_per_step=config.train_batch_size,
            model=model,
            args=args,
            processing_class=tokenizer,
            train=train,
            validation=validation,
            callbacks=[*callbacks, *([stopping] if len(validation) else [])],
        )
        # it prints every row of the log; callers bring callbacks of their own
        trainer.remove_callback(PrinterCallback)
        # autocast does it; PEFT would take every input to float32 first, for autocast to take back
        with disable_input_dtype_casting(model, active=config.bf16):
            trainer.train(resume_from_checkpoint=str(resume_from_checkpoint) if resume_from_checkpoint else None)
        state = trainer.state
        return TrainResult(
            log_history=list(state.log_history),
            best_metric=state.best_metric,
            best_step=state.best_global_step,
            global_step=state.global_step,
            train_tokens=int(state.num_input_tokens_seen),
            layout=layout.name,
        )


class PairTrainer(WholeCheckpoints):
    """Hugging Face's trainer with our batches, loss and checkpoints.

    The normalisers of the loss, tokens and pairs, count a whole optimiser step over all micro-batches and workers,
    so the gradient does not depend on how the step's records are cut up.
    """

    # compute_loss divides by the whole step, so the trainer must not divide by its micro-batches again
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        objective: Objective,
        layout: Layout,
        *,
        records_per_step: int,
        train: Examples,
        validation: Examples,
        args: TrainingArguments,
        **arguments: Any,
    ) -> None:
        self._objective = objective
        self._layout = layout
        self._train, self._validation = train, validation
        self._records_per_step = records_per_step
        self._train_sums = _Sums(objective)
        self._eval_sums = _Sums(objective)
        # the trainer asks for data sets to be there, and reads them through the two loaders below
        super().__init__(
            args=args,
            train_dataset=_Rows(train, None),
            eval_dataset=_Rows(validation, None) if len(validation) else None,
            **arguments,
        )

    def get_train_dataloader(self) -> DataLoader[Example]:
        """This worker's micro-batches of every step of an epoch."""
        steps = math.ceil(len(self._train) / self._records_per_step)
        share = _Share(
            lambda: self._train.order(random.Random(f"{self.args.seed}:{int(self.state.global_step) // steps}")),
            len(self._train),
            self._records_per_step,
            self.args.per_device_train_batch_size,
            self.args.process_index,
            self.args.world_size,
        )
        shown = None if self._objective.uses_rejected else chosen_only
        return DataLoader(_Rows(self._train, shown), batch_sampler=share, collate_fn=self._lay_out)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Example]:
        """This worker's share of the validation, both answers of each pair whatever the objective looks at."""
        size = self.args.per_device_eval_batch_size
        share = _Share(
            lambda: list(range(len(self._validation))),
            len(self._validation),
            size * self.args.world_size,
            size,
            self.args.process_index,
            self.args.world_size,
        )
        return DataLoader(_Rows(self._validation, None), batch_sampler=share, collate_fn=self._lay_out)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one optimiser step, and [tokens, pairs] of that step over all workers."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counts = torch.stack(
            [torch.stack([batch["nll_tokens"], batch["pairs"], batch["row_tokens"]]) for batch in batches]
        ).sum(0)
        counts = self.accelerator.reduce(counts.to(device), reduction="sum")
        self.state.num_input_tokens_seen += int(counts[2])
        return batches, counts[:2]

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """This micro-batch's share of the step's loss, times the number of workers: their gradients are averaged."""
        if num_items_in_batch is None:
            raise ValueError("the trainer was not told the normalisers of the step")
        nll_sum, losses_P = self._forward(model, inputs, self._train_sums)
        tokens, pairs = num_items_in_batch.clamp(min=1)
        loss: Tensor = self._objective.nll_weight * nll_sum / tokens + losses_P.sum() / pairs
        return loss * float(self.args.world_size)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Add one batch to the sums of the validation; nothing is gathered before its end."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            self._forward(model, inputs, self._eval_sums)
        return None, None, None

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **named: Any) -> EvalLoopOutput:
        """The loss and metrics over the whole validation set, whatever its batches."""
        self._eval_sums = _Sums(self._objective)
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **named)
        metrics = self._eval_sums.read(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; rows of training get loss and metrics over all steps since the last one, cut off in between or not."""
        if "loss" in logs:
            logs.update(self._train_sums.read(self.accelerator))
            self._train_sums = _Sums(self._objective)
        super().log(logs, start_time)

    def _lay_out(self, examples: list[Example]) -> Batch:
        full = self._objective.nll_weight > 0 and self._objective.nll_on == "full"
        return self._layout.lay_out(examples, score_prompt=full)

    def _forward(self, model: nn.Module, batch: Batch, sums: _Sums) -> tuple[Tensor, Tensor]:
        logps = self._layout.run(model, batch)
        sums_C = logps.sums_C
        sides = [
            Answers(
                sums_P=sums_C[index_P],
                counts_P=logps.counts_C[index_P],
                reference_sums_P=batch["reference_C"][index_P] if "reference_C" in batch else None,
            )
            for index_P in (batch["chosen_P"], batch["rejected_P"])
        ]
        nll_sum = -sides[0].sums_P.sum() - logps.prompt_sums_B[batch["record_P"]].sum()
        losses_P = self._objective.pair_losses(*sides)
        sums.add(nll_sum, batch["nll_tokens"], losses_P, *sides)
        return nll_sum, losses_P

    def extra_state(self) -> Any:
        """The sums since the last log."""
        return self._train_sums.gather(self.accelerator)

    def load_extra_state(self, state: Any) -> None:
        """Go on from those sums, on the first worker: they are of all workers."""
        if self.args.should_save:
            self._train_sums.put(state, self.args.device)


class _Sums:
    """Sums behind TRL's metrics over a stretch of batches, kept on the device and added up over workers when read."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._sums: Tensor | None = None

    def add(self, nll_sum: Tensor, nll_tokens: Tensor, losses_P: Tensor, chosen: Answers, rejected: Answers) -> None:
        with torch.no_grad():
            chosen_rewards_P, rejected_rewards_P = self._objective.rewards(chosen), self._objective.rewards(rejected)
            new = torch.stack(
                [
                    nll_sum,
                    nll_tokens.to(nll_sum.dtype),
                    torch.ones_like(chosen.sums_P).sum(),
                    losses_P.sum(),
                    chosen_rewards_P.sum(),
                    rejected_rewards_P.sum(),
                    (chosen_rewards_P > rejected_rewards_P).float().sum(),
                    chosen.means_P.sum(),
                    rejected.means_P.sum(),
                    logsigmoid(log_odds_ratio(chosen.means_P, rejected.means_P)).sum(),
                ]
            ).double()
        self._sums = new if self._sums is None else self._sums + new

    def gather(self, accelerator: Any) -> list[float] | None:
        """The sums over all workers; every worker must call, and gets the same."""
        if self._sums is None:
            return None
        gathered: list[float] = accelerator.reduce(self._sums, reduction="sum").tolist()
        return gathered

    def put(self, values: list[float] | None, device: torch.device) -> None:
        """Go on from what `gather` gave; on one worker only."""
        self._sums = None if values is None else torch.tensor(values, dtype=torch.float64, device=device)

    def read(self, accelerator: Any) -> dict[str, float]:
        """Metrics under TRL's names, and `loss`; every worker must call, and gets the same."""
        values = self.gather(accelerator)
        if values is None or not values[2]:
            return {}
        nll, tokens, pairs, losses, *sides = values
        nll_loss = nll / tokens
        chosen_reward, rejected_reward, right, chosen, rejected, log_odds = (value / pairs for value in sides)
        return {
            "loss": self._objective.nll_weight * nll_loss + losses / pairs,
            "nll_loss": nll_loss,
            "log_odds_ratio": log_odds,
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
            "rewards/margins": chosen_reward - rejected_reward,
            "rewards/accuracies": right,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }


class _Rows(Dataset[Example]):
    """Examples by index, and the filler."""

    def __init__(self, examples: Examples, shown: Callable[[Example], Example] | None) -> None:
        self._examples, self._shown = examples, shown

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        if index == FILLER:
            first = self._examples[0]
            # an image needs its place, and weights that look at it their share of every step
            prompt_ids = first.prompt_ids if first.image else first.prompt_ids[:1]
            return Example(
                record_id="", prompt_ids=prompt_ids, completions=[first.completions[0][:1]], pairs=[], image=first.image
            )
        example = self._examples[index]
        return self._shown(example) if self._shown else example


class _Share(Sampler[list[int]]):
    """One worker's micro-batches: of each step's records every `world_size`-th, `size` at a time.

    All workers get equally many, and each step takes equally many, for they meet in every one.
    """

    def __init__(
        self, order: Callable[[], list[int]], records: int, records_per_step: int, size: int, rank: int, world_size: int
    ) -> None:
        self._order, self._records, self._per_step = order, records, records_per_step
        self._size, self._rank, self._world_size = size, rank, world_size
        self._per_share = math.ceil(math.ceil(records_per_step / world_size) / size)

    def __len__(self) -> int:
        return math.ceil(self._records / self._per_step) * self._per_share

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for start in range(0, len(order), self._per_step):
            mine = order[start : start + self._per_step][self._rank :: self._world_size]
            for index in range(self._per_share):
                yield mine[index * self._size : (index + 1) * self._size] or [FILLER]


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
