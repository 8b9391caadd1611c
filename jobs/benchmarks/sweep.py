"""Time a sweep against the same trials as whole runs of their own, one after the other, and say where the gain lies.

    python jobs/benchmarks/sweep.py jobs/rare_disease.sweep.yaml sweep.trials=6 --json

The sweep is `mint-ray sweep`, from its start to its report. What the report holds is then made again by
`mint-ray evaluate`, as somebody would who changes a spec and runs it again: the default and each trial, those that were
given up too, in an empty root of its own, and the default and the winner on the test split where they have been
trained. `--alone 3` makes the default and three trials at most, the winner among them, and takes the others to last as
long as these on average; the shortest and the longest of them are told. `ratio` is the time of all that over the
sweep's; `trials_ratio` leaves out of it what is no trial, though the sweep's time holds it. `gained_seconds` says how
many seconds less the sweep spent in which stages: what several trials share is made once, and what is given up is not
made to its end. `beside` is what is left: trials that ran beside each other, and the start of a process for each.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from mint_ray.artifacts import read_manifest

STAGES = {
    "scores": ("prepare", "fit", "score"),
    "joined student": ("join",),
    "pairs": ("pair", "tokenize"),
    "training and pruning": ("train",),
    "answers": ("answer", "evaluate", "report", "sweep"),
}


def mint_ray(*arguments: str, codes: tuple[int, ...] = (0,)) -> tuple[float, dict[str, Any]]:
    """Seconds that the command took, and the object that it printed last."""
    command = [sys.executable, "-c", "from mint_ray.cli import main; main()", *arguments, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    if done.returncode not in codes:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}")
    seconds = time.perf_counter() - started
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise SystemExit(f"{' '.join(arguments)}: its last line is no JSON object:\n{done.stdout[-2000:]}") from None
    return seconds, found


def seconds_by_part(root: Path) -> dict[str, float]:
    """Seconds that the artifacts below a root took to make, by the parts of `STAGES`."""
    seconds = dict.fromkeys(STAGES, 0.0)
    for path in root.glob("*-*/manifest.json"):
        manifest = read_manifest(str(path.parent))
        part = next(part for part, stages in STAGES.items() if manifest.stage in stages)
        # the time of an evaluation holds that of its answers
        if manifest.stage != "answer":
            seconds[part] += manifest.seconds
    return seconds


@click.command()
@click.argument("spec", type=click.Path(exists=True, path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--alone", "most_alone", type=click.IntRange(min=1), help="Run at most so many trials alone.")
@click.option("--json", "as_json", is_flag=True, help="Make the last line one JSON object.")
def main(spec: Path, overrides: tuple[str, ...], most_alone: int | None, as_json: bool) -> None:
    """Time the sweep of SPEC against its trials one by one."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "sweep"
        # seeds are runs that the trials alone would not make either
        sweep_seconds, swept = mint_ray(
            "sweep", str(spec), *overrides, "sweep.seeds=0", "--root", str(root), codes=(0, 1)
        )
        spent = seconds_by_part(root)
        trials = [
            row for row in json.loads((Path(swept["report"]) / "trials.json").read_text()) if row["state"] != "fail"
        ]
        spent["training and pruning"] += sum(row["wall_seconds"] for row in trials if row["state"] == "pruned")
        config = read_manifest(swept["report"]).config["sweep"]
        alone = Path(place) / "alone.yaml"
        alone.write_text(json.dumps({key: value for key, value in config.items() if key != "sweep"}))

        def run_alone(name: str, changes: list[str], split: str) -> float:
            root = Path(place) / name
            seconds, _ = mint_ray("evaluate", str(alone), *changes, f"evaluate.split={split}", "--root", str(root))
            click.echo(f"{name}, {split}: {seconds:.1f} s alone", err=True)
            return seconds

        specs = {
            f"trial-{row['number']}": [f"{path}={json.dumps(value)}" for path, value in row["changes"].items()]
            for row in trials
        }
        winner = next(f"trial-{row['number']}" for row in trials if row["changes"] == swept["winner"])
        names = [winner, *(name for name in specs if name != winner)]
        # spread over the sweep, for its later trials are more alike
        run = names[:: math.ceil(len(names) / (most_alone or len(names)))]
        specs = {name: specs[name] for name in run}
        specs["default"] = []
        seconds = {name: run_alone(name, changes, "validation") for name, changes in specs.items()}
        tested_seconds = sum(run_alone(name, specs[name], "test") for name in ("default", winner))
        default_seconds = seconds.pop("default")
        stands_for = len(trials) / len(seconds)
        alone_spent = dict.fromkeys(STAGES, 0.0)
        for name in specs:
            for part, share in seconds_by_part(Path(place) / name).items():
                alone_spent[part] += share if name == "default" else share * stands_for
    trial_seconds = sum(seconds.values()) * stands_for
    alone_seconds = default_seconds + trial_seconds + tested_seconds
    gained = {part: round(alone_spent[part] - spent[part], 1) for part in STAGES}
    gained["beside"] = round(alone_seconds - sweep_seconds - sum(gained.values()), 1)
    ratio = alone_seconds / sweep_seconds
    click.echo(
        f"{len(trials)} trials: sweep {sweep_seconds:.1f} s, one by one {alone_seconds:.1f} s ({len(seconds)} run, "
        f"{min(seconds.values()):.1f} to {max(seconds.values()):.1f} s), ratio {ratio:.2f} "
        f"(trials only {trial_seconds / sweep_seconds:.2f}); "
        + ", ".join(f"{part} {seconds:+.1f} s" for part, seconds in gained.items())
    )
    if as_json:
        told = {
            "trials": len(trials),
            "pruned": sum(row["state"] == "pruned" for row in trials),
            "sweep_seconds": round(sweep_seconds, 1),
            "alone_seconds": round(alone_seconds, 1),
            "trials_alone": len(seconds),
            "trial_seconds": [round(min(seconds.values()), 1), round(max(seconds.values()), 1)],
            "ratio": round(ratio, 3),
            "trials_ratio": round(trial_seconds / sweep_seconds, 3),
            "gained_seconds": gained,
            "processors": os.cpu_count(),
        }
        click.echo(json.dumps(told))


if __name__ == "__main__":
    main()
