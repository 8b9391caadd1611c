"""Keep two runs of one sweep from trying the same trials at the same time."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna

from mint_ray.config.loader import UserError

HOLDER = "holder"
BEAT_SECONDS, DEAD_AFTER_SECONDS = 10.0, 60.0


@contextmanager
def hold_file(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; the kernel gives it back however this process ends. Raises UserError if another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # not truncated: whoever is refused reads who holds it
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise UserError(f"{what} is being run already, by {lock.read().strip() or 'another process'}") from error
        lock.truncate(0)
        lock.write(_whoami())
        lock.flush()
        yield


@contextmanager
def hold_study(study: optuna.Study, what: str) -> Iterator[None]:
    """Hold a study in a database that several machines reach, by a sign of life in it every few seconds.

    Raises UserError if another holds it. The hold of a process that died lasts for up to a minute.
    """
    mine, done = uuid.uuid4().hex, threading.Event()

    def beat() -> None:
        while True:
            study.set_user_attr(HOLDER, {"id": mine, "who": _whoami(), "seen": time.time()})
            if done.wait(BEAT_SECONDS):
                return

    def refuse(holder: dict[str, Any]) -> None:
        ago = max(0.0, time.time() - holder["seen"])
        raise UserError(
            f"{what} is being run already, by {holder['who']}, seen {ago:.0f} s ago; if that has died, try again in "
            f"{DEAD_AFTER_SECONDS:.0f} s"
        )

    holder = study.user_attrs.get(HOLDER)
    if holder and time.time() - holder["seen"] < DEAD_AFTER_SECONDS:
        refuse(holder)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        # of two who started at the same moment the later stays
        time.sleep(1.0)
        if (holder := study.user_attrs[HOLDER])["id"] != mine:
            refuse(holder)
        yield
    finally:
        done.set()
        thread.join()
        if study.user_attrs[HOLDER]["id"] == mine:
            study.set_user_attr(HOLDER, None)


def _whoami() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
