"""Models on the Hub: errors of one line without a network, and cached snapshots.

Each check runs in its own process, because the Hub's library reads its settings once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.tiny import save_tiny_student

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHECK = """
import sys
from mint_ray.config.loader import UserError
from mint_ray.models.pretrained import check_model, model_identity, resolve_model
from mint_ray.students import Student
student = Student(model_id=sys.argv[1])
try:
    check_model(student)
except UserError as error:
    print(error)
print(model_identity(student, "student"), resolve_model(student, "student").path)
"""


def check(model_id: str, home: Path, **environment: str) -> list[str]:
    """Check a model with an own cache of the Hub; return the lines printed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, model_id],
        env={**clean, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_a_model_that_is_not_cached_is_rejected_offline_in_one_line(tmp_path: Path) -> None:
    lines = check("owner/name", tmp_path, HF_HUB_OFFLINE="1")
    assert lines == [
        "model_id: owner/name: not in the local cache, and HF_HUB_OFFLINE is set",
        "main owner/name",
    ]


def test_an_unreachable_hub_is_reported_within_seconds(tmp_path: Path) -> None:
    started = time.monotonic()
    error, _ = check("owner/name", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the Hub cannot be reached" in error
    assert time.monotonic() - started < 15


def test_a_cached_model_is_read_from_its_commit_without_network(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = save_tiny_student(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert check("owner/name", tmp_path, HF_HUB_OFFLINE="1") == [f"{COMMIT} {snapshot}"]


def test_an_invalid_id_is_rejected(tmp_path: Path) -> None:
    lines = check("no such model", tmp_path, HF_HUB_OFFLINE="1")
    assert lines[0] == "model_id: no such model: neither a folder nor a Hub id"
