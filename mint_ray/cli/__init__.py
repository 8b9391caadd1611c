"""Command line: `mint-ray COMMAND SPEC [--with FILE]... [a.b=c ...]`.

The modules import click alone; each command imports what it needs when it runs. Tested by tests/cli/test_group.py.
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path

import click

from mint_ray.cli import cluster, inspect, plan, runs
from mint_ray.cli.group import VERBS, cli

__all__ = ["VERBS", "cli", "main"]

logger = logging.getLogger("mint_ray")

for command in (
    *(runs.stage_command(verb) for verb in VERBS),
    runs.compare,
    runs.sweep,
    plan.plan,
    inspect.check,
    inspect.verify,
    inspect.export,
    inspect.schema,
    cluster.submit,
    cluster.status,
    cluster.logs,
    cluster.stop,
    cluster.doctor,
    cluster.chaos,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line: exit code 2 and one line for an error that the user can fix, 1 for any other."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Exception as error:
        # imported here because it loads pydantic, which `mint-ray --help` does not need
        from mint_ray.config.loader import UserError, one_line

        if isinstance(error, UserError):
            click.echo(f"mint-ray: {error}", err=True)
            sys.exit(2)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                with Path(handler.baseFilename).open("a", encoding="utf-8") as log:
                    log.write(traceback.format_exc())
                click.echo(f"mint-ray: full traceback in {handler.baseFilename}", err=True)
        click.echo(f"mint-ray: failed: {one_line(error, with_type=True)}", err=True)
        sys.exit(1)
