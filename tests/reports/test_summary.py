"""Summary of a run as plain data."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from mint_ray.config.loader import dump, from_data
from mint_ray.reports import RunSummary
from tests.reports.summaries import RUN


def test_a_summary_can_be_read_back_from_json() -> None:
    without_nan = dataclasses.replace(RUN, log_history=RUN.log_history[:1])
    assert from_data(RunSummary, json.loads(json.dumps(dump(without_nan)))) == without_nan


def test_estimates_are_keyed_by_the_titles_of_methods() -> None:
    assert list(RUN.estimates) == ["teacher", "teacher without face", "base student", "aligned student"]


def test_importing_reports_loads_no_plotting_and_no_templates() -> None:
    code = "import sys, mint_ray.reports; print({'matplotlib', 'jinja2', 'rich'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "set()"
