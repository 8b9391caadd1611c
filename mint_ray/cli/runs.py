"""The verbs that run stages, comparisons and sweeps here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mint_ray.cli.group import VERBS, cli, load_spec, takes_spec
from mint_ray.telemetry import log_to

if TYPE_CHECKING:
    from mint_ray.artifacts import Artifact
    from mint_ray.config.pipeline import PipelineConfig


def _add_stage(verb: str, last: str, summary: str) -> None:
    @cli.command(verb, help=summary, short_help=summary)
    @takes_spec
    @click.option("--log-file", type=click.Path(path_type=Path), help="Log file (default: mint-ray.log in the root).")
    @click.option("--json", "as_json", is_flag=True, help="Make the last line of standard output one JSON object.")
    def command(log_file: Path | None, as_json: bool, show: int = 0, **given: Any) -> None:
        config: PipelineConfig = load_spec(**given)
        log_to(log_file or _log_file(config.root))

        from mint_ray.pipeline import run_pipeline

        done = run_pipeline(config, last)
        _show(done, last)
        if show:
            from mint_ray.reports.pair import describe_pair
            from mint_ray.stages.pair import sample_pairs

            for pair in sample_pairs(done["pair"], show):
                click.echo(f"\n{describe_pair(pair)}")
        if as_json:
            _print_last(_outcome(done))

    if verb == "pair":
        # applied to the finished command: the other verbs have no pairs to show
        click.option("--show", type=click.IntRange(min=0), default=0, help="Print so many pairs to train on.")(command)


for _verb, (_last, _summary) in VERBS.items():
    _add_stage(_verb, _last, _summary)


def _check_trials(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not (value.removeprefix("+").isdecimal() and int(value)):
        raise click.BadParameter(f"got {value!r}; expected a number such as 36, or +20")
    return value


@cli.command()
@takes_spec
@click.option(
    "--trials", metavar="[+]N", callback=_check_trials, help="Trials in all, or with + so many more than the spec says."
)
@click.option("--log-file", type=click.Path(path_type=Path), help="Log file (default: mint-ray.log in the root).")
@click.option("--json", "as_json", is_flag=True, help="Make the last line of standard output one JSON object.")
def sweep(trials: str | None, log_file: Path | None, as_json: bool, **given: Any) -> None:
    """Find the best spec: try what `sweep.space` of SPEC allows, and run the best on the test split.

    The same command goes on with a sweep that was cut off. Exit code 1 if a trial raised.
    """
    from mint_ray import storage
    from mint_ray.config.sweep import SweepConfig

    more = int(trials[1:]) if trials and trials.startswith("+") else 0
    if trials and not more:
        given["overrides"] += (f"sweep.trials={trials}",)
    config: SweepConfig = load_spec(**given, cls=SweepConfig)
    log_to(log_file or _log_file(config.root))

    from mint_ray.sweep.run import run_sweep

    outcome = run_sweep(config, more)
    click.echo(storage.read_bytes(outcome.report.file_uri("table.txt")).decode())
    click.echo(f"best spec: {outcome.report.file_uri('best.yaml')}")
    click.echo(f"report: {outcome.report.file_uri('report.html')}")
    if as_json:
        told = {"study": outcome.study, "winner": outcome.winner, "trials": outcome.trials}
        _print_last({"report": outcome.report.uri, **told})
    if outcome.failed:
        sys.exit(1)


@cli.command()
@takes_spec
@click.option("--log-file", type=click.Path(path_type=Path), help="Log file (default: mint-ray.log in the root).")
@click.option("--json", "as_json", is_flag=True, help="Make the last line of standard output one JSON object.")
def compare(log_file: Path | None, as_json: bool, **given: Any) -> None:
    """Run every method of SPEC with every seed, then compare them.

    SPEC is that of a run with `methods` and `seeds`. A method that fails is named in the table, and the others go on;
    the exit code is then 1. The same command goes on where it was cut off.
    """
    from mint_ray.config.comparison import ComparisonConfig

    config = load_spec(cls=ComparisonConfig, **given)
    log_to(log_file or _log_file(config.root))

    from mint_ray import storage
    from mint_ray.compare.run import run_comparison

    compared = run_comparison(config)
    click.echo(storage.read_bytes(compared.report.file_uri("table.txt")).decode())
    click.echo(f"report: {compared.report.file_uri('report.html')}")
    if as_json:
        metrics = compared.report.manifest.metrics
        _print_last({"report": compared.report.uri, "metrics": metrics, "failed": compared.failed})
    if compared.failed:
        sys.exit(1)


def _print_last(found: dict[str, Any]) -> None:
    """Print one JSON object; what libraries print as they are torn down goes to standard error after it."""
    click.echo(json.dumps(found))
    if sys.stdout is sys.__stdout__:  # not what a caller in this process put there
        os.dup2(2, 1)


def _log_file(root: str) -> Path:
    return (
        Path("mint-ray.log")
        if "://" in root and not root.startswith("file://")
        else (Path(root.removeprefix("file://")) / "mint-ray.log")
    )


def _show(done: dict[str, Artifact], last: str) -> None:
    from mint_ray import storage

    if last == "report":
        report = done["report"]
        click.echo(storage.read_bytes(report.file_uri("table.txt")).decode())
        click.echo(f"report: {report.file_uri('report.html')}")
        return
    for key, value in sorted(done[last].manifest.counts.items()):
        click.echo(f"{key}: {value:,}")
    click.echo(f"{last}: {done[last].uri}")


def _outcome(done: dict[str, Artifact]) -> dict[str, Any]:
    return {
        "artifacts": {stage: artifact.uri for stage, artifact in done.items()},
        "metrics": done["evaluate"].manifest.metrics if "evaluate" in done else {},
        "seconds": {stage: artifact.manifest.seconds for stage, artifact in done.items()},
    }
