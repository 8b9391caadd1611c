from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mint_ray.config.loader import UserError
from mint_ray.telemetry import Progress, log_to


def test_progress_tells_rate_and_remaining_time_in_the_log_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 10.0, 20.0])
    monkeypatch.setattr("mint_ray.telemetry.progress.time.monotonic", lambda: next(now))
    log_to(tmp_path / "run" / "x.log", quiet=True)
    try:
        progress = Progress("score", 200, "records")
        progress.add(5)  # too soon to be told
        progress.add(95)
        progress.reach(200, "loss 1.0")
    finally:
        logging.getLogger("mint_ray").handlers = []
    lines = (tmp_path / "run" / "x.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "score: 100 of 200 records, 10.0/s, 0:10 left",
        "score: 200 of 200 records, 10.0/s, 0:00 left, loss 1.0",
    ]


def test_a_log_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/below/x\.log: cannot be written"):
        log_to(tmp_path / "file" / "below" / "x.log", quiet=True)
