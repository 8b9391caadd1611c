"""The command line: `mint-ray VERB SPEC [--with FILE]... [a.b=c ...]`, one verb per stage."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable
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
    "tokenize": ("tokenize", "Turn the pairs into the student's tokens."),
    "train": ("train", "Align the student with the pairs."),
    "evaluate": ("evaluate", "Compare base and aligned student on the test split."),
    "report": ("report", "Write the report of a run, running what is missing."),
}


LAYERS = (
    "Lay a partial spec over SPEC, for instance one of jobs/presets; may be given several times. Later files, and "
    "a.b=c last of all, win."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mint-ray")
def cli() -> None:
    """Move what a multimodal teacher knows into a unimodal language model.

    Each verb runs its stage of SPEC and those before it that are not complete.
    """


def _takes_spec(command: Callable[..., None]) -> Callable[..., None]:
    """What every verb that reads a spec takes to make its config."""
    for parameter in (
        click.option("--root", help="Where artifacts go: a folder, s3://... or gs://... (default: the spec's root)."),
        click.option("--with", "layers", multiple=True, metavar="FILE", type=click.Path(path_type=Path), help=LAYERS),
        click.argument("overrides", nargs=-1, metavar="[a.b=c ...]"),
        click.argument("spec", type=click.Path(path_type=Path)),
    ):
        command = parameter(command)
    return command


def _add_stage(verb: str, last: str, summary: str) -> None:
    @cli.command(verb, help=summary, short_help=summary)
    @_takes_spec
    @click.option("--log-file", type=click.Path(path_type=Path), help="Log file (default: mint-ray.log in the root).")
    @click.option("--json", "as_json", is_flag=True, help="Make the last line of standard output one JSON object.")
    def command(log_file: Path | None, as_json: bool, show: int = 0, **given: Any) -> None:
        config = _load(**given)
        log_to(log_file or _log_file(config.root))

        from mint_ray.pipeline import run_pipeline

        done = run_pipeline(config, last)
        _show(done, last)
        if show:
            from mint_ray.stages.pair import describe_pair, sample_pairs

            for pair in sample_pairs(done["pair"], show):
                click.echo(f"\n{describe_pair(pair)}")
        if as_json:
            click.echo(json.dumps(_outcome(done)))

    if verb == "pair":
        # applied to the finished command: the other verbs have no pairs to show
        click.option("--show", type=click.IntRange(min=0), default=0, help="Print so many pairs to train on.")(command)


for _verb, (_last, _summary) in VERBS.items():
    _add_stage(_verb, _last, _summary)


@cli.command()
@_takes_spec
@click.option("--log-file", type=click.Path(path_type=Path), help="Log file (default: mint-ray.log in the root).")
@click.option("--json", "as_json", is_flag=True, help="Make the last line of standard output one JSON object.")
def compare(log_file: Path | None, as_json: bool, **given: Any) -> None:
    """Run every method of SPEC with every seed, then compare them.

    SPEC is that of a run with `methods` and `seeds`. A method that fails is named in the table, and the others go on;
    the exit code is then 1. The same command goes on where it was cut off.
    """
    from mint_ray.config import ComparisonConfig

    config = _load(cls=ComparisonConfig, **given)
    log_to(log_file or _log_file(config.root))

    from mint_ray import storage
    from mint_ray.compare import run_comparison

    compared = run_comparison(config)
    click.echo(storage.read_bytes(compared.report.file_uri("table.txt")).decode())
    click.echo(f"report: {compared.report.file_uri('report.html')}")
    if as_json:
        metrics = compared.report.manifest.metrics
        click.echo(json.dumps({"report": compared.report.uri, "metrics": metrics, "failed": compared.failed}))
    if compared.failed:
        sys.exit(1)


@cli.command()
@_takes_spec
def check(spec: Path, **given: Any) -> None:
    """Check the spec, the inputs and the student without starting any work, and estimate the memory of training."""
    config = _load(spec, **given)
    log_to(None)

    from mint_ray.pipeline import check_pipeline
    from mint_ray.stages.pair import check_lengths
    from mint_ray.stages.prepare import select_records

    check_pipeline(config)
    prepared = select_records(config.prepare, config.task)
    check_lengths(config.pair, len(prepared.labels))
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in sorted(prepared.dropped.items())) or "none"
    click.echo(f"{spec}: good; {len(prepared.records):,} records, {len(prepared.labels):,} labels; dropped: {dropped}")
    click.echo(_estimate_memory(config))


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
@click.option("--to", required=True, help="An empty or new folder, s3://... or gs://...")
@click.option("--format", "form", help="Of pairs: trl, ms-swift, llamafactory or distilabel.")
@click.option("--merge/--adapter", default=True, help="Of a student: all its weights (default), or the low-rank ones.")
@click.option("--evaluate", "evaluated", help="Of a student: an evaluate artifact, whose metrics its card then tells.")
def export(uri: str, to: str, form: str | None, merge: bool, evaluated: str | None) -> None:
    """Write the pairs at URI in the columns of another trainer, or the student of the train artifact at URI."""
    from mint_ray.exports import export_pairs, export_student

    if form is None:
        export_student(uri, to, merge=merge, evaluated=evaluated)
        click.echo(f"student: {to}")
        return
    for split, count in export_pairs(uri, form, to).items():
        click.echo(f"{split}: {count:,}")
    click.echo(f"{form}: {to}")


@cli.command()
@click.option("--compare", "comparison", is_flag=True, help="Of a spec of `mint-ray compare`.")
def schema(comparison: bool) -> None:
    """Print the JSON Schema of a spec."""
    from mint_ray.config import ComparisonConfig, PipelineConfig
    from mint_ray.loading import json_schema

    click.echo(json.dumps(json_schema(ComparisonConfig if comparison else PipelineConfig), indent=2))


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


def _load(spec: Path, overrides: tuple[str, ...], layers: tuple[Path, ...], root: str | None, cls: Any = None) -> Any:
    """The config of a run, or of what `cls` says."""
    from mint_ray.config import PipelineConfig
    from mint_ray.loading import load

    return load(cls or PipelineConfig, spec, [*overrides, *([f"root={root}"] if root else [])], layers)


def _estimate_memory(config: PipelineConfig) -> str:
    from transformers import AutoConfig

    from mint_ray.students import resolve_path
    from mint_ray.trainers.memory import estimate, shape_of

    student, trainer, resources = config.train.student, config.train.trainer, config.train.resources
    # the check of the student has brought its config.json here
    model_config = AutoConfig.from_pretrained(
        resolve_path(student), revision=student.revision, local_files_only=True, trust_remote_code=False
    )
    # max_length holds a prompt and its longest completion; every pair brings one more
    record_tokens = (
        trainer.max_length + config.pair.sampler.pairs_per_record * config.evaluate.generation.max_new_tokens
    )
    memory = estimate(shape_of(model_config, student), student, trainer, resources, record_tokens=record_tokens)
    parts = ("weights", "gradients", "optimizer", "activations", "head", "buffers")
    listed = ", ".join(f"{part} {getattr(memory, part) / 1e9:.2f}" for part in parts)
    place = "GPU" if resources.gpus_per_worker else "memory"
    return (
        f"estimated, for records of {record_tokens:,} tokens: a training worker takes {memory.total / 1e9:.2f} GB "
        f"of {place} ({listed}); its machine holds {memory.host / 1e9:.2f} GB for it"
    )


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
