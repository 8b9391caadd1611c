"""After a worker failure or a driver failure the loss curve is that of an undisturbed run, with no extra uploads."""

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

from mint_ray.artifacts import Artifact
from mint_ray.config.loader import dump, from_data
from mint_ray.config.stages import Train
from mint_ray.records import PreferencePair
from mint_ray.stages.tokenize import tokenize_pairs
from mint_ray.stages.train import train_student
from mint_ray.students.config import Student
from mint_ray.students.loading import load_model, load_tokenizer
from mint_ray.trainers import TrainingRun, build_trainer
from mint_ray.trainers.config import TrainerArguments, TrainResources
from mint_ray.trainers.examples import StoredExamples
from tests.stages.inputs import make_pair, write_pairs
from tests.tiny import save_tiny_student

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_RECORDS, NUM_STEPS, SAVE_STEPS = 48, 40, 10
Curve = list[dict[str, float]]


def make_config(student: Path, **resources: object) -> Train:
    return Train(
        student=Student(model_id=str(student), lora_rank=2),
        trainer=TrainerArguments(
            train_batch_size=24, max_steps=NUM_STEPS, eval_steps=SAVE_STEPS, logging_steps=4,
            early_stopping_patience=99,
        ),
        # one record at a time, so that Ray Train accepts a checkpoint before the next one is written
        resources=TrainResources(cpus_per_worker=1, per_device_train_batch_size=1, **resources),  # type: ignore[arg-type]
    )  # fmt: skip


def write_tokens(root: Path, config: Train) -> Artifact:
    def pair(number: int) -> PreferencePair:
        note = f"a note of patient {number}: " + "a cough, " * 20
        return make_pair(number, note, f"1. 'right {number % 3}'", f"1. 'wrong {number % 4} and longer'")

    validation = range(NUM_RECORDS, NUM_RECORDS + 4)
    pairs = write_pairs(root, [pair(number) for number in range(NUM_RECORDS)], [pair(number) for number in validation])
    return tokenize_pairs(str(root), config, pairs)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    folder, config = tmp_path_factory.mktemp("undisturbed"), make_config(student)
    return train_here(folder, config, write_tokens(folder, config))


def train_here(folder: Path, config: Train, tokens: Artifact) -> Curve:
    """Return the log of a training in this process, without Ray."""
    torch.set_num_threads(1)
    set_seed(config.trainer.seed)
    run = TrainingRun(
        model=load_model(config.student, trainable=True),
        tokenizer=load_tokenizer(config.student),
        train=StoredExamples.from_artifact(tokens, "train"),
        validation=StoredExamples.from_artifact(tokens, "validation"),
        output_dir=folder / "run",
        resources=config.resources,
        run_name="undisturbed",
    )
    result = build_trainer(config.trainer).train(run)
    assert result.global_step == NUM_STEPS
    return result.log_history


def assert_same_curve(trained: Artifact, undisturbed: Curve) -> None:
    """Check that the log of a training is that of the undisturbed one."""
    log = json.loads((Path(trained.uri) / "outcome.json").read_text())["log_history"]
    for name in ("loss", "grad_norm", "learning_rate", "rewards/margins", "eval_loss"):
        expected = [(row["step"], row[name]) for row in undisturbed if name in row]
        actual = [(row["step"], row[name]) for row in log if name in row]
        assert [step for step, _ in actual] == [step for step, _ in expected]
        assert [value for _, value in actual] == pytest.approx([value for _, value in expected], rel=1e-4, abs=1e-7)


class Uploads:
    """Times at which the checkpoints below `runs/` were written, and those that Ray Train has accepted."""

    def __init__(self, root: Path) -> None:
        self.runs = root / "runs"
        self.written: dict[str, set[int]] = defaultdict(set)
        self.failed_at = 0
        """Step of the last accepted checkpoint at the failure."""

    def update(self) -> None:
        """Note the checkpoints that are there now."""
        for path in self.runs.glob("*/step-*/position.json"):
            try:
                self.written[path.parent.name].add(path.stat().st_mtime_ns)
            except FileNotFoundError:
                continue

    def num_workers(self) -> int:
        """Return the number of workers that wrote the last checkpoint."""
        last = max(self.runs.glob("*/step-*/position.json"), key=lambda path: path.stat().st_mtime_ns)
        return len(json.loads(last.read_text())["rng"])

    def is_accepted(self, step: int) -> bool:
        """Return whether Ray Train has accepted the checkpoint of a step."""
        return any(f"step-{step}" in path.read_text() for path in self.runs.glob("*/checkpoint_manager_snapshot.json"))

    def assert_once(self) -> None:
        """Check that each checkpoint was written once, except at most one that was not accepted at the failure."""
        steps = {f"step-{step}": step for step in range(SAVE_STEPS, NUM_STEPS + 1, SAVE_STEPS)}
        assert self.written.keys() == steps.keys()
        repeated = [name for name, times in self.written.items() if len(times) > 1]
        assert len(repeated) <= 1, self.written
        assert all(steps[name] > self.failed_at and len(self.written[name]) == 2 for name in repeated), self.written

    @contextmanager
    def watch(self, step: int, fail: Callable[[], None] | None = None) -> Iterator[None]:
        """Watch the folder during the block; call `fail` once the checkpoint of `step` is accepted."""
        done = threading.Event()

        def poll() -> None:
            while not done.is_set():
                self.update()
                if fail and not self.failed_at and self.is_accepted(step):
                    self.failed_at = step
                    fail()
                time.sleep(0.01)

        thread = threading.Thread(target=poll)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        assert self.failed_at, "the run ended before the failure was injected"


def training_workers() -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if "RayTrainWorker" in process.name() + _command(process)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_worker_failure_costs_the_steps_since_the_last_checkpoint(
    ray_cluster: None, tmp_path: Path, student: Path, undisturbed: Curve
) -> None:
    config, uploads = make_config(student, num_workers=2, report_to=("tensorboard",)), Uploads(tmp_path)
    tokens = write_tokens(tmp_path, config)
    with uploads.watch(20, lambda: training_workers()[-1].kill()):
        trained = train_student(str(tmp_path), config, tokens)
    assert_same_curve(trained, undisturbed)
    uploads.assert_once()
    assert not any((tmp_path / "runs").iterdir())
    # the tracker has one curve, too, without a repeated step
    scalars = EventAccumulator(str(Path(trained.uri) / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in scalars] == [row["step"] for row in undisturbed if "loss" in row]


def test_a_new_driver_resumes_after_a_driver_failure_on_one_worker_instead_of_two(
    ray_cluster: None, tmp_path: Path, student: Path, undisturbed: Curve
) -> None:
    import ray

    uploads, config = Uploads(tmp_path), make_config(student, num_workers=2)
    write_tokens(tmp_path, config)
    job = json.dumps({"root": str(tmp_path), "train": dump(config)})
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen([sys.executable, "-m", "tests.stages.test_train_faults", job], env=environment)
    with uploads.watch(20, driver.kill):
        assert driver.wait(timeout=240) == -signal.SIGKILL
    config = make_config(student, num_workers=1)
    with uploads.watch(30):
        trained = train_student(str(tmp_path), config, write_tokens(tmp_path, config))
    assert_same_curve(trained, undisturbed)
    uploads.assert_once()


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    train_config = from_data(Train, arguments["train"])
    train_student(arguments["root"], train_config, write_tokens(Path(arguments["root"]), train_config))
