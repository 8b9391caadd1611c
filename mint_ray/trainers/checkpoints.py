"""Unsharded checkpoints, which load on any number of workers, with DeepSpeed or without.

DeepSpeed's own checkpoints are sharded by worker and load only on the same number of workers. Here rank 0 gathers every
trained weight and its two AdamW moments, one at a time, and writes them to safetensors files under their full names.
Loading broadcasts each from rank 0, and every worker keeps its shard. Nothing is pickled.
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

from mint_ray.trainers.distributed import broadcast, rank, world_size

TRAINER_STATE, POSITION = "trainer_state.json", "position.json"
STATE, BEST = "state", "best"
"""Parts of a checkpoint: Hugging Face's log and step; random states and step of AdamW; weights with moments; the best
weights so far."""
MOMENTS = ("exp_avg", "exp_avg_sq")
FILE_BYTES = 2 << 30
"""Size at which a new file is started; bounds the memory of rank 0."""


class UnshardedCheckpointTrainer(transformers.Trainer):
    """Hugging Face's trainer with unsharded checkpoints `checkpoint-<step>`, written by rank 0.

    It resumes on any number of workers. Rank 0 needs the complete folder, the others its `trainer_state.json`.
    """

    _resumed: dict[str, Any] | None = None

    def extra_state(self) -> Any:
        """Return further state of the trainer as JSON data. Called on every worker; rank 0's value is saved."""
        return None

    def load_extra_state(self, state: Any) -> None:
        """Restore the value of `extra_state`. Called on every worker."""

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
        """Do nothing: `_prepare_for_training` loads weights and moments together, once the optimizer exists."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is None:
            return prepared
        folder, best = Path(resume_from_checkpoint), Path(self.args.output_dir) / BEST
        position = broadcast(json.loads((folder / POSITION).read_text()) if self.args.should_save else None)
        self._trained_state().load(folder / STATE, step=position["adam_step"])
        if self.args.should_save and (folder / BEST).exists():
            shutil.copytree(folder / BEST, best)
        if self.state.best_global_step is not None:
            self.state.best_model_checkpoint = str(best)
        # every schedule is a function of the step; a saved state would include groups that DeepSpeed omits
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
    """The trained weights of a model and the moments of its AdamW, with plain torch or any DeepSpeed engine."""

    def __init__(self, model: nn.Module, optimizer: Any, engine: Any | None) -> None:
        """Find the tensors that the optimizer steps on.

        Args:
            model: The model without wrappers.
            optimizer: The optimizer that the trainer steps.
            engine: DeepSpeed's engine, if there is one.
        """
        self._parameters = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        stepped = engine.optimizer if engine is not None else getattr(optimizer, "optimizer", optimizer)
        self._copies = _stepped_weights(stepped, [weight for _, weight in self._parameters])
        self._zero = stepped if self._copies is None else None
        self._adam = getattr(stepped, "optimizer", stepped)
        self._is_rank_0 = rank() == 0

    @property
    def step(self) -> int:
        """Step count of AdamW, which can exceed the trainer's: some engines start with a step that changes nothing."""
        return max(int(state["step"]) for state in self._adam.state.values() if "step" in state)

    def save(self, folder: Path, *, moments: bool) -> None:
        """Write the weights, with `moments` also those, to `folder` on rank 0. All workers must call this."""
        kinds: tuple[str | None, ...] = (None, *MOMENTS) if moments else (None,)
        if moments:
            self._link_moments()
        tensors: dict[str, Tensor] = {}
        size = files = 0
        for name, weight in self._parameters:
            for kind in kinds:
                tensor = self._read(weight, kind)
                if not self._is_rank_0:
                    continue
                tensors[_key(name, kind)] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
                size += tensor.numel() * 4
                if size >= FILE_BYTES:
                    _write(folder, files, tensors)
                    tensors, size, files = {}, 0, files + 1
        if self._is_rank_0 and (tensors or not files):
            _write(folder, files, tensors)

    def load(self, folder: Path, *, step: int | None) -> None:
        """Load weights from `folder`, and the moments after `step` optimizer steps; None leaves the moments unchanged.

        Only rank 0 reads files; all workers must call this. Raises ValueError if a weight is missing or has another
        shape.
        """
        if step is not None:
            self._initialize_moments(step)
        kinds: tuple[str | None, ...] = (None,) if step is None else (None, *MOMENTS)
        stored = _TensorFolder(folder) if self._is_rank_0 else None
        for name, weight in self._parameters:
            shape = torch.Size(getattr(weight, "ds_shape", weight.shape))
            for kind in kinds:
                value = torch.empty(shape, dtype=torch.float32, device=weight.device)
                if stored is not None:
                    value.copy_(stored.read(_key(name, kind), shape))
                if world_size() > 1:
                    torch.distributed.broadcast(value, 0)
                self._write(weight, kind, value)

    def _read(self, weight: nn.Parameter, kind: str | None) -> Tensor:
        if self._copies is not None:
            copy = self._copies[weight]
            return copy.detach() if kind is None else cast(Tensor, self._adam.state[copy][kind])
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        full: Any = safe_get_full_fp32_param(weight) if kind is None else safe_get_full_optimizer_state(weight, kind)
        return cast(Tensor, full.reshape(getattr(weight, "ds_shape", weight.shape)))

    def _write(self, weight: nn.Parameter, kind: str | None, value: Tensor) -> None:
        if self._copies is not None:
            copy = self._copies[weight]
            (copy.data if kind is None else self._adam.state[copy][kind]).copy_(value)
            if kind is None:
                weight.data.copy_(value)
        elif hasattr(weight, "ds_id"):
            self._write_shard(weight, kind, value)
        else:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            if kind is None:
                weight.data.copy_(value)
                safe_set_full_fp32_param(weight, value)
            else:
                safe_set_full_optimizer_state(weight, value, kind)

    def _write_shard(self, weight: Any, kind: str | None, value: Tensor) -> None:
        """Write this worker's shard under ZeRO-3; the last shard is padded."""
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if kind is None:
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                weight.data.copy_(value)
        size = weight.ds_tensor.numel()
        flat = torch.nn.functional.pad(value.flatten(), (0, size * world_size() - value.numel()))
        shard = flat.narrow(0, size * rank(), size)
        if kind is None:
            safe_set_local_fp32_param(weight, shard)
        else:
            safe_set_local_optimizer_state(weight, shard, kind)

    def _initialize_moments(self, step: int) -> None:
        """Create the moments, as AdamW would in its first step, with a step count of `step`."""
        for flat in _flat_weights(self._zero) if self._copies is None else self._copies.values():
            self._adam.state[flat] = {
                # fused AdamW keeps the step on the device of the weight, other variants on the CPU
                "step": torch.tensor(float(step), device=flat.device if self._adam.defaults.get("fused") else "cpu"),
                **{kind: torch.zeros_like(flat, memory_format=torch.preserve_format) for kind in MOMENTS},
            }
        self._link_moments()

    def _link_moments(self) -> None:
        """Let DeepSpeed's mapping of weights to moments cover all parameter groups.

        ZeRO stages 1 and 2 create it after the step of the first group, when the other groups have no moments yet.
        """
        zero: Any = self._zero
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()


