"""Log file and progress lines of a run."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from mint_ray.telemetry.metrics import record_metric

SECONDS_BETWEEN_LINES = 5.0

logger = logging.getLogger("mint_ray")


def configure_logging(path: Path | None, quiet: bool = False) -> None:
    """Send the package's log to standard error (unless `quiet`) and to a file, one line per event.

    Raises:
        UserError: The file cannot be written.
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
            # imported here because it loads pydantic, which `mint-ray --help` does not need
            from mint_ray.config.loader import UserError

            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = handlers


class Progress:
    """Progress lines such as `score: 240 of 800 records, 31.2/s, 0:18 left`, at most one every few seconds.

    Without a known total (None) the lines are `prepare: 240 rows, 31.2/s`.
    """

    def __init__(self, stage: str, total: int | None, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.completed = 0
        self.started = self.logged = time.monotonic()

    def update(self, completed: int, note: str = "") -> None:
        """Set the number of completed units; the line of the last one is always logged."""
        record_metric("rows_done", completed - self.completed, stage=self.stage)
        if self.total:
            record_metric("stage_progress", completed / self.total, stage=self.stage)
        self.completed = completed
        now = time.monotonic()
        if completed != self.total and now - self.logged < SECONDS_BETWEEN_LINES:
            return
        self.logged = now
        rate = max(completed, 1) / max(now - self.started, 1e-9)
        pace = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        total = left = ""
        if self.total is not None:
            seconds = int((self.total - completed) / rate)
            total, left = f" of {self.total:,}", f", {seconds // 60}:{seconds % 60:02d} left"
        note = f", {note}" if note else ""
        logger.info("%s: %s%s %s, %s%s%s", self.stage, f"{completed:,}", total, self.unit, pace, left, note)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add `count` to the number of completed units."""
        self.update(self.completed + count, note)
