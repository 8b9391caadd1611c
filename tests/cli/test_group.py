from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import mint_ray.cli as cli_module
from mint_ray.cli import VERBS, cli
from mint_ray.config.loader import dump, from_data, load
from mint_ray.config.specs import config_class
from mint_ray.stages import STAGES
from tests.cli.commands import HEAVY, imported_by, mint_ray, write_spec
from tests.specs import verb_of

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))


def test_help_lists_the_commands_of_stages_in_the_order_in_which_they_run() -> None:
    done = mint_ray("--help")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.partition("Commands:")[2].splitlines()]
    listed = [line[0] for line in lines if line and line[0] in VERBS]
    assert listed == list(VERBS)
    assert listed == ["run", *STAGES]


def test_help_imports_nothing_but_click() -> None:
    done, modules = imported_by("--help")
    assert done.returncode == 0, done.stderr
    assert not modules & (HEAVY | {"pydantic", "ruamel", "pyarrow", "numpy"})


@pytest.mark.parametrize("module", ["mint_ray.config.pipeline", "mint_ray.config.specs", "mint_ray.cli"])
def test_configs_and_command_line_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {sorted(HEAVY)!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("verb", [*VERBS, "check", "compare", "sweep"])
def test_every_command_that_reads_a_spec_accepts_layers(verb: str, folder: Path) -> None:
    spec = write_spec(folder, "{kind: hpo}")
    result = CliRunner().invoke(cli, [verb, str(spec), "--with", str(folder / "none.yaml")])
    assert str(result.exception).endswith("none.yaml: no such file")


def test_every_command_has_a_help_text() -> None:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        assert command.get_short_help_str(200).endswith("."), name


def test_the_readme_lists_every_command() -> None:
    table = (Path(cli_module.__file__).parent / "README.md").read_text().partition("## Modules")[0]
    assert [name for name in cli.commands if f"`{name}" not in table] == []


def test_the_shipped_specs_are_found() -> None:
    assert "quickstart.yaml" in {path.name for path in JOBS}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_shipped_spec_loads(path: Path) -> None:
    cls = config_class(verb_of(path))
    config = load(cls, path)
    assert from_data(cls, dump(config)) == config


def test_an_error_that_the_user_cannot_fix_has_code_1_and_its_traceback_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    before = (
        "import logging, mint_ray.cli.inspect as inspect\n"
        f"logging.getLogger('mint_ray').addHandler(logging.FileHandler({str(log)!r}))\n"
        "import mint_ray.artifacts\n"
        "def fail(uri): raise RuntimeError('first line\\nsecond line')\n"
        "mint_ray.artifacts.verify = fail"
    )
    done = mint_ray("verify", "x", before=before)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"mint-ray: full traceback in {log}",
        "mint-ray: failed: RuntimeError: first line second line",
    ]
    assert "Traceback (most recent call last)" in log.read_text()
