"""Train a student by ORPO on pairs that share their prompt's forward pass, on one worker or many."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.data import Dataset, Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from mint_ray.layouts import Batch, Example, Layout
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.shared_prefix import SharedPrefixLayout
from mint_ray.loading import UserError
from mint_ray.objectives import log_odds_ratio, odds_ratio_losses, orpo_loss
from mint_ray.records import PreferencePair
from mint_ray.trainers import TrainResult
from mint_ray.trainers.config import SharedPrefix
from mint_ray.trainers.deepspeed import deepspeed_config
from mint_ray.trainers.tokenization import tokenize_pairs

logger = logging.getLogger(__name__)

SAME_LOGPS = 1e-3
"""Two layouts agree if no float32 token log-probability differs by more; a lost mask or position moves some by 0.1."""


class SharedPrefixTrainer:
    """The live trainer of `SharedPrefix`."""

    def __init__(self, config: SharedPrefix) -> None:
        self.config = config

    def tokenize(
        self, rows: list[PreferencePair], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[Example], dict[str, int]]:
        """See `tokenize_pairs`."""
        return tokenize_pairs(rows, tokenizer, self.config.max_length)

    def run(self, **arguments: Any) -> TrainResult:
        """See `run_training`."""
        return run_training(self.config, **arguments)


def run_training(
    config: SharedPrefix,
    *,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Example],
    validation: list[Example],
    output_dir: Path,
    per_device_train_batch_size: int,
    per_device_eval_batch_size: int,
    num_workers: int,
    callbacks: list[TrainerCallback],
    resume_from_checkpoint: str | None,
) -> TrainResult:
    """Train `model` in place, alone or as one of `num_workers` processes of a torch.distributed group.

    Validates, saves `checkpoint-<step>` folders in `output_dir` and stops early as `config` says, and leaves the best
    weights in `model`; without validation the last. Raises UserError if there is nothing to train on, or if
    `train_batch_size` is no multiple of `per_device_train_batch_size` times `num_workers`.
    """
    if not train:
        raise UserError("no pairs to train on")
    accumulation, rest = divmod(config.train_batch_size, per_device_train_batch_size * num_workers)
    if rest or not accumulation:
        raise UserError(
            f"train_batch_size: got {config.train_batch_size}, no multiple of per_device_train_batch_size "
            f"{per_device_train_batch_size} times {num_workers} workers"
        )
    args = TrainingArguments(
        output_dir=str(output_dir),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=per_device_train_batch_size,
        per_device_eval_batch_size=per_device_eval_batch_size,
        gradient_accumulation_steps=accumulation,
        eval_strategy="steps" if validation else "no",
        eval_steps=config.eval_steps if validation else None,
        save_strategy="steps",
        save_steps=config.eval_steps,
        save_total_limit=2,
        save_only_model=False,
        load_best_model_at_end=bool(validation),
        metric_for_best_model=config.metric_for_best_model if validation else None,
        restore_callback_states_from_checkpoint=True,
        logging_steps=config.logging_steps,
        # a NaN must be seen, not smoothed over
        logging_nan_inf_filter=False,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        seed=config.seed,
        deepspeed=deepspeed_config(config),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    if args.world_size != num_workers:
        raise ValueError(f"num_workers is {num_workers}, the process group has {args.world_size}")
    # ZeRO-3 may have scattered the weights already: no forward pass before the engine has the model
    layout: Layout = SharedPrefixLayout()
    if config.zero_stage != 3:
        layout = choose_layout(model.to(args.device), train[:1])
    trainer = PairTrainer(
        config,
        layout,
        model=model,
        args=args,
        processing_class=tokenizer,
        train=train,
        validation=validation,
        callbacks=[
            *callbacks,
            *([EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience)] if validation else []),
        ],
    )
    # it prints every row of the log; callers bring callbacks of their own
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    state = trainer.state
    return TrainResult(
        log_history=list(state.log_history),
        best_metric=state.best_metric,
        best_step=state.best_global_step,
        global_step=state.global_step,
        train_tokens=int(state.num_input_tokens_seen),
    )


def choose_layout(model: nn.Module, examples: list[Example]) -> Layout:
    """The shared prefix if `model` gives the same token log-probabilities with it, otherwise the concatenated layout.

    A model with position or attention rules of its own gives others, or refuses the arguments. Runs both once.
    """
    shared, plain = SharedPrefixLayout(), ConcatenatedLayout()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logps = []
    try:
        with torch.no_grad():
            for layout in (plain, shared):
                batch = layout.lay_out(examples, score_prompt=True)
                logps.append(layout.run(model, {name: tensor.to(device) for name, tensor in batch.items()}))
    except (TypeError, UserError) as error:
        if not logps:
            raise
        logger.warning("layout: concatenated, for the model does not take a shared prefix: %s", error)
        return plain
    finally:
        model.train(was_training)
    difference = float((logps[0].token_logps_N - logps[1].token_logps_N).abs().max())
    # half precision rounds differently in rows of another shape
    tolerance = SAME_LOGPS if next(model.parameters()).dtype == torch.float32 else 0.3
    if not difference <= tolerance:
        logger.warning(
            "layout: concatenated, for token log-probabilities differ by %.2g in a shared prefix", difference
        )
        return plain
    logger.info("layout: shared_prefix, token log-probabilities agree within %.2g", difference)
    return shared


class PairTrainer(transformers.Trainer):
    """Hugging Face's trainer with our batches and loss.

    The normalisers of the loss, tokens and pairs, count a whole optimiser step over all micro-batches and workers,
    so the gradient does not depend on how the step's records are cut up.
    """

    # compute_loss divides by the whole step, so the trainer must not divide by its micro-batches again
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        config: SharedPrefix,
        layout: Layout,
        *,
        train: list[Example],
        validation: list[Example],
        args: TrainingArguments,
        **arguments: Any,
    ) -> None:
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        train_rows = _Filled(train, step)
        super().__init__(
            args=args,
            data_collator=lambda examples: layout.lay_out(examples, score_prompt=config.nll_on == "full"),
            train_dataset=train_rows,
            eval_dataset=(
                _Filled(validation, args.per_device_eval_batch_size * args.world_size) if validation else None
            ),
            **arguments,
        )
        self._config = config
        self._layout = layout
        self._order = _Order(
            len(train), len(train_rows), args.seed, lambda: int(self.state.global_step) // (len(train_rows) // step)
        )
        self._train_sums = _Sums(config.beta)
        self._eval_sums = _Sums(config.beta)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

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
        tokens, pairs = num_items_in_batch
        loss = orpo_loss(nll_sum, tokens, losses_P, pairs, self._config.beta)
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
        self._eval_sums = _Sums(self._config.beta)
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **named)
        metrics = self._eval_sums.read(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; rows of training get the metrics over all steps since the last one."""
        if "loss" in logs:
            metrics = self._train_sums.read(self.accelerator)
            self._train_sums = _Sums(self._config.beta)
            logs.update({name: value for name, value in metrics.items() if name != "loss"})
        super().log(logs, start_time)

    def _forward(self, model: nn.Module, batch: Batch, sums: _Sums) -> tuple[Tensor, Tensor]:
        logps = self._layout.run(model, batch)
        means_C = logps.means_C
        chosen_P, rejected_P = means_C[batch["chosen_P"]], means_C[batch["rejected_P"]]
        nll_sum = -logps.sums_C[batch["chosen_P"]].sum() - logps.prompt_sums_B[batch["record_P"]].sum()
        sums.add(nll_sum.detach(), batch["nll_tokens"], chosen_P.detach(), rejected_P.detach())
        return nll_sum, odds_ratio_losses(chosen_P, rejected_P)


