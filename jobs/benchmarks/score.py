"""Time the score stage against the bare teacher in a plain loop, on the same records and cores, in turns.

    python jobs/benchmarks/score.py --teacher encoder --json
    python jobs/benchmarks/score.py --teacher ontology --records 2000 --json
    python jobs/benchmarks/score.py --teacher constant --records 10000,100000,1000000 --rounds 1 --json

`encoder` is a ViT of random weights (encoders.py) that looks at JPEGs of 600 x 450 pixels. Its loop is one process on
all processors: it reads and decodes the images of a batch, then runs the model on them, with as many threads as there
are processors, in turns with the stage, whose actors have one thread each beside the tasks that decode. `decode_share`
is the part of the loop's processor time that goes to decoding; `model_rows_per_second` is the loop's speed on images
that are decoded already.

For the other teachers the loop has up to 20,000 of the records in memory and throws the rankings away; the stage reads
all from storage, writes, and starts its actors, on as many processors as `--actors`. Their ratio is what Ray and
storage cost; `ratio_after_start` leaves out the seconds that the stage takes for a single record. The growth of the
driver's memory is what the stage holds there; of several numbers of records, what each thousand more takes tells
whether the cost grows in a straight line. `table` keeps every score in a dictionary, which takes longer to load than to
ask at a million records: `constant` gives every record the same ranking and leaves the stage's own cost alone.
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

IN_LOOP = 20_000
"""Most records of the plain loop."""
IMAGES = 64
"""Different images; records share them."""


class ConstantTeacher:
    """Ranks every record's labels alike."""

    def __init__(self, labels: list[str]) -> None:
        self.labels, self.scores = labels, [1 / rank for rank in range(1, len(labels) + 1)]

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        return [
            TeacherScores(
                record_id=record.record_id, split=record.split, teacher="constant",
                labels=self.labels, scores=self.scores,
            )
            for record in records
        ]  # fmt: skip


class LoadingActor(stage.TeacherActor):
    """Knows the constant teacher too."""

    def _load(self, artifact: Artifact) -> Teacher:
        return load_teacher(artifact, super()._load)


def load_teacher(artifact: Artifact, otherwise: Any) -> Any:
    """The constant teacher where its labels lie in the artifact."""
    constant = artifact.manifest.metrics.get("constant")
    return ConstantTeacher(constant) if constant else otherwise(artifact)


def write_teacher(root: str, kind: str, records: Artifact) -> Artifact:
    """A teacher of one kind, fitted to the records."""
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
def growth_of_memory() -> Iterator[dict[str, float]]:
    """Fills `mib` with how far this process's resident memory rose above what it was, shared memory left out."""
    gc.collect()
    process, told, done = psutil.Process(), {"mib": 0.0}, threading.Event()

    def own() -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    before = own()

    def look_on() -> None:
        while not done.wait(0.05):
            told["mib"] = max(told["mib"], (own() - before) / 2**20)

    thread = threading.Thread(target=look_on)
    thread.start()
    try:
        yield told
    finally:
        done.set()
        thread.join()


def time_loop(teacher: Artifact, records: Artifact, batch_size: int) -> float:
    """Rows per second of the teacher alone."""
    actor = LoadingActor(records, Score(), RareDisease(), teacher, records)
    rows: list[Record] = []
    for file in records.table_files("records"):
        if len(rows) < IN_LOOP:
            rows += from_table(Record, read_part(records.file_uri(file.path)))
    started = time.perf_counter()
    for start in range(0, len(rows), batch_size):
        actor.teacher.score(rows[start : start + batch_size])
    return len(rows) / (time.perf_counter() - started)


def time_stage(root: str, config: Score, teacher: Artifact, records: Artifact) -> dict[str, float]:
    """One run of the stage into a root of its own."""
    with tempfile.TemporaryDirectory(dir=root) as out, growth_of_memory() as told:
        started = time.perf_counter()
        made = stage.score_records(out, config, RareDisease(), teacher, records)
        seconds = time.perf_counter() - started
        problems = verify(made.uri)
        if problems:
            raise RuntimeError(problems[0])
        return {"seconds": seconds, **told}


def measure(
    root: str, kind: str, count: int, labels: int, rounds: int, config: Score, rows_per_part: int
) -> dict[str, Any]:
    """Loop and stage in turns; the median of each."""
    place = str(Path(root) / f"{kind}-{count}")
    records = write_records(place, count, labels, rows_per_part)
    teacher = write_teacher(place, kind, records)
    single = write_records(place, 1, labels, 1)
    # the first only warms Ray's processes up
    start = [time_stage(place, config, teacher, single)["seconds"] for _ in range(2)][-1]
    loops, stages = [], []
    for _ in range(rounds):
        # the stage first: what the loop holds and gives back would hide what the driver needs
        stages.append(time_stage(place, config, teacher, records))
        loops.append(time_loop(teacher, records, config.resources.batch_size))
    bare = statistics.median(loops)
    seconds = statistics.median(run["seconds"] for run in stages)
    return {
        "teacher": kind,
        "records": count,
        "labels": labels,
        "bare_rows_per_second": round(bare, 1),
        "stage_rows_per_second": round(count / seconds, 1),
        "stage_seconds": round(seconds, 2),
        "start_seconds": round(start, 2),
        "ratio": float(f"{count / seconds / bare:.4g}"),
        "ratio_after_start": float(f"{count / (seconds - start) / bare:.4g}") if seconds > start else None,
        "driver_mib": round(max(run["mib"] for run in stages), 1),
    }


