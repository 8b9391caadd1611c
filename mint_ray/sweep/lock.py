"""Lock a study, so that two processes do not run the same sweep at the same time."""

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

OWNER = "lock_owner"
"""User attribute of a locked study: id, name and last heartbeat of the process that locked it."""
HEARTBEAT_SECONDS, LOCK_TIMEOUT_SECONDS = 10.0, 60.0


@contextmanager
def lock_file(path: Path, what: str) -> Iterator[None]:
    """Lock a file for the duration of the block; the kernel releases it when the process ends.

    Raises UserError if another process has locked it.

    Args:
        path: Lock file; created if missing.
        what: Name of the locked thing in the error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # opened without truncating it: it contains the name of the process that has locked it
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise UserError(f"{what} is already running in {lock.read().strip() or 'another process'}") from error
        lock.truncate(0)
        lock.write(_process_name())
        lock.flush()
        yield


@contextmanager
def lock_study(study: optuna.Study, what: str) -> Iterator[None]:
    """Lock a study in a database that several machines share, by a heartbeat in its user attributes.

    Raises UserError if another process has locked it. The lock of a process that died expires after a minute.
    """
    lock_id, done = uuid.uuid4().hex, threading.Event()

    def heartbeat() -> None:
        while True:
            study.set_user_attr(OWNER, {"id": lock_id, "process": _process_name(), "last_seen": time.time()})
            if done.wait(HEARTBEAT_SECONDS):
                return

    def refuse(owner: dict[str, Any]) -> None:
        age = max(0.0, time.time() - owner["last_seen"])
        raise UserError(
            f"{what} is already running in {owner['process']}, last seen {age:.0f} s ago; if that process has died, "
            f"try again in {LOCK_TIMEOUT_SECONDS:.0f} s"
        )

    owner = study.user_attrs.get(OWNER)
    if owner and time.time() - owner["last_seen"] < LOCK_TIMEOUT_SECONDS:
        refuse(owner)
    thread = threading.Thread(target=heartbeat, daemon=True)
    thread.start()
    try:
        # of two processes that start at the same moment the later one keeps the lock
        time.sleep(1.0)
        if (owner := study.user_attrs[OWNER])["id"] != lock_id:
            refuse(owner)
        yield
    finally:
        done.set()
        thread.join()
        if study.user_attrs[OWNER]["id"] == lock_id:
            study.set_user_attr(OWNER, None)


def _process_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
