"""Commands of shipped specs."""

from __future__ import annotations

from pathlib import Path


def verb_of(path: Path) -> str:
    """Return the command of `mint-ray` for a spec, by the section that only its kind of spec has."""
    text = path.read_text()
    return "compare" if "\nmethods:" in text else "sweep" if "\nsweep:" in text else "run"
