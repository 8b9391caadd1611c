"""Train the tiny student in this process, or in several processes connected by gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from mint_ray.config.loader import dump, from_data
from mint_ray.records import Message, PreferencePair
from mint_ray.trainers import TrainingRun, TrainResult, build_trainer
from mint_ray.trainers.config import TrainerArguments, TrainResources
from mint_ray.trainers.examples import InMemoryExamples
from mint_ray.trainers.tokenization import tokenize_pairs
from tests.tiny import tiny_model, tiny_tokenizer

NAMES = ["Noonan", "Marfan", "Kabuki", "Williams", "Rett"]


def to_pair(record_id: str, prompt: str, chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(
        prompt=[Message(role="user", content=prompt)],
        chosen=[Message(role="assistant", content=chosen)],
        rejected=[Message(role="assistant", content=rejected)],
        record_id=record_id,
        split="train",
        teacher="",
        sampler="",
        chosen_labels=[],
        rejected_labels=[],
    )


def make_examples(records: int) -> list:
    """Return records that differ in the lengths of prompts and completions and in the number of pairs."""
    pairs = [
        to_pair(
            f"r{record}",
            f"Case {record}: " + "short stature, " * (record % 4),
            f"1. {NAMES[record % 5]} syndrome",
            f"1. {NAMES[(record + 1 + pair) % 5]} syndrome" + " or a cough" * pair,
        )
        for record in range(records)
        for pair in range(1 + record % 3)
    ]
    return list(tokenize_pairs(pairs, tiny_tokenizer(), max_length=512)[0])


def tiny_adapter(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(7)
    lora = LoraConfig(r=3, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(), lora)


def train(
    folder: Path,
    config: TrainerArguments,
    resources: TrainResources | None = None,
    *,
    model: nn.Module | None = None,
    records: int = 8,
    validation: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
    resume: Path | None = None,
) -> tuple[TrainResult, dict[str, Tensor]]:
    """Return the trainer's result and the trained weights."""
    model = model or tiny_model()
    examples = make_examples(records + validation)
    run = TrainingRun(
        model=model,
        tokenizer=tiny_tokenizer(),
        train=InMemoryExamples(examples[:records]),
        validation=InMemoryExamples(examples[records:]),
        output_dir=folder,
        resources=resources or TrainResources(per_device_train_batch_size=8),
        run_name="test",
        callbacks=callbacks,
        resume_from_checkpoint=resume,
    )
    result = build_trainer(config).train(run)
    return result, {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


class StopAfter(TrainerCallback):
    """A callback that stops training after a step, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        if state.global_step == self.step:
            control.should_training_stop = True


def train_on_workers(
    workers: int,
    folder: Path,
    config: TrainerArguments,
    resources: TrainResources,
    *,
    adapter: bool = False,
    records: int = 8,
    validation: int = 0,
    stop_after: int = 0,
    resume: Path | None = None,
) -> list[list[dict[str, float]]]:
    """Return the log of each worker; rank 0 writes `weights.pt` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "config": dump(config), "resources": dump(resources), "adapter": adapter, "records": records,
        "validation": validation, "stop_after": stop_after, "resume": str(resume) if resume else None,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(workers), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainers.workers", str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
        )
        for rank in range(workers)
    ]
    assert [worker.wait(timeout=240) for worker in started] == [0] * workers
    return [json.loads((folder / f"log-{rank}.json").read_text()) for rank in range(workers)]


def _work(folder: Path) -> None:
    torch.set_num_threads(1)
    job, rank = json.loads((folder / "job.json").read_text()), int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    resume = Path(job["resume"]) if job["resume"] else None
    if resume and rank:
        # other nodes have only this file of the checkpoint
        own = folder / f"resume-{rank}"
        own.mkdir()
        (own / "trainer_state.json").write_bytes((resume / "trainer_state.json").read_bytes())
        resume = own
    config = from_data(TrainerArguments, job["config"])
    resources = from_data(TrainResources, job["resources"])
    model = tiny_adapter() if job["adapter"] else tiny_model()
    output_dir = folder / f"rank-{rank}"
    result, weights = train(
        output_dir, config, resources, model=model, records=job["records"], validation=job["validation"],
        callbacks=[StopAfter(job["stop_after"])], resume=resume,
    )  # fmt: skip
    if rank:
        assert not list(output_dir.rglob("*.safetensors"))
    elif resources.zero_stage != 3:
        torch.save(weights, folder / "weights.pt")
    (folder / f"log-{rank}.json").write_text(json.dumps(result.log_history))
    # gloo's threads must stop before the interpreter exits, which otherwise sometimes aborts
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
