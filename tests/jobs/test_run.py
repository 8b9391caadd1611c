from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "jobs" / "run.py"


def test_the_entrypoint_takes_what_the_command_line_takes_and_has_its_exit_codes(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, tmp_path / "none.yaml", "--with", tmp_path / "infra.yaml", "a.b=c"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"mint-ray: {tmp_path / 'none.yaml'}: no such file"