def _stepped_weights(stepped: Any, weights: list[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter] | None:
    """Return the tensor that AdamW steps on for each weight: the weight, or DeepSpeed's float32 copy of it.

    Returns None for ZeRO stages that flatten the weights.
    """
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
    raise TypeError(f"{type(zero).__name__}: the float32 weights of this DeepSpeed optimizer cannot be found")


class _TensorFolder:
    """Tensors by name from all safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        files: list[Any] = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self._file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118

    def read(self, key: str, shape: torch.Size) -> Tensor:
        if key not in self._file_of:
            raise ValueError(f"checkpoint: no tensor {key}; it belongs to another student")
        tensor: Tensor = self._file_of[key].get_tensor(key)
        if tensor.shape != shape:
            raise ValueError(f"checkpoint: {key} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        return tensor


def _key(name: str, kind: str | None) -> str:
    return f"{kind or 'weight'}:{name}"


def _write(folder: Path, number: int, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"part-{number:05d}.safetensors")


def _rng_states() -> list[dict[str, list[int]]]:
    """Return the states of torch's random number generators, the only ones used in training, by rank."""
    own = {"cpu": torch.get_rng_state().tolist()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state().tolist()
    if world_size() == 1:
        return [own]
    states: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(states, own)
    return states


def _restore_rng(states: list[dict[str, list[int]]]) -> None:
    """Restore this worker's random states; on another number of workers they continue from their seed."""
    if len(states) != world_size():
        return
    own = {name: torch.tensor(values, dtype=torch.uint8) for name, values in states[rank()].items()}
    torch.set_rng_state(own["cpu"])
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
