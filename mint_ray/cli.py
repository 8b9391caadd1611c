"""The command line: `mint-ray VERB SPEC [--with FILE]... [a.b=c ...]`, one verb per stage."""

from __future__ import annotations

import json
import logging
import random
import secrets
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mint_ray.loading import UserError
from mint_ray.telemetry import log_to

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from mint_ray.artifacts import Artifact
    from mint_ray.chaos import What
    from mint_ray.config import PipelineConfig
    from mint_ray.stages.prepare import Prepared

logger = logging.getLogger("mint_ray")

VERBS = {
    "run": ("report", "Run every stage; what is complete is not run again."),
    "prepare": ("prepare", "Read records, choose labels, split by group."),
    "fit": ("fit", "Make the teacher ready."),
    "score": ("score", "Let the teacher rank every label of every record."),
    "pair": ("pair", "Draw preference pairs from the scores."),
    "join": ("join", "Make a student that sees, of the parts that the section `join` names."),
    "tokenize": ("tokenize", "Turn the pairs into the student's tokens."),
    "train": ("train", "Align the student with the pairs."),
    "evaluate": ("evaluate", "Compare base and aligned student on the test split."),
    "report": ("report", "Write the report of a run, running what is missing."),
}

SPEC_VERBS = [*VERBS, "compare", "sweep"]

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
        config: PipelineConfig = _load(**given)
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


def _check_trials(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not (value.removeprefix("+").isdecimal() and int(value)):
        raise click.BadParameter(f"got {value!r}; expected a number such as 36, or +20")
    return value


@cli.command()
@_takes_spec
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
    from mint_ray.config import SweepConfig

    more = int(trials[1:]) if trials and trials.startswith("+") else 0
    if trials and not more:
        given["overrides"] += (f"sweep.trials={trials}",)
    config: SweepConfig = _load(**given, cls=SweepConfig)
    log_to(log_file or _log_file(config.root))

    from mint_ray.sweep.run import run_sweep

    outcome = run_sweep(config, more)
    click.echo(storage.read_bytes(outcome.report.file_uri("table.txt")).decode())
    click.echo(f"best spec: {outcome.report.file_uri('best.yaml')}")
    click.echo(f"report: {outcome.report.file_uri('report.html')}")
    if as_json:
        told = {"study": outcome.study, "winner": outcome.winner, "trials": outcome.trials}
        click.echo(json.dumps({"report": outcome.report.uri, **told}))
    if outcome.failed:
        sys.exit(1)


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
    from mint_ray.compare.run import run_comparison

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
@click.option("--pixels", is_flag=True, help="Show that the student's answers and gradients depend on the image.")
def check(spec: Path, pixels: bool, **given: Any) -> None:
    """Check the spec, the inputs and the student without starting any work, and estimate the memory of training.

    With --pixels the student is loaded; exit code 1 if another image changes nothing.
    """
    config = _load(spec, **given)
    log_to(None)

    from mint_ray.pipeline import check_pipeline
    from mint_ray.stages.pair import check_lengths
    from mint_ray.stages.prepare import select_records
    from mint_ray.stages.unpaired import select_texts

    check_pipeline(config)
    prepared = select_records(config.prepare, config.task)
    if config.prepare.pair_texts is not None:
        texts, left_out = select_texts(config.prepare, prepared.records)
        told = ", ".join(f"{reason} {count:,}" for reason, count in sorted(left_out.items())) or "none"
        click.echo(f"{spec}: {len(texts):,} texts to pair with images; left out: {told}")
    check_lengths(config.pair, len(prepared.labels))
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in sorted(prepared.dropped.items())) or "none"
    click.echo(f"{spec}: good; {len(prepared.records):,} records, {len(prepared.labels):,} labels; dropped: {dropped}")
    if config.join is not None:
        if pixels:
            raise UserError(
                "--pixels: the student is yet to be joined: `mint-ray join`, then check with join=null and "
                "train.student.model_id=FOLDER"
            )
        return
    click.echo(_estimate_memory(config))
    if pixels and not _show_pixels(config, prepared):
        sys.exit(1)


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


ADDRESS = click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    help="The cluster's dashboard: http://127.0.0.1:8265 (default: RAY_API_SERVER_ADDRESS).",
)


