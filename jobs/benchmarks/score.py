"""Time the score stage against the teacher in a plain loop, on the same records and CPUs.

    python jobs/benchmarks/score.py --teacher encoder --json
    python jobs/benchmarks/score.py --teacher ontology --records 2000 --json
    python jobs/benchmarks/score.py --teacher constant --records 10000,100000,1000000 --rounds 1 --json

`encoder` is a ViT with random weights (encoders.py) on JPEGs of 600 x 450 pixels. The loop is one process on all CPUs,
which reads and decodes the images of a batch and then runs the model on them. It takes turns with the stage, whose
actors have one thread each and whose images are decoded in separate tasks. `decode_share` is the share of the loop's
CPU time that is spent on decoding; `model_rows_per_second` is the speed of the loop on decoded images.

With the other teachers the loop has up to 20,000 records in memory and discards the scores, while the stage starts its
actors, reads all records from storage and writes all scores, with `--actors` CPUs. The ratio is the cost of Ray and
storage; `ratio_after_start` excludes the time that the stage takes for a single record. `driver_mib` is the growth of
the driver's memory. With several numbers of records, the seconds per additional thousand show whether the cost is
linear. `constant` gives every record the same scores, which leaves only the cost of the stage; `table` loads all scores
into a dictionary, which at a million records takes longer than scoring.
"""

from __future__ import annotations

import gc
import io
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from patients import write_records
from PIL import Image

from mint_ray.artifacts import Artifact, open_artifact, read_part, verify
from mint_ray.config.loader import dump
from mint_ray.config.stages import Fit, Score, ScoreResources
from mint_ray.images import read_images
from mint_ray.records import SPLITS, Label, Record, TeacherScores, from_table
from mint_ray.runtime.session import connect
from mint_ray.stages import score as stage
from mint_ray.stages.fit import fit_teacher
from mint_ray.tasks.config import RareDisease
from mint_ray.teachers import Teacher
from mint_ray.teachers.config import Imported, Ontology, Table

MAX_LOOP_RECORDS = 20_000
"""Maximum number of records of the plain loop."""
IMAGES = 64
"""Number of different images, which the records share."""


class ConstantTeacher:
    """A teacher that gives every record the same scores."""

    def __init__(self, labels: list[str]) -> None:
        self.labels, self.scores = labels, [1 / rank for rank in range(1, len(labels) + 1)]

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """Return the same scores for every record."""
        return [
            TeacherScores(
                record_id=record.record_id, split=record.split, teacher="constant",
                labels=self.labels, scores=self.scores,
            )
            for record in records
        ]  # fmt: skip


class LoadingActor(stage.TeacherActor):
    """An actor that can also load the constant teacher."""

    def _load(self, artifact: Artifact) -> Teacher:
        return load_teacher(artifact, super()._load)


def load_teacher(artifact: Artifact, otherwise: Any) -> Any:
    """Return the constant teacher if its labels are in the artifact, otherwise the teacher that `otherwise` loads."""
    constant = artifact.manifest.metrics.get("constant")
    return ConstantTeacher(constant) if constant else otherwise(artifact)


def write_teacher(root: str, kind: str, records: Artifact) -> Artifact:
    """Write a teacher of one kind, fitted to the records."""
    labels = [label.label_id for label in records.rows(Label, "labels")]
    if kind == "ontology":
        return fit_teacher(root, Fit(teacher=Ontology()), records)
    config = {"fit": dump(Fit(teacher=Table(uri=kind)))}
    artifact = open_artifact(root, "fit", config, {"records": records.name})
    with artifact.write() as draft:
        draft.metrics["constant"] = labels if kind == "constant" else None
        scores = {}
        if kind == "table":
            same = {label: 1 / rank for rank, label in enumerate(labels, start=1)}
            ids = (read_part(records.file_uri(file.path))["record_id"] for file in records.table_files("records"))
            scores = {record_id: same for part in ids for record_id in part.to_pylist()}
        draft.write_text("teacher/scores.json", json.dumps({"labels": labels, "scores": scores}))
    return artifact


