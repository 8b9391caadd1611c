"""Which verb of the command line a shipped spec is for."""

from __future__ import annotations

from pathlib import Path


def verb_of(path: Path) -> str:
    """By the section that no other verb's spec has."""
    text = path.read_text()
    return "compare" if "\nmethods:" in text else "sweep" if "\nsweep:" in text else "run"
