"""The command line: `mint-ray VERB SPEC [--with FILE]... [a.b=c ...]`, one verb per stage."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path

import click

# each brings its verbs into the group
from mint_ray.cli import cluster, inspect, runs  # noqa: F401
from mint_ray.cli.group import VERBS, cli
from mint_ray.config.loader import UserError

__all__ = ["VERBS", "cli", "main"]

logger = logging.getLogger("mint_ray")


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
