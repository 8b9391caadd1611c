"""Command group, names of the commands, and the options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mint_ray.stages import STAGES

VERBS = {
    "run": ("report", "Run every stage; complete ones are skipped."),
    **{stage: (stage, summary) for stage, summary in STAGES.items()},
}
"""Commands that run stages: name to last stage and help text."""

SPEC_VERBS = [*VERBS, "compare", "sweep"]
"""Commands that read a spec and run it."""

LAYERS = (
    "Partial spec to merge over SPEC, for example one of jobs/presets. May be repeated; later files take precedence, "
    "and a.b=c overrides take precedence over files."
)


class OrderedGroup(click.Group):
    """Group that lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(self.commands)


@click.group(cls=OrderedGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mint-ray")
def cli() -> None:
    """Transfer the knowledge of a multimodal teacher to a unimodal language model.

    The command of a stage runs that stage of SPEC and the incomplete stages that it needs.
    """


def takes_spec(command: Callable[..., None]) -> Callable[..., None]:
    """Add the parameters from which a command loads its config."""
    for parameter in (
        click.option("--root", help="Root of the artifacts: a folder, s3://... or gs://... (default: the spec's)."),
        click.option("--with", "layers", multiple=True, metavar="FILE", type=click.Path(path_type=Path), help=LAYERS),
        click.argument("overrides", nargs=-1, metavar="[a.b=c ...]"),
        click.argument("spec", type=click.Path(path_type=Path)),
    ):
        command = parameter(command)
    return command


def load_spec(
    spec: Path, overrides: tuple[str, ...], layers: tuple[Path, ...], root: str | None, cls: Any = None
) -> Any:
    """Load the config of a run, or one of class `cls`, from a command's parameters."""
    from mint_ray.config.loader import load
    from mint_ray.config.pipeline import PipelineConfig

    return load(cls or PipelineConfig, spec, [*overrides, *([f"root={root}"] if root else [])], layers)
