"""Locks of studies, by a file and by a heartbeat in the study."""

from __future__ import annotations

import fcntl
from pathlib import Path

import optuna
import pytest

from mint_ray.config.loader import UserError
from mint_ray.sweep.lock import OWNER, lock_file, lock_study


def test_a_locked_file_is_an_error_that_names_the_process(tmp_path: Path) -> None:
    path = tmp_path / "sweep.lock"
    with (
        lock_file(path, "sweep-1"),
        pytest.raises(UserError, match=r"^sweep-1 is already running in process "),
        lock_file(path, "sweep-1"),
    ):
        raise AssertionError("not reached")


def test_the_lock_file_of_an_ended_process_can_be_locked(tmp_path: Path) -> None:
    path = tmp_path / "sweep.lock"
    with lock_file(path, "sweep-1"):
        pass
    with path.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock_file(path, "sweep-1"):
        pass


def test_the_lock_of_a_shared_study_is_released_at_the_end_and_expires_without_a_heartbeat(tmp_path: Path) -> None:
    def load() -> optuna.Study:
        return optuna.create_study(storage=f"sqlite:///{tmp_path}/s.db", study_name="s", load_if_exists=True)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with lock_study(load(), "s"):
        with (
            pytest.raises(UserError, match=r"^s is already running in process .*, last seen \d s ago; "),
            lock_study(load(), "s"),
        ):
            raise AssertionError("not reached")
        owner = load().user_attrs[OWNER]
    assert load().user_attrs[OWNER] is None
    # a process that was killed two minutes ago
    load().set_user_attr(OWNER, owner | {"last_seen": owner["last_seen"] - 120})
    with lock_study(load(), "s"):
        pass
