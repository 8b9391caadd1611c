"""Time the score stage against the bare teacher in a plain loop, on the same records and cores, in turns.

    python jobs/benchmarks/score.py --teacher ontology --records 2000 --json
    python jobs/benchmarks/score.py --teacher constant --records 10000,100000,1000000 --rounds 1 --json

The loop has up to 20,000 of the records in memory and throws the rankings away; the stage reads all from storage,
writes, and starts its actors, on as many processors as `--actors`. Their ratio is what Ray and storage cost;
`ratio_after_start` leaves out the seconds that the stage takes for a single record. The growth of the driver's memory
is what the stage holds there. `table` keeps every score in a dictionary, which takes longer to load than to ask at a
million records: `constant` gives every record the same ranking and leaves the stage's own cost alone.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import psutil

from mint_ray.artifacts import Artifact, open_artifact, read_part, verify
from mint_ray.loading import dump
from mint_ray.ontology import PHENOTYPIC_ABNORMALITY, load_ontology, read_annotations
from mint_ray.records import SPLITS, Label, Phenotype, Record, TeacherScores, from_table
from mint_ray.stages import score as stage
from mint_ray.stages.config import Fit, Score, ScoreResources
from mint_ray.stages.fit import fit_teacher
from mint_ray.stages.session import connect
from mint_ray.tasks.config import RareDisease
from mint_ray.teachers import Teacher
from mint_ray.teachers.config import Ontology, Table

IN_LOOP = 20_000
"""Most records of the plain loop."""
FINDINGS = 5
"""Coded findings of a record."""


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


def write_records(root: str, count: int, labels: int, rows_per_part: int) -> Artifact:
    """Made-up records with real findings, of as many real diseases as labels are asked for."""
    ontology = load_ontology()
    diseases: dict[str, list[str]] = {}
    for annotation in read_annotations():
        term = ontology.resolve(annotation.term_id)
        if term and ontology.is_a(term, PHENOTYPIC_ABNORMALITY) and annotation.disease_id.startswith("OMIM"):
            diseases.setdefault(annotation.disease_id, []).append(term)
    chosen = sorted(disease for disease, terms in diseases.items() if len(terms) >= 2 * FINDINGS)[:labels]

    def record(number: int) -> Record:
        disease = chosen[number % len(chosen)]
        terms = [diseases[disease][(number // 7 + place) % len(diseases[disease])] for place in range(FINDINGS)]
        return Record(
            record_id=f"r{number:08d}", group_id=f"g{number}", label_id=disease, split=SPLITS[number % 3],
            phenotypes=[Phenotype(id=term, label=term) for term in terms],
        )  # fmt: skip

    artifact = open_artifact(root, "prepare", {"records": count, "labels": labels, "rows_per_part": rows_per_part}, {})
    with artifact.write() as draft:
        draft.write_rows(Record, "records", map(record, range(count)), rows_per_part=rows_per_part)
        draft.write_rows(Label, "labels", [Label(label_id=disease, name=disease) for disease in chosen])
    return artifact


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


@click.command()
@click.option("--teacher", type=click.Choice(["constant", "table", "ontology"]), default="ontology", show_default=True)
@click.option("--records", default="2000", help="How many; several with commas between.", show_default=True)
@click.option("--labels", default=30, show_default=True, help="Labels that are ranked.")
@click.option("--actors", default=1, show_default=True, help="Actors of one processor each.")
@click.option("--rows-per-part", default=1000, show_default=True, help="Records of one part.")
@click.option("--batch-size", default=64, show_default=True, help="Records the teacher is given at a time.")
@click.option("--rounds", default=3, show_default=True, help="Turns of loop and stage.")
@click.option("--json", "as_json", is_flag=True, help="Make the last line one JSON object.")
def main(
    teacher: str,
    records: str,
    labels: int,
    actors: int,
    rows_per_part: int,
    batch_size: int,
    rounds: int,
    as_json: bool,
) -> None:
    """Time the score stage against the bare teacher."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    stage.TeacherActor = LoadingActor  # type: ignore[misc]
    config = Score(resources=ScoreResources(actors=actors, batch_size=batch_size))
    connect()
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for count in map(int, records.split(",")):
            rows.append(measure(root, teacher, count, labels, rounds, config, rows_per_part))
            row = rows[-1]
            click.echo(
                f"{teacher}, {count:,} records: stage {row['stage_rows_per_second']:,.0f} rows/s "
                f"({row['stage_seconds']} s), bare loop {row['bare_rows_per_second']:,.0f} rows/s, "
                f"ratio {row['ratio']:.3g}, {row['start_seconds']} s of it to start, driver +{row['driver_mib']} MiB"
            )
    if as_json:
        click.echo(json.dumps({"actors": actors, "processors": os.cpu_count(), "runs": rows}))


if __name__ == "__main__":
    main()
