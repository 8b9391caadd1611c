"""Time the sampling of preference pairs from stored scores, for several samplers on one score artifact.

    python jobs/benchmarks/pair.py --records 1000000 --samplers hard --json
    python jobs/benchmarks/pair.py --records 100000 --samplers hard,margin,uniform,top_bottom

Patients are simulated from the annotations of real diseases, and the scores are random: no teacher runs.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import psutil
from patients import write_records

from mint_ray.artifacts import Artifact, open_artifact, verify
from mint_ray.config.loader import from_data
from mint_ray.config.stages import Pair
from mint_ray.records import Label, Split, TeacherScores
from mint_ray.runtime.session import connect
from mint_ray.stages.pair import draw_pairs
from mint_ray.tasks.config import RareDisease

SPLIT_CYCLE: tuple[Split, ...] = ("validation", *("train",) * 9)
"""Splits of consecutive records, repeated."""
TOP = 3


def write_inputs(root: str, count: int, labels: int, rows_per_part: int) -> tuple[Artifact, Artifact]:
    """Write records of real diseases, and scores as a teacher would write them."""
    records = write_records(root, count, labels, rows_per_part, SPLIT_CYCLE)
    chosen = [label.label_id for label in records.rows(Label, "labels")]

    def scores(number: int) -> TeacherScores:
        rng = random.Random(number)
        value = {label: rng.random() for label in chosen}
        value[chosen[number % len(chosen)]] += 1
        ranked = sorted(chosen, key=lambda label: -value[label])
        return TeacherScores(
            record_id=f"r{number:08d}", split=SPLIT_CYCLE[number % 10], teacher="simulated",
            labels=ranked, scores=[value[label] for label in ranked],
        )  # fmt: skip

    scored = open_artifact(root, "score", {}, {"records": records.name})
    with scored.write() as draft:
        draft.metrics["scores"] = {}
        draft.write_rows(TeacherScores, "scores", map(scores, range(count)), rows_per_part=rows_per_part)
    return records, scored


@click.command()
@click.option("--records", default=100_000, show_default=True, help="Number of records.")
@click.option("--labels", default=30, show_default=True, help="Number of labels.")
@click.option("--samplers", default="hard", show_default=True, help="Comma-separated kinds of samplers.")
@click.option("--rows-per-part", default=1000, show_default=True, help="Records per part.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def main(records: int, labels: int, samplers: str, rows_per_part: int, as_json: bool) -> None:
    """Time the sampling of pairs."""
    runs: list[dict[str, Any]] = []
    connect()
    with tempfile.TemporaryDirectory() as root:
        prepared, scored = write_inputs(root, records, labels, rows_per_part)
        for kind in samplers.split(","):
            config = from_data(Pair, {"sampler": {"kind": kind, "top": TOP}})
            started, cpu_started = time.perf_counter(), sum(os.times()[:4])
            pairs = draw_pairs(root, config, RareDisease(), prepared, scored)
            run = {
                "sampler": kind,
                "records": records,
                "pairs": pairs.manifest.counts["pairs_train"] + pairs.manifest.counts["pairs_validation"],
                "seconds": round(time.perf_counter() - started, 1),
                "driver_cpu_seconds": round(sum(os.times()[:4]) - cpu_started, 1),
                "driver_mib": round(psutil.Process().memory_info().rss / 2**20),
                "mib_written": round(sum(file.bytes for file in pairs.manifest.files) / 2**20, 1),
                "problems": verify(pairs.uri) if records <= 100_000 else None,
            }
            runs.append(run)
            click.echo(", ".join(f"{key} {value}" for key, value in run.items()))
        left = sorted(path.name for path in Path(root).iterdir() if path.name.startswith("score-"))
    click.echo(f"score artifacts: {len(left)}; load average {os.getloadavg()[0]:.1f}")
    if as_json:
        click.echo(json.dumps({"cpus": os.cpu_count(), "load": os.getloadavg()[0], "runs": runs}))


if __name__ == "__main__":
    main()
