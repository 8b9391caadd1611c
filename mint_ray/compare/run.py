"""Run every method of a comparison with every seed, and write the report."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.compare.plan import MethodPlan, plan_methods
from mint_ray.compare.summary import summarize_comparison
from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.loader import UserError, dump, one_line
from mint_ray.pipeline import check_pipeline, run_pipeline
from mint_ray.plan import Done
from mint_ray.reports.comparison import render_markdown, render_terminal
from mint_ray.reports.comparison_page import render_html
from mint_ray.runtime.parallel import run_pipelines
from mint_ray.stages.report import MARKDOWN, PAGE, TABLE

logger = logging.getLogger("mint_ray")

SUMMARY = "comparison.json"
SETTINGS = (
    "title", "methods", "seeds", "metric", "reference", "near_duplicate_threshold", "evaluate", "pair", "task",
)  # fmt: skip
"""Sections of the config that affect the report beyond the artifacts that it reads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonResult:
    """The result of a comparison."""

    report: Artifact
    failed: dict[str, str]
    """Name of a failed method to its error."""


def run_comparison(config: ComparisonConfig) -> ComparisonResult:
    """Run every method with every seed, `resources.max_concurrent` at a time, then write the report.

    The first run goes ahead alone, so that the others reuse its artifacts. Complete artifacts are reused, so the same
    command continues an interrupted comparison. A method that fails has no numbers in the report, and the others
    continue. Raises UserError, before any work, for a method that is invalid or not on equal terms.
    """
    plans, shared = plan_methods(config), config.pipeline
    for each in (shared, *(plan.configs[0] for plan in plans)):
        check_pipeline(each)
    records_stage = "prepare" if shared.prepare.match_texts is None else "match_texts"
    records = run_pipeline(shared, records_stage)[records_stage]
    for plan in plans:
        plan.configs[0].pair.sampler.check_num_labels(records.manifest.counts["labels"])
    specs = {}
    plan_of: dict[str, MethodPlan] = {}
    for plan in plans:
        for number, each in enumerate(plan.configs, start=1):
            run = f"{plan.name}, run {number} of {len(plan.configs)}"
            specs[run], plan_of[run] = each, plan
    completed: dict[str, Done] = {}
    failed: dict[str, str] = {}
    for run, done in run_pipelines(
        specs,
        "evaluate",
        config.resources.max_concurrent,
        num_sequential=1,
        is_wanted=lambda run: plan_of[run].name not in failed,
    ):
        if isinstance(done, Exception):
            error = failed[plan_of[run].name] = one_line(done, with_type=True)
            logger.error("compare: %s failed: %s", run, error, exc_info=None if isinstance(done, UserError) else done)
        else:
            completed[run] = done
            logger.info("compare: %s complete (%d of %d)", run, len(completed), len(specs))
    # in the order of the seeds, not in that of completion
    runs = {plan.name: [completed[run] for run in specs if run in completed and plan_of[run] is plan] for plan in plans}
    return ComparisonResult(report=write_comparison(config, plans, records, runs, failed), failed=failed)


def write_comparison(
    config: ComparisonConfig,
    plans: Sequence[MethodPlan],
    records: Artifact,
    runs: Mapping[str, Sequence[Done]],
    failed: Mapping[str, str],
) -> Artifact:
    """Write `report.html`, `report.md`, `table.txt` and `comparison.json` from the artifacts of the runs.

    Args:
        config: The comparison.
        plans: Its methods.
        records: Artifact of the records that all methods share.
        runs: Name of a method to the artifacts of its runs.
        failed: Name of a failed method to its error.
    """
    inputs = {"records": records.name} | {
        f"{plan.name}, run {number}": done["evaluate"].name
        for plan in plans
        if plan.name not in failed
        for number, done in enumerate(runs[plan.name], start=1)
    }
    inputs |= {f"{name}, failed": error for name, error in failed.items()}
    artifact = open_artifact(config.root, "compare", {key: getattr(config, key) for key in SETTINGS}, inputs)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        summary = summarize_comparison(config, plans, records, runs, failed)
        draft.write_text(PAGE, render_html(summary))
        draft.write_text(MARKDOWN, render_markdown(summary))
        draft.write_text(TABLE, render_terminal(summary))
        draft.write_text(SUMMARY, json.dumps(dump(summary), indent=1))
        draft.counts.update(
            {"methods": len(plans), "methods_failed": len(failed), "records": records.manifest.counts["records_test"]}
        )
        if summary.near_duplicates:
            draft.counts["near_duplicates"] = len(summary.near_duplicates.found)
            if summary.near_duplicates.found:
                logger.warning("compare: %s", summary.near_duplicates.sentence)
        draft.metrics["methods"] = [
            {
                "name": row.name,
                **dataclasses.asdict(row.method),
                "metrics": {name: dataclasses.asdict(estimate) for name, estimate in row.estimates.items()},
            }
            for row in summary.measured
        ]
    return artifact
