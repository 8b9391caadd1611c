"""Kill a worker, the driver, a machine: the loss curve is that of a run nobody touched, and nothing is uploaded twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import set_seed

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.config.loader import dump, from_data
from mint_ray.config.stages import Train
from mint_ray.records import Message, PreferencePair
from mint_ray.stages.tokenize import tokenize_pairs
from mint_ray.stages.train import train_student
from mint_ray.students import load_model, load_tokenizer
from mint_ray.students.config import Student
from mint_ray.trainers import build_trainer
from mint_ray.trainers.config import Arguments, TrainResources
from mint_ray.trainers.examples import StoredExamples
from tests.tiny import save_tiny_student

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RECORDS, STEPS, SAVED_EVERY = 48, 40, 10
Curve = list[dict[str, float]]


def config_class(student: Path, **resources: object) -> Train:
    return Train(
        student=Student(model_id=str(student), lora_rank=2),
        trainer=Arguments(
            train_batch_size=24, max_steps=STEPS, eval_steps=SAVED_EVERY, logging_steps=4, early_stopping_patience=99
        ),
        # a record at a time, so that Ray Train accepts a checkpoint before the next is there
        resources=TrainResources(cpus_per_worker=1, per_device_train_batch_size=1, **resources),  # type: ignore[arg-type]
    )


def make_tokens(root: Path, config: Train) -> Artifact:
    def says(role: str, text: str) -> list[Message]:
        return [Message(role=role, content=text)]

    def pair(number: int, split: str) -> PreferencePair:
        return PreferencePair(
            prompt=says("user", f"a note of patient {number}: " + "a cough, " * 20),
            chosen=says("assistant", f"1. 'right {number % 3}'"),
            rejected=says("assistant", f"1. 'wrong {number % 4} at all'"),
            record_id=f"r{number}", split=split, teacher="t", sampler="hard", chosen_labels=["a"], rejected_labels=["b"],
        )  # type: ignore[arg-type]  # fmt: skip

    pairs = open_artifact(str(root), "pair", {}, {})
    if not pairs.is_complete:
        with pairs.write() as draft:
            draft.write_rows(PreferencePair, "train", [pair(number, "train") for number in range(RECORDS)])
            draft.write_rows(PreferencePair, "validation", [pair(number, "validation") for number in range(50, 54)])
    return tokenize_pairs(str(root), config, pairs)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def untouched(ray_cluster: None, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    folder, config = tmp_path_factory.mktemp("untouched"), config_class(student)
    return train_untouched(folder, config, make_tokens(folder, config))


def train_untouched(folder: Path, config: Train, tokens: Artifact) -> Curve:
    """The curve of one process that trains from start to end without Ray."""
    torch.set_num_threads(1)
    set_seed(config.trainer.seed)
    result = build_trainer(config.trainer).run(
        model=load_model(config.student, trainable=True),
        tokenizer=load_tokenizer(config.student),
        train=StoredExamples.of(tokens, "train"),
        validation=StoredExamples.of(tokens, "validation"),
        output_dir=folder / "run",
        resources=config.resources,
        run_name="untouched",
        callbacks=[],
        resume_from_checkpoint=None,
    )
    assert result.global_step == STEPS
    return result.log_history


def assert_same_curve(trained: Artifact, untouched: Curve) -> None:
    found = json.loads((Path(trained.uri) / "outcome.json").read_text())["log_history"]
    for name in ("loss", "grad_norm", "learning_rate", "rewards/margins", "eval_loss"):
        expected = [(row["step"], row[name]) for row in untouched if name in row]
        actual = [(row["step"], row[name]) for row in found if name in row]
        assert [step for step, _ in actual] == [step for step, _ in expected]
        assert [value for _, value in actual] == pytest.approx([value for _, value in expected], rel=1e-4, abs=1e-7)


class Uploads:
    """When each checkpoint below `runs/` was written, and which of them Ray Train has accepted."""

    def __init__(self, root: Path) -> None:
        self.runs = root / "runs"
        self.written: dict[str, set[int]] = defaultdict(set)
        self.killed_at = 0

    def look(self) -> None:
        for path in self.runs.glob("*/step-*/position.json"):
            try:
                self.written[path.parent.name].add(path.stat().st_mtime_ns)
            except FileNotFoundError:
                continue

    def workers(self) -> int:
        """How many workers the last checkpoint that was written came from."""
        last = max(self.runs.glob("*/step-*/position.json"), key=lambda path: path.stat().st_mtime_ns)
        return len(json.loads(last.read_text())["rng"])

    def accepted(self, step: int) -> bool:
        return any(f"step-{step}" in path.read_text() for path in self.runs.glob("*/checkpoint_manager_snapshot.json"))

    def assert_once(self) -> None:
        """Each step's checkpoint was written once, but for one at most: the one nobody had accepted at the kill."""
        steps = {f"step-{step}": step for step in range(SAVED_EVERY, STEPS + 1, SAVED_EVERY)}
        assert self.written.keys() == steps.keys()
        again = [name for name, times in self.written.items() if len(times) > 1]
        assert len(again) <= 1, self.written
        assert all(steps[name] > self.killed_at and len(self.written[name]) == 2 for name in again), self.written

    @contextmanager
    def watched(self, step: int, kill: Callable[[], None] | None = None) -> Iterator[None]:
        """Look on while the block runs; once the checkpoint of `step` is accepted, kill."""
        done = threading.Event()

        def look_on() -> None:
            while not done.is_set():
                self.look()
                if kill and not self.killed_at and self.accepted(step):
                    self.killed_at = step
                    kill()
                time.sleep(0.01)

        thread = threading.Thread(target=look_on)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        assert self.killed_at, "the run was over before anything was killed"


def training_workers() -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if "RayTrainWorker" in process.name() + _title(process)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(
    ray_cluster: None, tmp_path: Path, student: Path, untouched: Curve
) -> None:
    config, uploads = config_class(student, num_workers=2, report_to=("tensorboard",)), Uploads(tmp_path)
    tokens = make_tokens(tmp_path, config)
    with uploads.watched(20, lambda: training_workers()[-1].kill()):
        trained = train_student(str(tmp_path), config, tokens)
    assert_same_curve(trained, untouched)
    uploads.assert_once()
    assert not any((tmp_path / "runs").iterdir())
    # the tracker saw one curve too, no step twice
    seen = EventAccumulator(str(Path(trained.uri) / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in seen] == [row["step"] for row in untouched if "loss" in row]


def test_a_killed_driver_is_followed_by_another_on_one_worker_instead_of_two(
    ray_cluster: None, tmp_path: Path, student: Path, untouched: Curve
) -> None:
    import ray

    uploads, config = Uploads(tmp_path), config_class(student, num_workers=2)
    make_tokens(tmp_path, config)
    job = json.dumps({"root": str(tmp_path), "train": dump(config)})
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen([sys.executable, "-m", "tests.stages.test_train_faults", job], env=environment)
    with uploads.watched(20, driver.kill):
        assert driver.wait(timeout=240) == -signal.SIGKILL
    config = config_class(student, num_workers=1)
    with uploads.watched(30):
        trained = train_student(str(tmp_path), config, make_tokens(tmp_path, config))
    assert_same_curve(trained, untouched)
    uploads.assert_once()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    chosen = from_data(Train, asked["train"])
    train_student(asked["root"], chosen, make_tokens(Path(asked["root"]), chosen))
