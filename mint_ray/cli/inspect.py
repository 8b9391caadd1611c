"""Commands that check specs and artifacts, and export artifacts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mint_ray.cli.group import SPEC_VERBS, load_spec, takes_spec
from mint_ray.telemetry import configure_logging

if TYPE_CHECKING:
    from mint_ray.config.pipeline import PipelineConfig
    from mint_ray.stages.prepare import Prepared


@click.command()
@takes_spec
@click.option("--pixels", is_flag=True, help="Check that the student's answers and gradients depend on the image.")
def check(spec: Path, pixels: bool, **given: Any) -> None:
    """Check a spec and estimate the memory of training.

    Checks SPEC, its inputs and its student without running a stage. With --pixels the student is loaded; the exit code
    is 1 if its output does not depend on the image.
    """
    config = load_spec(spec, **given)
    configure_logging(None)

    from mint_ray.config.loader import UserError
    from mint_ray.pipeline import check_pipeline
    from mint_ray.stages.prepare import select_records

    check_pipeline(config)
    prepared = select_records(config.prepare, config.task)
    if config.prepare.match_texts is not None:
        # imported here because it loads Ray
        from mint_ray.stages.embed_texts import select_texts

        texts, dropped = select_texts(config.prepare, prepared.records)
        click.echo(f"{spec}: {len(texts):,} texts to match with images; dropped: {_list_counts(dropped)}")
    config.pair.sampler.check_num_labels(len(prepared.labels))
    counts = f"{len(prepared.records):,} records, {len(prepared.labels):,} labels"
    click.echo(f"{spec}: ok; {counts}; dropped: {_list_counts(prepared.dropped)}")
    if config.build_vlm is not None:
        if pixels:
            raise UserError(
                "--pixels: the student does not exist yet; run `mint-ray build_vlm`, then check with build_vlm=null "
                "and train.student.model_id=FOLDER"
            )
        return
    click.echo(_estimate_memory(config))
    if pixels and not _check_pixels(config, prepared):
        sys.exit(1)


@click.command()
@click.argument("uri")
def verify(uri: str) -> None:
    """Verify an artifact against its manifest.

    Recomputes sizes, rows and checksums of the files at URI; the exit code is 1 if any differs.
    """
    from mint_ray import artifacts

    problems = artifacts.verify(uri)
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        sys.exit(1)
    manifest = artifacts.read_manifest(uri)
    click.echo(f"{uri}: ok; {len(manifest.files)} files, {sum(file.rows or 0 for file in manifest.files):,} rows")


@click.command()
@click.argument("uri")
@click.option("--to", required=True, help="New or empty folder, s3://... or gs://...")
@click.option("--format", "form", help="For pairs: trl, ms-swift, llamafactory or distilabel.")
@click.option("--merge/--adapter", default=True, help="For a student: merged weights (default), or the adapter alone.")
@click.option("--evaluate", "evaluated", help="For a student: evaluate artifact whose metrics go into the model card.")
def export(uri: str, to: str, form: str | None, merge: bool, evaluated: str | None) -> None:
    """Export pairs or a student for other tools.

    With --format, exports the pairs of the pair artifact at URI; without it, the student of the train artifact at URI.
    """
    from mint_ray.exports import export_pairs, export_student

    if form is None:
        export_student(uri, to, merge=merge, evaluated=evaluated)
        click.echo(f"student: {to}")
        return
    for split, count in export_pairs(uri, form, to).items():
        click.echo(f"{split}: {count:,}")
    click.echo(f"{form}: {to}")


@click.command()
@click.option(
    "--verb", type=click.Choice(SPEC_VERBS), default="run", help="Command that reads the spec (default: run)."
)
def schema(verb: str) -> None:
    """Print the JSON Schema of a spec."""
    from mint_ray.config.loader import json_schema
    from mint_ray.config.specs import config_class

    click.echo(json.dumps(json_schema(config_class(verb)), indent=2))


def _list_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items())) or "none"


def _estimate_memory(config: PipelineConfig) -> str:
    from mint_ray.models.pretrained import resolve_model
    from mint_ray.trainers.memory import estimate_memory
    from mint_ray.trainers.model_shape import read_shape

    student, trainer, resources = config.train.student, config.train.trainer, config.train.resources
    # max_length bounds a prompt with its longest completion; each further pair adds a completion
    record_tokens = (
        trainer.max_length + config.pair.sampler.pairs_per_record * config.evaluate.generation.max_new_tokens
    )
    shape = read_shape(resolve_model(student, "student"), student)
    memory = estimate_memory(shape, student, trainer, resources, record_tokens=record_tokens)
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
    listed = ", ".join(f"{part} {getattr(memory, part) / 1e9:.2f}" for part in parts)
    device = "GPU memory" if resources.gpus_per_worker else "memory"
    return (
        f"estimate for records of {record_tokens:,} tokens: {memory.total / 1e9:.2f} GB of {device} per training "
        f"worker ({listed}); {memory.host / 1e9:.2f} GB of host memory"
    )


def _check_pixels(config: PipelineConfig, prepared: Prepared) -> bool:
    """Print how the student's output changes with the image; return False if it does not change."""
    from mint_ray.records import Message, PreferencePair
    from mint_ray.students.checks import check_images
    from mint_ray.tasks import build_task
    from mint_ray.trainers.image_dependence import measure_image_effects

    check_images(config.train.student, show_image=True)
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
    effects = measure_image_effects(config.train.student, pairs, config.train.trainer.max_length)
    for effect in effects:
        ignored = "" if effect.is_visible else ": the student ignores the image"
        click.echo(
            f"image replaced by {effect.image}: token log-probabilities change by up to {effect.max_logp_change:.3g}, "
            f"the gradient by {effect.gradient_change:.1%}{ignored}"
        )
    return all(effect.is_visible for effect in effects)
