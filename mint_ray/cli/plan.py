"""The command that prints the stages of a run, and the reason why each of them has to run."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from mint_ray.cli.group import load_spec, takes_spec
from mint_ray.stages import STAGES


@click.command()
@takes_spec
@click.option("--stage", type=click.Choice(list(STAGES)), default="report", help="Last stage (default: report).")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON on the last line of stdout.")
def plan(stage: str, as_json: bool, **given: Any) -> None:
    """Print the stages of SPEC in order: which are complete, which will run, and why.

    Of a comparison or a sweep, the plan is that of the spec itself, without methods or search space. Nothing is run,
    and nothing is written.
    """
    from mint_ray.config.loader import read_yaml
    from mint_ray.config.specs import config_class
    from mint_ray.plan import explain_plan

    keys = read_yaml(given["spec"])
    verb = "compare" if "methods" in keys else "sweep" if "sweep" in keys else "run"
    config = load_spec(**given, cls=config_class(verb))

    steps = explain_plan(config, stage)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(step) for step in steps]))
        return
    width = max(len(step.key) for step in steps)
    for step in steps:
        reasons = "; ".join(step.reasons) if step.reasons else step.artifact
        click.echo(f"{step.key:<{width}}  {step.state:<8}  {reasons}")
    num_runs = sum(step.state != "complete" for step in steps)
    click.echo(f"{num_runs} of {len(steps)} steps will run")
