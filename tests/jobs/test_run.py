"""The entry point of cluster jobs takes the arguments of the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "jobs" / "run.py"


def test_the_entry_point_has_the_arguments_and_exit_codes_of_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, tmp_path / "none.yaml", "--with", tmp_path / "infra.yaml", "a.b=c"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"mint-ray: {tmp_path / 'none.yaml'}: no such file"
