"""Run the command line in a process of its own, and write specs for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FRAMEWORKS = {"torch", "ray", "transformers", "trl", "peft", "deepspeed", "optuna"}
"""Packages that only stages import."""
HEAVY = FRAMEWORKS | {"sklearn", "scipy", "pandas"}
"""Packages that neither configs nor the command line import at start-up."""
TABLE_HEADER = "record_id,group_id,label_id,phenotypes\n"


def mint_ray(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run `mint-ray` in a new process, after the Python code `before`."""
    code = f"{before}\nfrom mint_ray.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)


def imported_by(*arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run `mint-ray` in a new process; return the process and the top-level modules that it imported."""
    report = "import atexit, sys; atexit.register(lambda: print('modules:', *sys.modules, file=sys.stderr))"
    done = mint_ray(*arguments, before=report)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("modules: ")]
    return done, set(line.removeprefix("modules: ").split())


def write_spec(folder: Path, source: str, task: str = "{kind: rare_disease}", more: str = "") -> Path:
    """Write a spec that uses the student in `folder`; return its path."""
    path = folder / "spec.yaml"
    path.write_text(
        f"root: {folder / 'out'}\ntask: {task}\nprepare: {{source: {source}}}\n"
        f"train: {{student: {{model_id: {folder / 'student'}}}}}\n{more}"
    )
    return path
