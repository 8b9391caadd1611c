"""A run's log file and its progress lines."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from mint_ray.config.loader import UserError
from mint_ray.telemetry.measures import measure

SECONDS_BETWEEN_LINES = 5.0

logger = logging.getLogger("mint_ray")


def log_to(path: Path | None, quiet: bool = False) -> None:
    """Send the package's log to the terminal (standard error) and to a file, one line an event.

    Raises UserError if the file cannot be written.
    """
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handlers: list[logging.Handler] = []
    if not quiet:
        handlers.append(logging.StreamHandler(sys.stderr))
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(path, encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = handlers


class Progress:
    """Lines such as `score: 240 of 800 records, 31.2/s, 0:18 left`, at most one every few seconds.

    Where nobody knows the total (None) the lines are `prepare: 240 rows, 31.2/s`.
    """

    def __init__(self, stage: str, total: int | None, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = 0
        self.started = self.spoken = time.monotonic()

    def reach(self, done: int, note: str = "") -> None:
        """Say that `done` of the whole are done; the last is always told."""
        measure("rows_done", done - self.done, stage=self.stage)
        if self.total:
            measure("stage_share", done / self.total, stage=self.stage)
        self.done = done
        now = time.monotonic()
        if done != self.total and now - self.spoken < SECONDS_BETWEEN_LINES:
            return
        self.spoken = now
        rate = max(done, 1) / max(now - self.started, 1e-9)
        pace = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        whole = left = ""
        if self.total is not None:
            seconds = int((self.total - done) / rate)
            whole, left = f" of {self.total:,}", f", {seconds // 60}:{seconds % 60:02d} left"
        note = f", {note}" if note else ""
        logger.info("%s: %s%s %s, %s%s%s", self.stage, f"{done:,}", whole, self.unit, pace, left, note)

    def add(self, count: int = 1, note: str = "") -> None:
        """Say that `count` more are done."""
        self.reach(self.done + count, note)