@cli.command()
@_takes_spec
@ADDRESS
@click.option("--verb", type=click.Choice(SPEC_VERBS), default="run", help="What to run there (default: run).")
@click.option("--follow", is_flag=True, help="Print what the job says until it ends, and exit with its code.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent, and send nothing.")
@click.option("--again", is_flag=True, help="Run it again although it has succeeded there.")
@click.option("--shared-disk", is_flag=True, help="Every machine of the cluster sees the disks of this one.")
@click.option("--requirements", type=click.Path(path_type=Path), help="Packages that the cluster's image lacks.")
def submit(
    address: str,
    verb: str,
    follow: bool,
    dry_run: bool,
    again: bool,
    shared_disk: bool,
    requirements: Path | None,
    **given: Any,
) -> None:
    """Run SPEC on a cluster. The same spec twice is one job; one that failed or was stopped is sent again."""
    from mint_ray.config import config_of

    config = _load(**given, cls=config_of(verb))
    log_to(None)

    from mint_ray import parcel, submission

    packed = parcel.pack(config, verb, shared_disk=shared_disk, requirements=requirements)
    if dry_run:
        click.echo(f"job: {submission.name_job(packed)}\ncommand: {packed.entrypoint}\nroot: {packed.root}")
        click.echo(f"runtime_env: {json.dumps(submission.runtime_env(packed))}")
        for name, content in packed.files.items():
            click.echo(f"file: {name}, {len(content):,} bytes")
        return
    client = submission.connect(address)
    sent = submission.submit(client, packed, again=again)
    click.echo(f"job: {sent.job_id}{'' if sent.new else ' (on the cluster already)'}")
    if not sent.same_resources:
        click.echo(f"it asks for other resources than this spec: mint-ray stop {sent.job_id} first to change them")
    if follow:
        _follow(client, sent.job_id)
    elif not sent.new:
        _show_job(client, sent.job_id)


@cli.command()
@ADDRESS
@click.argument("job_id", required=False)
def status(address: str, job_id: str | None) -> None:
    """Say how JOB_ID stands and where its artifacts lie; without it, how every job of the cluster does."""
    from mint_ray import submission

    client = submission.connect(address)
    if job_id is not None:
        _show_job(client, job_id)
        return
    for job in submission.list_jobs(client):
        click.echo(submission.describe(job))


@cli.command()
@ADDRESS
@click.option("--follow", is_flag=True, help="Go on until the job ends, and exit with its code.")
@click.argument("job_id")
def logs(address: str, job_id: str, follow: bool) -> None:
    """Print what JOB_ID has said."""
    log_to(None)

    from mint_ray import submission

    client = submission.connect(address)
    if follow:
        _follow(client, job_id)
    else:
        click.echo(submission.read_logs(client, job_id), nl=False)


@cli.command()
@ADDRESS
@click.argument("job_id")
def stop(address: str, job_id: str) -> None:
    """End JOB_ID. Submitting its spec again goes on from what it has finished."""
    from mint_ray import submission

    click.echo(submission.describe(submission.stop(submission.connect(address), job_id)))


