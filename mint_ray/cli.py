"""The command line: `mint-ray VERB SPEC [a.b=c ...]`, one verb per stage."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mint_ray.loading import UserError
from mint_ray.telemetry import log_to

if TYPE_CHECKING:
    from mint_ray.artifacts import Artifact
    from mint_ray.config import PipelineConfig

logger = logging.getLogger("mint_ray")

VERBS = {
    "run": ("report", "Run every stage; what is complete is not run again."),
    "prepare": ("prepare", "Read records, choose labels, split by group."),
    "fit": ("fit", "Make the teacher ready."),
    "score": ("score", "Let the teacher rank every label of every record."),
    "pair": ("pair", "Draw preference pairs from the scores."),
    "train": ("train", "Align the student with the pairs."),
    "evaluate": ("evaluate", "Compare base and aligned student on the test split."),
    "report": ("report", "Write the report of a run, running what is missing."),
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mint-ray")
def cli() -> None:
    """Move what a multimodal teacher knows into a unimodal language model.

    Each verb runs its stage of SPEC and those before it that are not complete.
    """


def _add_stage(verb: str, last: str, summary: str) -> None:
    @cli.command(verb, help=summary, short_help=summary)
    @click.argument("spec", type=click.Path(path_type=Path))
    @click.argument("overrides", nargs=-1, metavar="[a.b=c ...]")
    @click.option("--root", help="Where artifacts go: a folder, s3://... or gs://... (default: the spec's root).")
    @click.option("--log-file", type=click.Path(path_type=Path), help="Log file (default: mint-ray.log in the root).")
    @click.option("--json", "as_json", is_flag=True, help="Make the last line of standard output one JSON object.")
    def command(spec: Path, overrides: tuple[str, ...], root: str | None, log_file: Path | None, as_json: bool) -> None:
        config = _load(spec, overrides, root)
        log_to(log_file or _log_file(config.root))

        from mint_ray.pipeline import run_pipeline

        done = run_pipeline(config, last)
        _show(done, last)
        if as_json:
            click.echo(json.dumps(_outcome(done)))


for _verb, (_last, _summary) in VERBS.items():
    _add_stage(_verb, _last, _summary)


@cli.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[a.b=c ...]")
@click.option("--root", help="Where artifacts would go (default: the spec's root).")
def check(spec: Path, overrides: tuple[str, ...], root: str | None) -> None:
    """Check the spec, the inputs and the student without starting any work."""
    config = _load(spec, overrides, root)
    log_to(None)

    from mint_ray.pipeline import check_pipeline
    from mint_ray.stages.pair import check_lengths
    from mint_ray.stages.prepare import select_records

    check_pipeline(config)
    prepared = select_records(config.prepare, config.task)
    check_lengths(config.pair, len(prepared.labels))
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in sorted(prepared.dropped.items())) or "none"
    click.echo(f"{spec}: good; {len(prepared.records):,} records, {len(prepared.labels):,} labels; dropped: {dropped}")


@cli.command()
@click.argument("uri")
def verify(uri: str) -> None:
    """Recompute what the manifest of the artifact at URI claims."""
    from mint_ray.artifacts import read_manifest
    from mint_ray.artifacts import verify as find_problems

    problems = find_problems(uri)
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        sys.exit(1)
    manifest = read_manifest(uri)
    click.echo(f"{uri}: good; {len(manifest.files)} files, {sum(file.rows or 0 for file in manifest.files):,} rows")


@cli.command()
@click.argument("uri")
@click.option("--format", "form", required=True, help="trl, ms-swift, llamafactory or distilabel.")
@click.option("--to", required=True, help="An empty or new folder, s3://... or gs://...")
def export(uri: str, form: str, to: str) -> None:
    """Write the pairs of the artifact at URI in the columns that another trainer reads."""
    from mint_ray.exports import export_pairs

    for split, count in export_pairs(uri, form, to).items():
        click.echo(f"{split}: {count:,}")
    click.echo(f"{form}: {to}")


@cli.command()
def schema() -> None:
    """Print the JSON Schema of a spec."""
    from mint_ray.config import PipelineConfig
    from mint_ray.loading import json_schema

    click.echo(json.dumps(json_schema(PipelineConfig), indent=2))


def main() -> None:
    """Entry point: exit code 2 and one line for what the user can mend, 1 for any other failure."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        click.echo(f"mint-ray: {error}", err=True)
        sys.exit(2)
    except Exception as error:
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                with Path(handler.baseFilename).open("a", encoding="utf-8") as log:
                    log.write(traceback.format_exc())
                click.echo(f"mint-ray: the whole traceback is in {handler.baseFilename}", err=True)
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [repr(error)]
        click.echo(f"mint-ray: failed: {type(error).__name__}: {lines[-1].strip()}", err=True)
        sys.exit(1)


def _load(spec: Path, overrides: tuple[str, ...], root: str | None) -> PipelineConfig:
    from mint_ray.config import PipelineConfig
    from mint_ray.loading import load

    return load(PipelineConfig, spec, [*overrides, *([f"root={root}"] if root else [])])


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
