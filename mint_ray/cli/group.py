"""What the verbs share: their group, their names, and how a spec is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

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


def takes_spec(command: Callable[..., None]) -> Callable[..., None]:
    """What every verb that reads a spec takes to make its config."""
    for parameter in (
        click.option("--root", help="Where artifacts go: a folder, s3://... or gs://... (default: the spec's root)."),
        click.option("--with", "layers", multiple=True, metavar="FILE", type=click.Path(path_type=Path), help=LAYERS),
        click.argument("overrides", nargs=-1, metavar="[a.b=c ...]"),
        click.argument("spec", type=click.Path(path_type=Path)),
    ):
        command = parameter(command)
    return command


def load_spec(
    spec: Path, overrides: tuple[str, ...], layers: tuple[Path, ...], root: str | None, cls: Any = None
) -> Any:
    """The config of a run, or of what `cls` says."""
    from mint_ray.config.loader import load
    from mint_ray.config.pipeline import PipelineConfig

    return load(cls or PipelineConfig, spec, [*overrides, *([f"root={root}"] if root else [])], layers)