@cli.command()
@ADDRESS
@click.option("--root", help="Look at this place instead of the spec's root.")
@click.option("--with", "layers", multiple=True, metavar="FILE", type=click.Path(path_type=Path), help=LAYERS)
@click.argument("spec", required=False, type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[a.b=c ...]")
def doctor(address: str, spec: Path | None, **given: Any) -> None:
    """Look for what is wrong with a cluster, and with what SPEC needs of it; exit code 1 if anything is."""
    config = _load(spec, **given) if spec else None

    from mint_ray.doctor import examine

    bad = False
    for finding in examine(address, config):
        click.echo(str(finding))
        bad = bad or finding.state == "bad"
    sys.exit(int(bad))


@cli.command()
@ADDRESS
@click.argument("what", type=click.Choice(["kill-worker", "kill-node", "cut-storage"]))
@click.option("--seed", type=int, help="Draw what is hit with this seed (default: a new one, which is printed).")
@click.option("--root", help="Of cut-storage: the place in storage that cannot be reached: s3://... or gs://...")
@click.option("--seconds", type=click.IntRange(1, 600), default=20, help="Of cut-storage: for how long (default: 20).")
@click.option("--dry-run", is_flag=True, help="Name what would be hit, and hit nothing.")
def chaos(address: str, what: What, seed: int | None, root: str | None, seconds: int, dry_run: bool) -> None:
    """Hit a test cluster, to see that runs recover: kill a worker process of a running job, a machine, or cut a
    machine's storage off for a while.

    Only machines started with --labels=mint-ray-chaos=1 are ever hit, and the head is never killed.
    """
    from mint_ray import submission
    from mint_ray.chaos import aim, check_root, strike

    if what == "cut-storage":
        root = check_root(root)
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    client = submission.connect(address)
    target = aim(client, what, random.Random(seed))
    click.echo(f"seed: {seed}\n{what}: {target}")
    if dry_run and what != "cut-storage":
        return
    told = strike(client, what, target, root=root or "", seconds=seconds, dry_run=dry_run)
    if what == "kill-worker":
        click.echo("killed")
    elif what == "kill-node":
        click.echo(f"killed; the cluster missed it after {told['missed_after']:g} s")
    else:
        click.echo(f"{'would cut' if dry_run else 'cut'} {', '.join(told['addresses'])} for {seconds} s")


@cli.command()
@click.option("--verb", type=click.Choice(SPEC_VERBS), default="run", help="Whose spec (default: run).")
def schema(verb: str) -> None:
    """Print the JSON Schema of a spec."""
    from mint_ray.config import config_of
    from mint_ray.loading import json_schema

    click.echo(json.dumps(json_schema(config_of(verb)), indent=2))


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
    from mint_ray.bundled.architectures import load_config
    from mint_ray.students import student_place
    from mint_ray.trainers.memory import estimate, shape_of

    student, trainer, resources = config.train.student, config.train.trainer, config.train.resources
    # max_length holds a prompt and its longest completion; every pair brings one more
    record_tokens = (
        trainer.max_length + config.pair.sampler.pairs_per_record * config.evaluate.generation.max_new_tokens
    )
    shape = shape_of(load_config(student_place(student)), student)
    memory = estimate(shape, student, trainer, resources, record_tokens=record_tokens)
    parts = ("weights", "gradients", "optimizer", "activations", "head", "buffers")
    listed = ", ".join(f"{part} {getattr(memory, part) / 1e9:.2f}" for part in parts)
    place = "GPU" if resources.gpus_per_worker else "memory"
    return (
        f"estimated, for records of {record_tokens:,} tokens: a training worker takes {memory.total / 1e9:.2f} GB "
        f"of {place} ({listed}); its machine holds {memory.host / 1e9:.2f} GB for it"
    )


def _show_pixels(config: PipelineConfig, prepared: Prepared) -> bool:
    """Print what another image changes for the student; whether it changes anything."""
    from mint_ray.records import Message, PreferencePair
    from mint_ray.students import check_sight
    from mint_ray.tasks import build_task
    from mint_ray.trainers.pixels import find_changes

    check_sight(config.train.student, shows_image=True)
    task = build_task(config.task, prepared.labels, config.pair.sampler.top)
    label_ids = [label.label_id for label in prepared.labels]
    answers = [
        [Message(role="assistant", content=task.answer(ids[: config.pair.sampler.top]))]
        for ids in (label_ids, label_ids[::-1])
    ]
    pairs = (
        PreferencePair(
            prompt=task.prompt(record), chosen=answers[0], rejected=answers[1], record_id=record.record_id,
            split=record.split, image_uri=record.image_uri, teacher="", sampler="", chosen_labels=[],
            rejected_labels=[],
        )
        for record in prepared.records
    )  # fmt: skip
    changes = find_changes(config.train.student, pairs, config.train.trainer.max_length)
    for change in changes:
        click.echo(
            f"instead of its image {change.image}: log-probabilities of tokens change by up to {change.logps:.3g}, the "
            f"gradient by {change.gradients:.1%}{'' if change.is_seen else ': the pixels do not reach the student'}"
        )
    return all(change.is_seen for change in changes)


def _follow(client: JobSubmissionClient, job_id: str) -> None:
    from mint_ray import submission

    try:
        submission.follow(client, job_id, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        click.echo(f"\n{job_id} goes on: mint-ray logs --follow {job_id}", err=True)
        raise
    sys.exit(_show_job(client, job_id))


def _show_job(client: JobSubmissionClient, job_id: str) -> int:
    """Print how a job stands and what it made; its exit code."""
    from mint_ray import submission

    job = submission.find(client, job_id)
    click.echo(submission.describe(job))
    outcome = submission.read_outcome(submission.read_logs(client, job_id)) if job.status.is_terminal() else {}
    for stage, uri in outcome.get("artifacts", {}).items():
        click.echo(f"{stage}: {uri}")
    return submission.exit_code(job) if job.status.is_terminal() else 0


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


if __name__ == "__main__":
    main()