@contextmanager
def measure_memory_growth() -> Iterator[dict[str, float]]:
    """Measure the peak growth of this process's resident memory without shared memory; written to `mib`."""
    gc.collect()
    process, growth, done = psutil.Process(), {"mib": 0.0}, threading.Event()

    def private_bytes() -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    before = private_bytes()

    def watch() -> None:
        while not done.wait(0.05):
            growth["mib"] = max(growth["mib"], (private_bytes() - before) / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield growth
    finally:
        done.set()
        thread.join()


def time_loop(teacher: Artifact, records: Artifact, batch_size: int) -> float:
    """Return the rows per second of the teacher in a plain loop."""
    actor = LoadingActor(records, Score(), RareDisease(), teacher, records)
    rows: list[Record] = []
    for file in records.table_files("records"):
        if len(rows) < MAX_LOOP_RECORDS:
            rows += from_table(Record, read_part(records.file_uri(file.path)))
    started = time.perf_counter()
    for start in range(0, len(rows), batch_size):
        actor.teacher.score(rows[start : start + batch_size])
    return len(rows) / (time.perf_counter() - started)


def time_stage(root: str, config: Score, teacher: Artifact, records: Artifact) -> dict[str, float]:
    """Run the stage in a new root; return its seconds and the growth of the driver's memory."""
    with tempfile.TemporaryDirectory(dir=root) as out, measure_memory_growth() as growth:
        started = time.perf_counter()
        made = stage.score_records(out, config, RareDisease(), teacher, records)
        seconds = time.perf_counter() - started
        problems = verify(made.uri)
        if problems:
            raise RuntimeError(problems[0])
        return {"seconds": seconds, **growth}


def measure(
    root: str, kind: str, count: int, labels: int, rounds: int, config: Score, rows_per_part: int
) -> dict[str, Any]:
    """Time loop and stage in turns; return the medians."""
    place = str(Path(root) / f"{kind}-{count}")
    records = write_records(place, count, labels, rows_per_part)
    teacher = write_teacher(place, kind, records)
    single = write_records(place, 1, labels, 1)
    # the first run starts Ray's processes
    start = [time_stage(place, config, teacher, single)["seconds"] for _ in range(2)][-1]
    loops, stages = [], []
    for _ in range(rounds):
        # the stage first: memory that the loop allocates and frees would hide the growth of the driver
        stages.append(time_stage(place, config, teacher, records))
        loops.append(time_loop(teacher, records, config.resources.batch_size))
    loop_speed = statistics.median(loops)
    seconds = statistics.median(run["seconds"] for run in stages)
    return {
        "teacher": kind,
        "records": count,
        "labels": labels,
        "loop_rows_per_second": round(loop_speed, 1),
        "stage_rows_per_second": round(count / seconds, 1),
        "stage_seconds": round(seconds, 2),
        "start_seconds": round(start, 2),
        "ratio": float(f"{count / seconds / loop_speed:.4g}"),
        "ratio_after_start": float(f"{count / (seconds - start) / loop_speed:.4g}") if seconds > start else None,
        "driver_mib": round(max(run["mib"] for run in stages), 1),
    }


def write_images(root: str, count: int, rows_per_part: int) -> Artifact:
    """Write records with synthetic photographs: noise over a smooth background, JPEGs of about 60 kB."""
    rng = np.random.default_rng(0)
    folder = Path(root) / "images"
    folder.mkdir(parents=True)
    for number in range(min(IMAGES, count)):
        background = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((600, 450), 3)
        pixels = np.asarray(background, np.int16) + rng.normal(0, 8, (450, 600, 3)).astype(np.int16)
        target = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target, "JPEG", quality=90)
        (folder / f"{number}.jpg").write_bytes(target.getvalue())
    artifact = open_artifact(root, "prepare", {"images": count, "rows_per_part": rows_per_part}, {})
    rows = [
        Record(
            record_id=f"r{number:08d}", group_id=f"g{number}", label_id=f"L{number % 7}", split=SPLITS[number % 3],
            image_uri=str(folder / f"{number % IMAGES}.jpg"),
        )
        for number in range(count)
    ]  # fmt: skip
    with artifact.write() as draft:
        draft.write_rows(Record, "records", rows, rows_per_part=rows_per_part)
        draft.write_rows(Label, "labels", [Label(label_id=f"L{place}", name=f"name {place}") for place in range(7)])
    return artifact


class Loop:
    """The encoder in a plain loop in this process, on all CPUs."""

    def __init__(self, teacher: Artifact, records: Artifact, batch_size: int) -> None:
        settings = stage._settings(teacher)
        self.teacher = stage.build_teacher(
            Imported(path=settings.path, options=settings.options | {"threads": os.cpu_count()})
        )
        self.teacher.load(Path(teacher.file_uri("teacher")))
        rows = records.rows(Record, "records")
        self.batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        self.count = len(rows)

    def run(self) -> dict[str, float]:
        """Return the rows per second with and without decoding, and the share of decoding in the CPU time."""
        wall, cpu = [0.0, 0.0], [0.0, 0.0]

        def since(place: int, started: tuple[float, float]) -> tuple[float, float]:
            now = time.perf_counter(), time.process_time()
            wall[place] += now[0] - started[0]
            cpu[place] += now[1] - started[1]
            return now

        moment = time.perf_counter(), time.process_time()
        for batch in self.batches:
            images = read_images([record.image_uri for record in batch], self.teacher.frame())
            moment = since(0, moment)
            self.teacher.score_images(batch, images)
            moment = since(1, moment)
        return {"all": self.count / sum(wall), "model": self.count / wall[1], "decode_share": cpu[0] / sum(cpu)}


