"""The verbs that look at specs and artifacts, and hand artifacts on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mint_ray.cli.group import SPEC_VERBS, cli, load_spec, takes_spec
from mint_ray.config.loader import UserError
from mint_ray.telemetry import log_to

if TYPE_CHECKING:
    from mint_ray.config.pipeline import PipelineConfig
    from mint_ray.stages.prepare import Prepared


@cli.command()
@takes_spec
@click.option("--pixels", is_flag=True, help="Show that the student's answers and gradients depend on the image.")
def check(spec: Path, pixels: bool, **given: Any) -> None:
    """Check the spec, the inputs and the student without starting any work, and estimate the memory of training.

    With --pixels the student is loaded; exit code 1 if another image changes nothing.
    """
    config = load_spec(spec, **given)
    log_to(None)

    from mint_ray.pipeline import check_pipeline
    from mint_ray.stages.embed_texts import select_texts
    from mint_ray.stages.pair import check_lengths
    from mint_ray.stages.prepare import select_records

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


@cli.command()
@click.option("--verb", type=click.Choice(SPEC_VERBS), default="run", help="Whose spec (default: run).")
def schema(verb: str) -> None:
    """Print the JSON Schema of a spec."""
    from mint_ray.config.loader import json_schema
    from mint_ray.config.specs import config_class

    click.echo(json.dumps(json_schema(config_class(verb)), indent=2))


def _estimate_memory(config: PipelineConfig) -> str:
    from mint_ray.models.architectures import load_config
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
