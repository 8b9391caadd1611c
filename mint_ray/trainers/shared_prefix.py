"""The trainer that runs the prompt of a record once for all its completions, on one worker or many."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from mint_ray.config.loader import UserError
from mint_ray.layouts import Batch, Example, Layout, chosen_only
from mint_ray.layouts.choice import choose_layout
from mint_ray.layouts.shared_prefix import SharedPrefixLayout
from mint_ray.objectives import CompletionLogps, Objective, build_objective, chosen_and_rejected, nll_sum
from mint_ray.objectives.losses import log_odds_ratio
from mint_ray.trainers import TrainingRun, TrainResult
from mint_ray.trainers.checkpoints import UnshardedCheckpointTrainer
from mint_ray.trainers.config import TrainerArguments
from mint_ray.trainers.examples import Examples
from mint_ray.trainers.huggingface import check_examples, run_training, trainer_callbacks, training_arguments
from mint_ray.trainers.kernels import compile_layers, set_attention_kernel

PLACEHOLDER = -1
"""Index of an example without pairs, for a worker without a record in a step that all workers must take."""


class SharedPrefixTrainer:
    """The trainer of `TrainerArguments` with kind `shared_prefix`."""

    def __init__(self, config: TrainerArguments) -> None:
        self.config = config

    def train(self, run: TrainingRun) -> TrainResult:
        """Train, validate, save and stop early as configured; see `Trainer.train`."""
        check_examples(run)
        config, resources, objective = self.config, run.resources, build_objective(self.config.objective)
        if objective.uses_reference and run.train.read(0).reference_logps is None:
            raise UserError(f"train.trainer.objective: {config.objective.kind} needs reference log-probabilities")
        args = training_arguments(TrainingArguments, config, run)
        set_attention_kernel(run.model, resources)
        layout: Layout = SharedPrefixLayout(max_tokens_per_row=resources.max_tokens_per_row)
        # weights that ZeRO-3 shards may not fit on one device: no forward pass before the engine is initialized
        if resources.zero_stage != 3:
            model = run.model.to(args.device)
            layout = choose_layout(model, [run.train[0]], max_tokens_per_row=resources.max_tokens_per_row)
        compile_layers(run.model, resources)
        trainer = PairTrainer(
            objective,
            layout,
            records_per_step=config.train_batch_size,
            model=run.model,
            args=args,
            processing_class=run.tokenizer,
            train=run.train,
            validation=run.validation,
            callbacks=trainer_callbacks(config, run),
        )
        # autocast casts the inputs; PEFT would first cast each of them to float32
        with disable_input_dtype_casting(run.model, active=config.bf16):
            return run_training(trainer, run, layout.name)


class PairTrainer(UnshardedCheckpointTrainer):
    """Hugging Face's trainer with our batches, loss and checkpoints.

    The normalizers of the loss, tokens and pairs, are counted over all micro-batches and workers of an optimizer step,
    so the gradient does not depend on how the records of the step are divided. While a step runs, threads decode the
    images of the next one.
    """

    # compute_loss divides by the normalizers of the step; the trainer must not divide by the micro-batches again
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
        """Create the trainer.

        Args:
            objective: Loss of the pairs.
            layout: Layout that the model supports.
            records_per_step: Records of an optimizer step, over all workers.
            train: Examples to train on.
            validation: Examples for the validation; may be empty.
            args: Arguments of Hugging Face's trainer.
            **arguments: Further arguments of `transformers.Trainer`.
        """
        self._objective = objective
        self._layout = layout
        self._train, self._validation = train, validation
        self._records_per_step = records_per_step
        self._train_sums = _MetricSums(objective)
        self._eval_sums = _MetricSums(objective)
        self._epoch: tuple[Iterator[list[Example]], Generator[Batch, None, None]] | None = None
        # transformers requires data sets; they are read through the two loaders below
        super().__init__(
            args=args,
            train_dataset=_ExampleDataset(train, None),
            eval_dataset=_ExampleDataset(validation, None) if len(validation) else None,
            **arguments,
        )

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train as `transformers.Trainer` does; all threads are stopped at the end, also after an error."""
        try:
            return super().train(*arguments, **options)
        finally:
            self._close_epoch()

    def get_train_dataloader(self) -> DataLoader[Example]:
        """Return this worker's micro-batches of an epoch, as lists of examples without images."""
        steps = math.ceil(len(self._train) / self._records_per_step)
        sampler = _WorkerBatchSampler(
            lambda: self._train.order(random.Random(f"{self.args.seed}:{int(self.state.global_step) // steps}")),
            len(self._train),
            self._records_per_step,
            self.args.per_device_train_batch_size,
            self.args.process_index,
            self.args.world_size,
        )
        transform = None if self._objective.uses_rejected else chosen_only
        return DataLoader(_ExampleDataset(self._train, transform), batch_sampler=sampler, collate_fn=list)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Example]:
        """Return this worker's batches of the validation, with both completions of each pair for every objective."""
        size = self.args.per_device_eval_batch_size
        sampler = _WorkerBatchSampler(
            lambda: list(range(len(self._validation))),
            len(self._validation),
            size * self.args.world_size,
            size,
            self.args.process_index,
            self.args.world_size,
        )
        return _CollatingLoader(
            lambda batches: self._collate(batches, self._validation, size),
            _ExampleDataset(self._validation, None),
            batch_sampler=sampler,
            collate_fn=list,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Example]], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Return the micro-batches of one optimizer step, and [tokens, pairs] of that step over all workers."""
        if self._epoch is None or self._epoch[0] is not epoch_iterator:
            self._close_epoch()
            records_per_worker = math.ceil(self._records_per_step / self.args.world_size)
            self._epoch = epoch_iterator, self._collate(epoch_iterator, self._train, records_per_worker)
        batches = [batch for _, batch in zip(range(num_batches), self._epoch[1], strict=False)]
        counts = torch.stack(
            [torch.stack([batch["nll_tokens"], batch["pairs"], batch["num_tokens"]]) for batch in batches]
        ).sum(0)
        counts = self.accelerator.reduce(counts.to(device), reduction="sum")
        self.state.num_input_tokens_seen += int(counts[2])
        return batches, counts[:2]

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Return this micro-batch's share of the step's loss, times the number of workers, which average gradients."""
        if num_items_in_batch is None:
            raise ValueError("compute_loss needs the normalizers of the step as num_items_in_batch")
        nll, losses_P = self._forward(model, inputs, self._train_sums)
        tokens, pairs = num_items_in_batch.clamp(min=1)
        loss: Tensor = self._objective.nll_weight * nll / tokens + losses_P.sum() / pairs
        return loss * float(self.args.world_size)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Add one batch to the sums of the validation, which are gathered at its end."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            self._forward(model, inputs, self._eval_sums)
        return None, None, None

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **options: Any) -> EvalLoopOutput:
        """Compute loss and metrics over the whole validation set, independent of its batches."""
        self._eval_sums = _MetricSums(self._objective)
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **options)
        metrics = self._eval_sums.read(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a row; training rows get loss and metrics over all steps since the last row, also across a resume."""
        if "loss" in logs:
            logs.update(self._train_sums.read(self.accelerator))
            self._train_sums = _MetricSums(self._objective)
        super().log(logs, start_time)

    def extra_state(self) -> Any:
        """Return the sums since the last row of the log."""
        return self._train_sums.gather(self.accelerator)

    def load_extra_state(self, state: Any) -> None:
        """Restore the sums on rank 0, because they are sums over all workers."""
        if self.args.should_save:
            self._train_sums.restore(state, self.args.device)

    def _collate(
        self, batches: Iterator[list[Example]], examples: Examples, max_ahead: int
    ) -> Generator[Batch, None, None]:
        score_prompt = self._objective.nll_weight > 0 and self._objective.nll_on == "full"
        for batch in examples.add_images(batches, max_ahead=max_ahead):
            yield self._layout.collate(batch, score_prompt=score_prompt)

    def _close_epoch(self) -> None:
        if self._epoch is not None:
            self._epoch[1].close()
        self._epoch = None

    def _forward(self, model: nn.Module, batch: Batch, sums: _MetricSums) -> tuple[Tensor, Tensor]:
        logps = self._layout.compute_logps(model, batch)
        chosen, rejected = chosen_and_rejected(logps, batch)
        nll = nll_sum(chosen, logps, batch)
        losses_P = self._objective.pair_losses(chosen, rejected)
        sums.add(nll, batch["nll_tokens"], losses_P, chosen, rejected)
        return nll, losses_P


class _MetricSums:
    """The sums behind TRL's metrics over several batches, kept on the device and reduced over workers when read."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._sums: Tensor | None = None

    def add(
        self, nll: Tensor, nll_tokens: Tensor, losses_P: Tensor, chosen: CompletionLogps, rejected: CompletionLogps
    ) -> None:
        """Add one batch."""
        with torch.no_grad():
            chosen_rewards_P, rejected_rewards_P = self._objective.rewards(chosen), self._objective.rewards(rejected)
            new = torch.stack(
                [
                    nll,
                    nll_tokens.to(nll.dtype),
                    torch.ones_like(chosen.sums).sum(),
                    losses_P.sum(),
                    chosen_rewards_P.sum(),
                    rejected_rewards_P.sum(),
                    (chosen_rewards_P > rejected_rewards_P).float().sum(),
                    chosen.means.sum(),
                    rejected.means.sum(),
                    logsigmoid(log_odds_ratio(chosen.means, rejected.means)).sum(),
                ]
            ).double()
        self._sums = new if self._sums is None else self._sums + new

    def gather(self, accelerator: Any) -> list[float] | None:
        """Return the sums over all workers, the same on each. All workers must call this."""
        if self._sums is None:
            return None
        gathered: list[float] = accelerator.reduce(self._sums, reduction="sum").tolist()
        return gathered

    def restore(self, values: list[float] | None, device: torch.device) -> None:
        """Continue from the value of `gather`; on one worker only."""
        self._sums = None if values is None else torch.tensor(values, dtype=torch.float64, device=device)

    def read(self, accelerator: Any) -> dict[str, float]:
        """Return the metrics under TRL's names, and `loss`, the same on each worker. All workers must call this."""
        values = self.gather(accelerator)
        if values is None or not values[2]:
            return {}
        nll, tokens, pairs, losses, *pair_sums = values
        nll_loss = nll / tokens
        chosen_reward, rejected_reward, accuracy, chosen, rejected, log_odds = (value / pairs for value in pair_sums)
        return {
            "loss": self._objective.nll_weight * nll_loss + losses / pairs,
            "nll_loss": nll_loss,
            "log_odds_ratio": log_odds,
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
            "rewards/margins": chosen_reward - rejected_reward,
            "rewards/accuracies": accuracy,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }


class _ExampleDataset(Dataset[Example]):
    """Examples by index without their images, and the placeholder."""

    def __init__(self, examples: Examples, transform: Callable[[Example], Example] | None) -> None:
        self._examples, self._transform = examples, transform

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        if index == PLACEHOLDER:
            first = self._examples.read(0)
            # with an image, so that trained weights that process images get a gradient on every worker
            has_image = first.image_uri is not None or first.image is not None
            return Example(
                record_id=first.record_id,
                prompt_ids=first.prompt_ids if has_image else first.prompt_ids[:1],
                completions=[first.completions[0][:1]],
                pairs=[],
                image_uri=first.image_uri,
                image=first.image,
            )
        example = self._examples.read(index)
        return self._transform(example) if self._transform else example


class _CollatingLoader(DataLoader[Example]):
    """A DataLoader whose batches a generator turns into tensors."""

    def __init__(
        self,
        collate: Callable[[Iterator[list[Example]]], Generator[Batch, None, None]],
        dataset: Dataset[Example],
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self._collate = collate

    def __iter__(self) -> Any:
        return self._collate(super().__iter__())


class _WorkerBatchSampler(Sampler[list[int]]):
    """One worker's micro-batches: every `world_size`-th record of each step, `size` records at a time.

    All workers get the same number of micro-batches in each step, because they synchronize in every one.
    """

    def __init__(
        self, order: Callable[[], list[int]], records: int, records_per_step: int, size: int, rank: int, world_size: int
    ) -> None:
        self._order, self._records, self._per_step = order, records, records_per_step
        self._size, self._rank, self._world_size = size, rank, world_size
        self._batches_per_step = math.ceil(math.ceil(records_per_step / world_size) / size)

    def __len__(self) -> int:
        return math.ceil(self._records / self._per_step) * self._batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for start in range(0, len(order), self._per_step):
            own = order[start : start + self._per_step][self._rank :: self._world_size]
            for index in range(self._batches_per_step):
                yield own[index * self._size : (index + 1) * self._size] or [PLACEHOLDER]
