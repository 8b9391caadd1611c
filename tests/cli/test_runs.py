from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from mint_ray.cli import cli, runs
from tests.cli.commands import TABLE_HEADER, mint_ray, write_spec


def test_the_json_object_is_the_last_line_whatever_is_printed_at_exit(folder: Path) -> None:
    table = folder / "few.csv"
    table.write_text(TABLE_HEADER + "\n".join(f"r{i},g{i},OMIM:{i % 2},HP:0001250" for i in range(12)) + "\n")
    path = write_spec(folder, f"{{kind: table, uri: {table}}}", more="pair: {sampler: {kind: hard, top: 1}}\n")
    done = mint_ray("prepare", str(path), "--json", before="import atexit; atexit.register(print, 'late')")
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("late\n")
    assert list(json.loads(done.stdout.splitlines()[-1])["artifacts"]) == ["prepare"]


def test_the_entry_point_of_ray_jobs_is_mint_ray_run(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "jobs" / "run.py"
    done = subprocess.run([sys.executable, script, tmp_path / "none.yaml"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"mint-ray: {tmp_path / 'none.yaml'}: no such file\n"


@pytest.mark.parametrize("trials", ["0", "-1", "+0", "ten", "1.5"])
def test_a_number_of_trials_that_is_not_positive_is_rejected(trials: str, folder: Path) -> None:
    result = CliRunner().invoke(cli, ["sweep", str(write_spec(folder, "{kind: hpo}")), f"--trials={trials}"])
    assert result.exit_code == 2
    assert "expected a number such as 36, or +20" in result.output


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("out", "out/mint-ray.log"),
        ("file:///mnt/out", "/mnt/out/mint-ray.log"),
        ("s3://bucket/run", "mint-ray.log"),
    ],
)
def test_the_log_file_is_in_a_local_root_and_else_in_the_current_folder(root: str, expected: str) -> None:
    assert runs._log_file(root) == Path(expected)


def test_every_artifact_of_the_last_stage_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def artifact(uri: str, **counts: int) -> SimpleNamespace:
        return SimpleNamespace(uri=uri, manifest=SimpleNamespace(counts=counts))

    done = {
        "prepare": artifact("p", records=5),
        "answer/base": artifact("b", answers=2),
        "answer/aligned": artifact("a"),
    }
    runs._print_result(done, "answer")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "answers: 2\nanswer/base: b\nanswer/aligned: a\n"
