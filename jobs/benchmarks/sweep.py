"""Time a sweep against its trials as separate runs, one after the other, and show where the difference comes from.

    python jobs/benchmarks/sweep.py jobs/rare_disease.sweep.yaml sweep.n_trials=6 --json

The sweep is `mint-ray sweep`, from its start to its report. Then `mint-ray evaluate` runs the default and every trial,
pruned ones included, each in an empty root, and the default and the winner on the test split too.
`--separate-trials 3` runs the default and at most three trials, the winner among them, and assumes their mean for the
others. `ratio` is the time of the separate runs over that of the sweep; `trials_ratio` counts only the trials, although
the time of the sweep includes everything. `saved_seconds` is the difference per group of stages: artifacts that trials
share are made once, and pruned trials are not trained to the end. The rest is `parallelism and startup`: trials run in
parallel, and every separate run starts a process.
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
from mint_ray.config.loader import dump, load
from mint_ray.config.sweep import SweepConfig

STAGE_GROUPS = {
    "prepare": "scores",
    "fit": "scores",
    "score": "scores",
    "build_vlm": "built student",
    "pair": "pairs",
    "tokenize": "pairs",
    "train": "training and pruning",
}
OTHER_STAGES, REST = "answers and reports", "parallelism and startup"
GROUPS = (*dict.fromkeys(STAGE_GROUPS.values()), OTHER_STAGES)


def run_command(*arguments: str, codes: tuple[int, ...] = (0,)) -> tuple[float, dict[str, Any]]:
    """Run `mint-ray` and return the seconds that it took and its JSON object."""
    command = [sys.executable, "-c", "from mint_ray.cli import main; main()", *arguments, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ), check=False)
    if done.returncode not in codes:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}")
    seconds = time.perf_counter() - started
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise SystemExit(f"{' '.join(arguments)}: the last line is no JSON object:\n{done.stdout[-2000:]}") from None
    return seconds, found


def seconds_by_group(root: Path) -> dict[str, float]:
    """Return the seconds in which the artifacts below a root were made, per group of stages."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for path in root.glob("*-*/manifest.json"):
        manifest = read_manifest(str(path.parent))
        seconds[STAGE_GROUPS.get(manifest.stage, OTHER_STAGES)] += manifest.seconds
    return seconds


def run_sweep(spec: Path, overrides: tuple[str, ...], root: Path) -> tuple[float, dict[str, float], Any, str]:
    """Run the sweep; return its seconds, in total and per group, its trials and the name of the winner."""
    # without further seeds, which separate trials would not train either
    arguments = ["sweep", str(spec), *overrides, "sweep.num_seeds=0", "--root", str(root)]
    total, found = run_command(*arguments, codes=(0, 1))
    rows = json.loads((Path(found["report"]) / "trials.json").read_text())
    trials = {f"trial-{row['number']}": row for row in rows if row["state"] != "fail"}
    seconds = seconds_by_group(root)
    seconds["training and pruning"] += sum(row["wall_seconds"] for row in trials.values() if row["state"] == "pruned")
    winner = next(name for name, row in trials.items() if row["changes"] == found["winner"])
    return total, seconds, trials, winner


def choose_trials(trials: dict[str, Any], winner: str, maximum: int | None) -> list[str]:
    """Return the trials to run separately: the winner, and others spread over the sweep (later trials are similar)."""
    names = [winner, *(name for name in trials if name != winner)]
    return names[:: math.ceil(len(names) / (maximum or len(names)))]


@click.command()
@click.argument("spec", type=click.Path(exists=True, path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--separate-trials", type=click.IntRange(min=1), help="Maximum number of trials to run separately.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def main(spec: Path, overrides: tuple[str, ...], separate_trials: int | None, as_json: bool) -> None:
    """Time the sweep of SPEC against its trials as separate runs."""
    with tempfile.TemporaryDirectory() as folder:
        sweep_seconds, sweep_groups, trials, winner = run_sweep(spec, overrides, Path(folder) / "sweep")
        pipeline = Path(folder) / "pipeline.yaml"
        pipeline.write_text(json.dumps(dump(load(SweepConfig, spec, overrides).pipeline)))

        def run_separately(name: str, split: str) -> float:
            changes = trials[name]["changes"] if name in trials else {}
            assignments = [f"{path}={json.dumps(value)}" for path, value in changes.items()]
            root = str(Path(folder) / name)
            arguments = ["evaluate", str(pipeline), *assignments, f"evaluate.split={split}", "--root", root]
            seconds, _ = run_command(*arguments)
            click.echo(f"{name}, {split}: {seconds:.1f} s", err=True)
            return seconds

        chosen = choose_trials(trials, winner, separate_trials)
        seconds = {name: run_separately(name, "validation") for name in chosen}
        default_seconds = run_separately("default", "validation")
        test_seconds = sum(run_separately(name, "test") for name in ("default", winner))
        scale = len(trials) / len(seconds)
        saved = {group: -seconds for group, seconds in sweep_groups.items()}
        for name in [*chosen, "default"]:
            for group, share in seconds_by_group(Path(folder) / name).items():
                saved[group] += share if name == "default" else share * scale
    trial_seconds = sum(seconds.values()) * scale
    separate_seconds = default_seconds + trial_seconds + test_seconds
    saved = {group: round(value, 1) for group, value in saved.items()}
    saved[REST] = round(separate_seconds - sweep_seconds - sum(saved.values()), 1)
    result = {
        "trials": len(trials),
        "pruned": sum(row["state"] == "pruned" for row in trials.values()),
        "sweep_seconds": round(sweep_seconds, 1),
        "separate_seconds": round(separate_seconds, 1),
        "separate_trials": len(seconds),
        "trial_seconds": [round(min(seconds.values()), 1), round(max(seconds.values()), 1)],
        "ratio": round(separate_seconds / sweep_seconds, 3),
        "trials_ratio": round(trial_seconds / sweep_seconds, 3),
        "saved_seconds": saved,
        "cpus": os.cpu_count(),
    }
    click.echo(", ".join(f"{key} {value}" for key, value in result.items() if key != "saved_seconds"))
    click.echo(f"saved: {', '.join(f'{group} {value:+.1f} s' for group, value in saved.items())}")
    if as_json:
        click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