class _Sums:
    """Sums behind TRL's metrics over a stretch of batches, kept on the device and added up over workers when read."""

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._sums: Tensor | None = None

    def add(self, nll_sum: Tensor, nll_tokens: Tensor, chosen_P: Tensor, rejected_P: Tensor) -> None:
        new = torch.stack(
            [
                nll_sum,
                nll_tokens.to(nll_sum.dtype),
                torch.ones_like(chosen_P).sum(),
                chosen_P.sum(),
                rejected_P.sum(),
                logsigmoid(log_odds_ratio(chosen_P, rejected_P)).sum(),
                (chosen_P > rejected_P).float().sum(),
            ]
        ).double()
        self._sums = new if self._sums is None else self._sums + new

    def read(self, accelerator: Any) -> dict[str, float]:
        """Metrics under TRL's names, and `loss`; every worker must call, and gets the same."""
        if self._sums is None:
            return {}
        nll, tokens, pairs, chosen, rejected, log_odds, right = accelerator.reduce(self._sums, reduction="sum").tolist()
        if not pairs:
            return {}
        nll_loss = nll / tokens
        return {
            "loss": nll_loss - self._beta * log_odds / pairs,
            "nll_loss": nll_loss,
            "log_odds_ratio": log_odds / pairs,
            "rewards/chosen": self._beta * chosen / pairs,
            "rewards/rejected": self._beta * rejected / pairs,
            "rewards/margins": self._beta * (chosen - rejected) / pairs,
            "rewards/accuracies": right / pairs,
            "logps/chosen": chosen / pairs,
            "logps/rejected": rejected / pairs,
        }


class _Filled(Dataset[Example]):
    """Examples and, up to a multiple of `step`, fillers without pairs.

    Every worker then gets full batches; otherwise accelerate would repeat records to even the workers out.
    """

    def __init__(self, examples: list[Example], step: int) -> None:
        self._examples = examples
        self._length = math.ceil(len(examples) / step) * step
        first = examples[0]
        self._filler = Example(
            record_id="", prompt_ids=first.prompt_ids[:1], completions=[first.completions[0][:1]], pairs=[]
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return self._examples[index] if index < len(self._examples) else self._filler


class _Order(Sampler[int]):
    """A new order of the records in each epoch, the same on every worker and after resuming; fillers come last."""

    def __init__(self, records: int, length: int, seed: int, epoch: Callable[[], int]) -> None:
        self._records = records
        self._length = length
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch())
        yield from torch.randperm(self._records, generator=generator).tolist()
        yield from range(self._records, self._length)
