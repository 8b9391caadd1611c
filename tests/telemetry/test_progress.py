from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mint_ray.config.loader import UserError
from mint_ray.telemetry import Progress, configure_logging


def log_lines(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: list[float],
    progress_steps: list[tuple[str, int, str]],
    total: int | None,
) -> list[str]:
    now = iter(clock)
    monkeypatch.setattr("mint_ray.telemetry.progress.time.monotonic", lambda: next(now))
    configure_logging(path, quiet=True)
    try:
        progress = Progress("score", total, "records")
        for method, count, note in progress_steps:
            getattr(progress, method)(count, note)
    finally:
        logging.getLogger("mint_ray").handlers = []
    return [line.split(" ", 1)[1] for line in path.read_text().splitlines()]


def test_progress_lines_show_rate_and_remaining_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the second line would come one second after the first, which is too soon
    steps = [("advance", 5, ""), ("advance", 95, ""), ("update", 200, "loss 1.0")]
    assert log_lines(tmp_path / "run" / "x.log", monkeypatch, [0.0, 1.0, 10.0, 20.0], steps, 200) == [
        "score: 100 of 200 records, 10.0/s, 0:10 left",
        "score: 200 of 200 records, 10.0/s, 0:00 left, loss 1.0",
    ]


def test_without_a_total_no_remaining_time_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = log_lines(tmp_path / "x.log", monkeypatch, [0.0, 10.0], [("advance", 4, "")], None)
    assert lines == ["score: 4 records, 2.5 s each"]


def test_a_log_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/below/x\.log: cannot be written"):
        configure_logging(tmp_path / "file" / "below" / "x.log", quiet=True)
