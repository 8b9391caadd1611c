from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mint_ray.students.config import Student
from mint_ray.trainers.config import TrainerArguments, TrainResources
from mint_ray.trainers.deepspeed import deepspeed_config, gathered_parameters
from mint_ray.trainers.memory import estimate_memory
from mint_ray.trainers.meta_model import shape_from_meta_model
from tests.tiny import tiny_model

ENGINES: dict[str, dict[str, Any]] = {
    "zero-0": {"zero_stage": 0},
    "zero-1": {"zero_stage": 1},
    "zero-2": {"zero_stage": 2},
    "zero-1, optimizer on the CPU": {"zero_stage": 1, "offload": "optimizer"},
    "zero-2, optimizer on the CPU": {"zero_stage": 2, "offload": "optimizer"},
    "zero-3": {"zero_stage": 3},
    "zero-3, optimizer on the CPU": {"zero_stage": 3, "offload": "optimizer"},
    "zero-3, weights on the CPU": {"zero_stage": 3, "offload": "parameters"},
}
ADAPTERS = {f"{name}, adapter in bfloat16": engine for name, engine in ENGINES.items()}
ENGINES |= ADAPTERS
OFFLOADED = {"none": [False, False], "optimizer": [True, False], "parameters": [True, True]}
"""Whether the optimizer state and the weights are in CPU memory."""
STEPS, RATE, CLIP = 3, 1e-2, 0.5
ROWS, WIDTH = 4, 12
"""Rows of one step over all workers, and tokens per row."""


def batch() -> Tensor:
    """Return token ids (ROWS, WIDTH), the same in every step."""
    return torch.randint(3, 400, (ROWS, WIDTH), generator=torch.Generator().manual_seed(1))


def make_model(adapter: bool) -> nn.Module:
    """Return the tiny student; with `adapter` as in a bfloat16 run, LoRA weights in float32 on a bfloat16 base."""
    if not adapter:
        return tiny_model()
    torch.manual_seed(7)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(tiny_model().to(torch.bfloat16), lora)


def run_plain(adapter: bool, ahead: bool) -> tuple[list[float], Tensor]:
    """Return losses of a plain loop and one trained weight after it; with `ahead` AdamW's step count is one higher."""
    torch.set_num_threads(1)
    model = make_model(adapter).float().train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    if ahead:
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad()
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=batch(), labels=batch()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, trained[0].detach()