def measure_encoder(
    root: str, model: str, count: int, rounds: int, config: Score, rows_per_part: int
) -> dict[str, Any]:
    """Time loop and stage in turns; return the medians."""
    place = str(Path(root) / f"encoder-{count}")
    records = write_images(place, count, rows_per_part)
    settings = Imported(path="encoders:RandomEncoder", options={"model": model})
    teacher = fit_teacher(place, Fit(teacher=settings), records)
    single = write_images(str(Path(place) / "single"), 1, 1)
    start = [time_stage(place, config, teacher, single)["seconds"] for _ in range(2)][-1]
    loop = Loop(teacher, records, config.resources.batch_size)
    loops, stages = [], []
    for _ in range(rounds):
        stages.append(time_stage(place, config, teacher, records))
        loops.append(loop.run())
    keys = ("all", "model", "decode_share")
    loop_speed, model_speed, share = (statistics.median(run[key] for run in loops) for key in keys)
    seconds = statistics.median(run["seconds"] for run in stages)
    return {
        "teacher": f"encoder {model}",
        "records": count,
        "loop_rows_per_second": round(loop_speed, 2),
        "model_rows_per_second": round(model_speed, 2),
        "decode_share": round(share, 3),
        "stage_rows_per_second": round(count / seconds, 2),
        "stage_seconds": round(seconds, 2),
        "start_seconds": round(start, 2),
        "ratio": float(f"{count / seconds / loop_speed:.4g}"),
        "ratio_after_start": float(f"{count / (seconds - start) / loop_speed:.4g}") if seconds > start else None,
        "driver_mib": round(max(run["mib"] for run in stages), 1),
    }


def growth(runs: list[dict[str, Any]]) -> list[float]:
    """Return the seconds per additional thousand records, from each number of records to the next."""
    return [
        float(f"{1000 * (more['stage_seconds'] - less['stage_seconds']) / (more['records'] - less['records']):.3g}")
        for less, more in pairwise(runs)
    ]


@click.command()
@click.option(
    "--teacher",
    type=click.Choice(["constant", "table", "ontology", "encoder"]),
    default="ontology",
    show_default=True,
)
@click.option("--records", help="Number of records; several separated by commas (default: 2000; encoder: 1000).")
@click.option("--labels", default=30, show_default=True, help="Number of labels.")
@click.option("--model", type=click.Choice(["tiny", "small", "base"]), default="tiny", help="Size of the encoder.")
@click.option("--actors", type=int, help="Number of actors (default: 1; encoder: one per CPU).")
@click.option("--cpus-per-actor", type=float, help="CPUs per actor (default: 1; encoder: 0.75).")
@click.option("--gpus-per-actor", default=0.0, show_default=True, help="GPUs per actor.")
@click.option("--decode-cpus", default=0.5, show_default=True, help="CPUs per decoding task.")
@click.option("--decode-tasks", type=int, help="Maximum number of concurrent decoding tasks (default: 4 per actor).")
@click.option("--rows-per-part", type=int, help="Records per part (default: 1000; encoder: 50).")
@click.option("--batch-size", type=int, help="Records per batch (default: 64; encoder: 16).")
@click.option("--rounds", default=3, show_default=True, help="Turns of loop and stage; medians are compared.")
@click.option("--quick", is_flag=True, help="One turn with few records, as a smoke test.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def main(
    teacher: str, records: str | None, labels: int, model: str, rounds: int, quick: bool, as_json: bool, **given: Any
) -> None:
    """Time the score stage against the teacher in a plain loop."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # workers import encoders.py
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    encoder = teacher == "encoder"
    cpus = os.cpu_count() or 1
    defaults = (
        {"actors": cpus, "cpus_per_actor": 0.75, "batch_size": 16, "rows_per_part": 50}
        if encoder
        else {"actors": 1, "cpus_per_actor": 1.0, "batch_size": 64, "rows_per_part": 1000}
    )
    chosen = defaults | {key: value for key, value in given.items() if value is not None}
    rows_per_part = chosen.pop("rows_per_part")
    if quick:
        rounds, records = 1, records or ("48" if encoder else "200,400")
        rows_per_part = min(rows_per_part, 12 if encoder else 50)
    config = Score(resources=ScoreResources(**chosen))
    if not encoder:
        stage.TeacherActor = LoadingActor  # type: ignore[misc]
    connect()
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for count in map(int, (records or ("1000" if encoder else "2000")).split(",")):
            if encoder:
                row = measure_encoder(root, model, count, rounds, config, rows_per_part)
            else:
                row = measure(root, teacher, count, labels, rounds, config, rows_per_part)
            rows.append(row)
            of_loop = (
                f" ({row['decode_share']:.0%} of its CPU time decoding; {row['model_rows_per_second']:,.1f} "
                "without decoding)"
                if encoder
                else ""
            )
            click.echo(
                f"{row['teacher']}, {count:,} records: stage {row['stage_rows_per_second']:,.1f} rows/s "
                f"({row['stage_seconds']} s), plain loop {row['loop_rows_per_second']:,.1f} rows/s{of_loop}, "
                f"ratio {row['ratio']:.3g} ({row['ratio_after_start']} after {row['start_seconds']} s for the start), "
                f"driver +{row['driver_mib']} MiB"
            )
    if len(rows) > 1:
        click.echo(f"seconds per additional thousand records: {', '.join(f'{taken:g}' for taken in growth(rows))}")
    if as_json:
        settings = {"resources": chosen, "rows_per_part": rows_per_part, "cpus": cpus}
        click.echo(json.dumps({**settings, "seconds_per_additional_thousand": growth(rows), "runs": rows}))


if __name__ == "__main__":
    main()
