"""Checkpoints that hold everything whole, and load on any number of workers, with DeepSpeed or without.

ZeRO keeps weights and moments in parts, one per worker, that load at no other number of workers. Here every trained
weight and its two AdamW moments go through rank 0, one at a time, into safetensors files that name them in full;
loading sends each from rank 0 to all, and every worker keeps its part. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState

TRAINER_STATE, POSITION = "trainer_state.json", "position.json"
STATE, BEST = "state", "best"
"""Parts of a checkpoint: Hugging Face's log and step; what else the next step depends on; weights with moments; the
weights that validated best so far."""
MOMENTS = ("exp_avg", "exp_avg_sq")
FILE_BYTES = 2 << 30
"""A file is closed once it holds this much, which bounds what rank 0 keeps in memory."""


class WholeCheckpoints(transformers.Trainer):
    """Hugging Face's trainer, saving `checkpoint-<step>` whole on rank 0 and resuming on any number of workers.

    To resume, rank 0 needs the folder, the others its `trainer_state.json`.
    """

    _resumed: dict[str, Any] | None = None

    def extra_state(self) -> Any:
        """What a trainer wants kept beside, as plain data; every worker is asked, rank 0's answer is saved."""
        return None

    def load_extra_state(self, state: Any) -> None:
        """Take back what `extra_state` gave; every worker gets it."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        best = Path(self.args.output_dir) / BEST
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        trained = self._trained_state()
        trained.save(folder / STATE, moments=True)
        if self.state.best_global_step == self.state.global_step:
            if self.args.should_save:
                shutil.rmtree(best, ignore_errors=True)
            trained.save(best, moments=False)
            self.state.best_model_checkpoint = str(best)
        position = {"adam_step": trained.step, "extra": self.extra_state(), "rng": _rng_states()}
        if not self.args.should_save:
            return
        if best.exists():
            shutil.copytree(best, folder / BEST, copy_function=os.link)
        (folder / POSITION).write_text(json.dumps(position))
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / TRAINER_STATE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: weights are loaded together with their moments, once the optimiser is there."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is None:
            return prepared
        folder, best = Path(resume_from_checkpoint), Path(self.args.output_dir) / BEST
        position = _from_first(json.loads((folder / POSITION).read_text()) if self.args.should_save else None)
        self._trained_state().load(folder / STATE, step=position["adam_step"])
        if self.args.should_save and (folder / BEST).exists():
            shutil.copytree(folder / BEST, best)
        if self.state.best_global_step is not None:
            self.state.best_model_checkpoint = str(best)
        # every schedule is a function of the step; its own state would count groups that DeepSpeed leaves out
        self.lr_scheduler.last_epoch = self.state.global_step - 1
        with warnings.catch_warnings(category=UserWarning, action="ignore"):
            self.lr_scheduler.step()
        self.load_extra_state(position["extra"])
        self._resumed = position
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed is not None:
            _restore_rng(self._resumed["rng"])

    def _load_best_model(self) -> None:
        self._trained_state().load(Path(self.args.output_dir) / BEST, step=None)

    def _trained_state(self) -> TrainedState:
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        return TrainedState(self.accelerator.unwrap_model(self.model), self.optimizer, engine)


class TrainedState:
    """The trained weights of a model and the moments of its AdamW, whatever holds them."""

    def __init__(self, model: nn.Module, optimizer: Any, engine: Any | None) -> None:
        """`model` is unwrapped, `optimizer` the one the trainer steps, `engine` DeepSpeed's if there is one."""
        self._parameters = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        stepped = engine.optimizer if engine is not None else getattr(optimizer, "optimizer", optimizer)
        self._copies = _whole_copies(stepped, [weight for _, weight in self._parameters])
        self._zero = stepped if self._copies is None else None
        self._adam = getattr(stepped, "optimizer", stepped)
        self._is_first = _rank() == 0

    @property
    def step(self) -> int:
        """How often AdamW believes to have stepped: some engines begin with a step that changes nothing."""
        return max(int(state["step"]) for state in self._adam.state.values() if "step" in state)

    def save(self, folder: Path, *, moments: bool) -> None:
        """Write the weights, and the moments if asked for, into `folder` on rank 0. Every worker must call."""
        kinds: tuple[str | None, ...] = (None, *MOMENTS) if moments else (None,)
        held: dict[str, Tensor] = {}
        size = files = 0
        for name, weight in self._parameters:
            for kind in kinds:
                tensor = self._read(weight, kind)
                if not self._is_first:
                    continue
                held[_key(name, kind)] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
                size += tensor.numel() * 4
                if size >= FILE_BYTES:
                    _write(folder, files, held)
                    held, size, files = {}, 0, files + 1
        if self._is_first and (held or not files):
            _write(folder, files, held)

    def load(self, folder: Path, *, step: int | None) -> None:
        """Take weights from `folder`, and the moments after `step` optimiser steps; None leaves moments alone.

        Only rank 0 reads files; every worker must call. Raises ValueError if a weight is missing or has another shape.
        """
        if step is not None:
            self._make_moments(step)
        kinds: tuple[str | None, ...] = (None,) if step is None else (None, *MOMENTS)
        stored = _Stored(folder) if self._is_first else None
        for name, weight in self._parameters:
            shape = torch.Size(getattr(weight, "ds_shape", weight.shape))
            for kind in kinds:
                value = torch.empty(shape, dtype=torch.float32, device=weight.device)
                if stored is not None:
                    value.copy_(stored.read(_key(name, kind), shape))
                if _world_size() > 1:
                    torch.distributed.broadcast(value, 0)
                self._write(weight, kind, value)

    def _read(self, weight: nn.Parameter, kind: str | None) -> Tensor:
        if self._copies is not None:
            copy = self._copies[weight]
            return copy.detach() if kind is None else cast(Tensor, self._adam.state[copy][kind])
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole: Any = safe_get_full_fp32_param(weight) if kind is None else safe_get_full_optimizer_state(weight, kind)
        return cast(Tensor, whole.reshape(getattr(weight, "ds_shape", weight.shape)))

    def _write(self, weight: nn.Parameter, kind: str | None, value: Tensor) -> None:
        if self._copies is not None:
            copy = self._copies[weight]
            (copy.data if kind is None else self._adam.state[copy][kind]).copy_(value)
            if kind is None:
                weight.data.copy_(value)
        elif hasattr(weight, "ds_id"):
            self._write_part(weight, kind, value)
        else:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            if kind is None:
                weight.data.copy_(value)
                safe_set_full_fp32_param(weight, value)
            else:
                safe_set_full_optimizer_state(weight, value, kind)

    def _write_part(self, weight: Any, kind: str | None, value: Tensor) -> None:
        """ZeRO-3: this worker's part; the last one is padded."""
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if kind is None:
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                weight.data.copy_(value)
        part = weight.ds_tensor.numel()
        flat = torch.nn.functional.pad(value.flatten(), (0, part * _world_size() - value.numel()))
        mine = flat.narrow(0, part * _rank(), part)
        if kind is None:
            safe_set_local_fp32_param(weight, mine)
        else:
            safe_set_local_optimizer_state(weight, mine, kind)

    def _make_moments(self, step: int) -> None:
        """AdamW makes its moments in its first step; make them before it, as if `step` steps had been taken."""
        for flat in _flat_weights(self._zero) if self._copies is None else self._copies.values():
            self._adam.state[flat] = {
                # where torch keeps it: fused AdamW beside the weight, otherwise on the CPU
                "step": torch.tensor(float(step), device=flat.device if self._adam.defaults.get("fused") else "cpu"),
                **{kind: torch.zeros_like(flat, memory_format=torch.preserve_format) for kind in MOMENTS},
            }
        link = getattr(self._zero, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()


def _whole_copies(stepped: Any, weights: list[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter] | None:
    """For each weight what AdamW steps on: itself, or DeepSpeed's float32 copy; None where ZeRO holds flat parts."""
    if not hasattr(stepped, "optimizer"):
        return {weight: weight for weight in weights}
    if not hasattr(stepped, "fp32_groups"):  # stage 0 in bfloat16 has them
        return None
    groups = zip(stepped.fp16_groups, stepped.fp32_groups, strict=True)
    return {weight: copy for group in groups for weight, copy in zip(*group, strict=True)}


def _flat_weights(zero: Any) -> list[Tensor]:
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # ZeRO-3; ZeRO-1 and 2
        if hasattr(zero, name):
            return list(getattr(zero, name))
    raise TypeError(f"{type(zero).__name__}: DeepSpeed keeps its float32 weights in no place that is known")


class _Stored:
    """Tensors by name over the files of one folder."""

    def __init__(self, folder: Path) -> None:
        files: list[Any] = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self._where = {key: file for file in files for key in file.keys()}  # noqa: SIM118

    def read(self, key: str, shape: torch.Size) -> Tensor:
        if key not in self._where:
            raise ValueError(f"checkpoint: no {key}; it belongs to another student")
        tensor: Tensor = self._where[key].get_tensor(key)
        if tensor.shape != shape:
            raise ValueError(f"checkpoint: {key} has shape {tuple(tensor.shape)}, the student {tuple(shape)}")
        return tensor


def _key(name: str, kind: str | None) -> str:
    return f"{kind or 'weight'}:{name}"


def _write(folder: Path, number: int, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"part-{number:05d}.safetensors")


def _rng_states() -> list[dict[str, list[int]]]:
    """Torch's random number generators of every worker, in order of rank; nothing else is drawn from in training."""
    mine = {"cpu": torch.get_rng_state().tolist()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state().tolist()
    if _world_size() == 1:
        return [mine]
    found: list[Any] = [None] * _world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


def _restore_rng(states: list[dict[str, list[int]]]) -> None:
    """Put this worker's generators back; at another number of workers they go on from their seed."""
    if len(states) != _world_size():
        return
    mine = {name: torch.tensor(values, dtype=torch.uint8) for name, values in states[_rank()].items()}
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine and torch.cuda.is_available():
        torch.cuda.set_rng_state(mine["cuda"])


def _from_first(value: Any) -> Any:
    """Rank 0's value, on every worker."""
    if _world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, 0)
    return box[0]


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
