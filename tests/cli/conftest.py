from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that contains a tiny student in `student`."""
    from tests.tiny import save_tiny_student

    path = tmp_path_factory.mktemp("cli")
    save_tiny_student(path / "student")
    return path
