"""Commands that run stages, comparisons and sweeps in this process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mint_ray.cli.group import VERBS, load_spec, takes_spec
from mint_ray.telemetry import configure_logging

if TYPE_CHECKING:
    from mint_ray.artifacts import Artifact
    from mint_ray.config.pipeline import PipelineConfig
    from mint_ray.config.sweep import SweepConfig

LOG_FILE = click.option(
    "--log-file", type=click.Path(path_type=Path), help="Log file (default: mint-ray.log in the root)."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on the last line of stdout.")


def stage_command(verb: str) -> click.Command:
    """Return the command that runs the stages up to the one of `verb`."""
    last, summary = VERBS[verb]

    @click.command(verb, help=summary, short_help=summary)
    @takes_spec
    @LOG_FILE
    @JSON
    def command(log_file: Path | None, as_json: bool, show: int = 0, **given: Any) -> None:
        config: PipelineConfig = load_spec(**given)
        configure_logging(log_file or _log_file(config.root))

        from mint_ray.pipeline import run_pipeline

        done = run_pipeline(config, last)
        _print_result(done, last)
        if show:
            from mint_ray.reports.pair import render_pair
            from mint_ray.stages.pair import sample_pairs

            for pair in sample_pairs(done["pair"], show):
                click.echo(f"\n{render_pair(pair)}")
        if as_json:
            _print_json(_outcome(done))

    if verb == "pair":
        # added afterwards: no other command has pairs to show
        click.option("--show", type=click.IntRange(min=0), default=0, help="Number of training pairs to print.")(
            command
        )
    return command


def _check_trials(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not (value.removeprefix("+").isdecimal() and int(value)):
        raise click.BadParameter(f"got {value!r}; expected a number such as 36, or +20")
    return value


@click.command()
@takes_spec
@click.option(
    "--trials",
    metavar="[+]N",
    callback=_check_trials,
    help="Total number of trials; +N: as many more than the spec says.",
)
@LOG_FILE
@JSON
def sweep(trials: str | None, log_file: Path | None, as_json: bool, **given: Any) -> None:
    """Search for the best values of a spec.

    Searches `sweep.space` of SPEC, then runs the best spec on the test split. The same command continues an interrupted
    sweep. The exit code is 1 if a trial failed.
    """
    from mint_ray import storage
    from mint_ray.config.sweep import SweepConfig

    more = int(trials[1:]) if trials and trials.startswith("+") else 0
    if trials and not more:
        given["overrides"] += (f"sweep.n_trials={trials}",)
    config: SweepConfig = load_spec(**given, cls=SweepConfig)
    configure_logging(log_file or _log_file(config.root))

    from mint_ray.sweep.run import run_sweep

    result = run_sweep(config, more)
    click.echo(storage.read_bytes(result.report.file_uri("table.txt")).decode())
    click.echo(f"best spec: {result.report.file_uri('best.yaml')}")
    click.echo(f"report: {result.report.file_uri('report.html')}")
    if as_json:
        summary = {"study": result.study, "winner": result.winner, "trials": result.trials}
        _print_json({"report": result.report.uri, **summary})
    if result.failed:
        sys.exit(1)


@click.command()
@takes_spec
@LOG_FILE
@JSON
def compare(log_file: Path | None, as_json: bool, **given: Any) -> None:
    """Run every method with every seed and compare them.

    SPEC is the spec of a run with `methods` and `seeds`. A method that fails is listed in the table, the others
    continue, and the exit code is 1. The same command continues an interrupted comparison.
    """
    from mint_ray.config.comparison import ComparisonConfig

    config = load_spec(cls=ComparisonConfig, **given)
    configure_logging(log_file or _log_file(config.root))

    from mint_ray import storage
    from mint_ray.compare.run import run_comparison

    compared = run_comparison(config)
    click.echo(storage.read_bytes(compared.report.file_uri("table.txt")).decode())
    click.echo(f"report: {compared.report.file_uri('report.html')}")
    if as_json:
        metrics = compared.report.manifest.metrics
        _print_json({"report": compared.report.uri, "metrics": metrics, "failed": compared.failed})
    if compared.failed:
        sys.exit(1)


def _print_json(result: dict[str, Any]) -> None:
    """Print one JSON object; anything that libraries print at exit then goes to standard error."""
    click.echo(json.dumps(result))
    if sys.stdout is sys.__stdout__:  # not redirected by a caller in this process
        os.dup2(2, 1)


def _log_file(root: str) -> Path:
    is_remote = "://" in root and not root.startswith("file://")
    return Path("mint-ray.log") if is_remote else Path(root.removeprefix("file://")) / "mint-ray.log"


def _print_result(done: dict[str, Artifact], last: str) -> None:
    from mint_ray import storage

    if last == "report":
        report = done["report"]
        click.echo(storage.read_bytes(report.file_uri("table.txt")).decode())
        click.echo(f"report: {report.file_uri('report.html')}")
        return
    # a stage that writes several artifacts has keys such as answer/aligned-rank
    for key, artifact in done.items():
        if key.partition("/")[0] == last:
            for name, count in sorted(artifact.manifest.counts.items()):
                click.echo(f"{name}: {count:,}")
            click.echo(f"{key}: {artifact.uri}")


def _outcome(done: dict[str, Artifact]) -> dict[str, Any]:
    return {
        "artifacts": {stage: artifact.uri for stage, artifact in done.items()},
        "metrics": done["evaluate"].manifest.metrics if "evaluate" in done else {},
        "seconds": {stage: artifact.manifest.seconds for stage, artifact in done.items()},
    }