def write_images(root: str, count: int, rows_per_part: int) -> Artifact:
    """Records with made-up photographs: noise over soft colours, in JPEGs of some 60 kB."""
    draws = np.random.default_rng(0)
    folder = Path(root) / "images"
    folder.mkdir(parents=True)
    for number in range(min(IMAGES, count)):
        soft = Image.fromarray(draws.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((600, 450), 3)
        pixels = np.asarray(soft, np.int16) + draws.normal(0, 8, (450, 600, 3)).astype(np.int16)
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
    """The bare encoder in this process, on all its processors."""

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
        """Rows per second with and without decoding, and the share of decoding in the processor time."""
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
            self.teacher.score_seen(batch, images)
            moment = since(1, moment)
        return {"all": self.count / sum(wall), "model": self.count / wall[1], "decode_share": cpu[0] / sum(cpu)}


def measure_encoder(
    root: str, model: str, count: int, rounds: int, config: Score, rows_per_part: int
) -> dict[str, Any]:
    """Loop and stage in turns; the median of each."""
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
    bare, alone, share = (statistics.median(run[key] for run in loops) for key in ("all", "model", "decode_share"))
    seconds = statistics.median(run["seconds"] for run in stages)
    return {
        "teacher": f"encoder {model}",
        "records": count,
        "bare_rows_per_second": round(bare, 2),
        "model_rows_per_second": round(alone, 2),
        "decode_share": round(share, 3),
        "stage_rows_per_second": round(count / seconds, 2),
        "stage_seconds": round(seconds, 2),
        "start_seconds": round(start, 2),
        "ratio": float(f"{count / seconds / bare:.4g}"),
        "ratio_after_start": float(f"{count / (seconds - start) / bare:.4g}") if seconds > start else None,
        "driver_mib": round(max(run["mib"] for run in stages), 1),
    }


def growth(runs: list[dict[str, Any]]) -> list[float]:
    """Seconds that each thousand records more took, from one number of records to the next."""
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
@click.option("--records", help="How many; several with commas between (default: 2000, or 1000 for the encoder).")
@click.option("--labels", default=30, show_default=True, help="Labels that are ranked.")
@click.option("--model", type=click.Choice(["tiny", "small", "base"]), default="tiny", help="Size of the encoder.")
@click.option("--actors", type=int, help="Actors (default: 1; for the encoder, one for each processor).")
@click.option("--cpus-per-actor", type=float, help="Processors of each (default: 1; for the encoder, 0.75).")
@click.option("--gpus-per-actor", default=0.0, show_default=True, help="GPUs of each actor.")
@click.option("--decode-cpus", default=0.5, show_default=True, help="Processors of a task that decodes.")
@click.option("--decode-tasks", type=int, help="Most tasks that decode at a time (default: 4 for each actor).")
@click.option("--rows-per-part", type=int, help="Records of one part (default: 1000; for the encoder, 50).")
@click.option("--batch-size", type=int, help="Records the teacher is given at a time (default: 64; encoder: 16).")
@click.option("--rounds", default=3, show_default=True, help="Turns of loop and stage.")
@click.option("--quick", is_flag=True, help="One turn over few records, to see that it runs.")
@click.option("--json", "as_json", is_flag=True, help="Make the last line one JSON object.")
def main(
    teacher: str, records: str | None, labels: int, model: str, rounds: int, quick: bool, as_json: bool, **given: Any
) -> None:
    """Time the score stage against the bare teacher."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # where workers find encoders.py
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    encoder = teacher == "encoder"
    processors = os.cpu_count() or 1
    usual = (
        {"actors": processors, "cpus_per_actor": 0.75, "batch_size": 16, "rows_per_part": 50}
        if encoder
        else {"actors": 1, "cpus_per_actor": 1.0, "batch_size": 64, "rows_per_part": 1000}
    )
    chosen = usual | {key: value for key, value in given.items() if value is not None}
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
                f" ({row['decode_share']:.0%} of its processor time decoding; {row['model_rows_per_second']:,.1f} "
                "without that)"
                if encoder
                else ""
            )
            click.echo(
                f"{row['teacher']}, {count:,} records: stage {row['stage_rows_per_second']:,.1f} rows/s "
                f"({row['stage_seconds']} s), bare loop {row['bare_rows_per_second']:,.1f} rows/s{of_loop}, "
                f"ratio {row['ratio']:.3g} ({row['ratio_after_start']} after the {row['start_seconds']} s to start), "
                f"driver +{row['driver_mib']} MiB"
            )
    if len(rows) > 1:
        click.echo(f"seconds for each thousand records more: {', '.join(f'{taken:g}' for taken in growth(rows))}")
    if as_json:
        told = {"resources": chosen, "rows_per_part": rows_per_part, "processors": processors}
        click.echo(json.dumps({**told, "seconds_per_thousand_more": growth(rows), "runs": rows}))


if __name__ == "__main__":
    main()