@pytest.fixture(scope="module")
def by_one_worker(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_workers(1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def by_two_workers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_workers(2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_takes_the_steps_of_plain_torch(engine: str, workers: int, request: pytest.FixtureRequest) -> None:
    done = request.getfixturevalue("by_one_worker" if workers == 1 else "by_two_workers")[engine]
    adapter, resources = engine in ADAPTERS, ENGINES[engine]
    # DeepSpeed 0.19.8 creates the moments of stage 0 in bfloat16 by a step without gradients, which AdamW counts
    losses, weight = run_plain(adapter, ahead=adapter and resources["zero_stage"] == 0)
    assert losses[-1] < 0.98 * losses[0]
    assert done["losses"] == pytest.approx(losses, abs=5e-3 if adapter else 1e-5)
    # in bfloat16 single weights differ: AdamW takes a full step even for a tiny gradient
    assert (torch.tensor(done["weight"]) - weight).abs().mean() < (0.05 * RATE if adapter else 1e-6)
    assert done["engine"] == [resources["zero_stage"], *OFFLOADED[resources.get("offload", "none")]]
    assert done["dtypes"] == ["torch.bfloat16" if adapter else "torch.float32"]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_optimizer_state_of_an_engine_is_as_large_as_estimated(
    engine: str, workers: int, request: pytest.FixtureRequest
) -> None:
    done = request.getfixturevalue("by_one_worker" if workers == 1 else "by_two_workers")[engine]
    adapter = engine in ADAPTERS
    student = Student(model_id="tiny", lora_rank=4 if adapter else None, dtype="bfloat16" if adapter else "float32")
    # an offload moves the state and does not change its size
    resources = TrainResources(zero_stage=ENGINES[engine]["zero_stage"], num_workers=workers)
    shape = shape_from_meta_model(tiny_model().config, student)
    memory = estimate_memory(shape, student, TrainerArguments(bf16=adapter), resources, record_tokens=WIDTH)
    assert done["state_bytes"] == pytest.approx(memory.optimizer, rel=0.02)


def run_workers(workers: int, folder: Path) -> dict[str, Any]:
    """Return the results of each engine on `workers` processes connected by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(workers), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainers.test_deepspeed", str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
        )
        for rank in range(workers)
    ]
    assert [worker.wait(timeout=500) for worker in started] == [0] * workers
    done: dict[str, Any] = json.loads((folder / "done.json").read_text())
    return done


def work(folder: Path) -> None:
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    done = {}
    for name, engine in ENGINES.items():
        done[name] = run_engine(folder, TrainResources(**engine), name in ADAPTERS)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if torch.distributed.get_rank() == 0:
        (folder / "done.json").write_text(json.dumps(done))
    # gloo's threads must stop before the interpreter exits, which otherwise sometimes aborts
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_engine(folder: Path, resources: TrainResources, adapter: bool) -> dict[str, Any]:
    """Run the steps of `run_plain` with Hugging Face's trainer, on this worker's share of the rows."""
    workers, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    share = ROWS // workers
    # before the arguments, after which transformers shards the weights of every new model
    unset_hf_deepspeed_config()
    model = make_model(adapter)
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=share,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        bf16=adapter,
        deepspeed=deepspeed_config(TrainerArguments(bf16=adapter), resources),
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": ids_T, "labels": ids_T} for ids_T in batch()[rank * share : (rank + 1) * share]]
    trainer = Shares(model=model, args=args, train_dataset=rows * STEPS)
    trainer.train()
    model, engine = trainer.accelerator.unwrap_model(trainer.model), trainer.model_wrapped
    with gathered_parameters(model, resources):
        weight = next(weight for weight in model.parameters() if weight.requires_grad).detach().tolist()
    zero = engine.config["zero_optimization"]
    offloaded = [zero.get(name, {}).get("device") == "cpu" for name in ("offload_optimizer", "offload_param")]
    return {
        "losses": trainer.accelerator.reduce(torch.stack(trainer.seen), reduction="mean").tolist(),
        "weight": weight,
        "engine": [engine.zero_optimization_stage(), *offloaded],
        "dtypes": sorted({str(weight.dtype) for weight in model.parameters()}),
        "state_bytes": state_bytes(engine, copied=adapter or bool(resources.zero_stage)),
    }


def state_bytes(engine: Any, *, copied: bool) -> int:
    """Return the bytes of AdamW's state on this worker, and of the float32 copies of weights if there are any."""
    adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
    adam = getattr(adam, "optimizer", adam)
    moments = sum(entry[name].nbytes for entry in adam.state.values() for name in ("exp_avg", "exp_avg_sq"))
    return moments + (moments // 2 if copied else 0)


class Shares(Trainer):
    """Hugging Face's trainer on this worker's rows in their order; records each loss."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen: list[Tensor] = []

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_size=self.args.per_device_train_batch_size)

    def compute_loss(self, *arguments: Any, **named: Any) -> Tensor:
        loss: Tensor = super().compute_loss(*arguments, **named)
        self.seen.append(loss.detach())
        return loss


@pytest.mark.parametrize("resources", [{"zero_stage": 2}, {"zero_stage": 3, "offload": "parameters"}])
def test_gpu_options_are_set_only_if_there_is_a_gpu(resources: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        zero = deepspeed_config(TrainerArguments(), TrainResources(**resources))["zero_optimization"]
        assert zero["overlap_comm"] is on_gpu
        assert {place["pin_memory"] for name, place in zero.items() if name.startswith("offload_")} <= {on_gpu}


def test_without_a_stage_there_is_no_deepspeed_config() -> None:
    assert deepspeed_config(TrainerArguments(), TrainResources()) is None


if __name__ == "__main__":
    work(Path(sys.argv[1]))
