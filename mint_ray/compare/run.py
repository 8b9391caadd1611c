"""Run every method with every seed, and leave a report."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.compare.plan import Method, plan_methods, shared_config
from mint_ray.compare.summary import Done, summarise_comparison
from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.loader import UserError, dump
from mint_ray.pipeline import check_pipeline, run_pipeline
from mint_ray.reports.comparison import render_markdown, render_terminal
from mint_ray.reports.comparison_page import render_html
from mint_ray.runtime.parallel import one_line, run_several
from mint_ray.stages.pair import check_lengths
from mint_ray.stages.report import MARKDOWN, PAGE, TABLE

logger = logging.getLogger("mint_ray")

SUMMARY = "comparison.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """What a comparison left behind."""

    report: Artifact
    failed: dict[str, str]
    """Method to why it has no numbers."""


def run_comparison(config: ComparisonConfig) -> Compared:
    """Run every method with every seed, `resources.max_concurrent` at a time, then write the report.

    What methods share is done once, by the first run and ahead of the others, and what is complete is not done again,
    so that the same command goes on after an interruption. A method that fails is left without numbers, and the others
    go on. Raises UserError, before any work, for a method that cannot be run or is not on equal terms.
    """
    methods = plan_methods(config)
    shared = shared_config(config)
    for each in (shared, *(method.configs[0] for method in methods)):
        check_pipeline(each)
    records = run_pipeline(shared, "prepare")["prepare"]
    for each in (shared, *(method.configs[0] for method in methods)):
        check_lengths(each.pair, records.manifest.counts["labels"])
    specs = {
        f"{method.name}, run {number} of {len(method.configs)}": each
        for method in methods
        for number, each in enumerate(method.configs, start=1)
    }
    method_of = {name: name.rpartition(", run ")[0] for name in specs}
    ended: dict[str, Done] = {}
    failed: dict[str, str] = {}
    for name, done in run_several(
        specs,
        "evaluate",
        config.resources.max_concurrent,
        ahead=1,
        is_wanted=lambda name: method_of[name] not in failed,
    ):
        if isinstance(done, Exception):
            failed[method_of[name]] = one_line(done)
            told = None if isinstance(done, UserError) else done
            logger.error("compare: %s failed: %s", name, one_line(done), exc_info=told)
        else:
            ended[name] = done
            logger.info("compare: %s is done, %d of %d", name, len(ended), len(specs))
    # in the order of the seeds, whichever ended first
    runs = {
        method.name: [ended[name] for name in specs if name in ended and method_of[name] == method.name]
        for method in methods
    }
    report = write_comparison(config, methods, records, runs, failed)
    return Compared(report=report, failed=failed)


def write_comparison(
    config: ComparisonConfig,
    methods: Sequence[Method],
    records: Artifact,
    runs: Mapping[str, Sequence[Done]],
    failed: Mapping[str, str],
) -> Artifact:
    """`report.html`, `report.md`, `table.txt` and `comparison.json` from what the runs left behind."""
    said = dump(config)
    settings = {key: said[key] for key in ("title", "methods", "seeds", "metric", "reference", "max_similarity")}
    settings |= {"evaluate": said["evaluate"], "pair": said["pair"], "task": said["task"]}
    inputs = {"records": records.name} | {
        f"{method.name}, run {number}": done["evaluate"].name
        for method in methods
        if method.name not in failed
        for number, done in enumerate(runs[method.name], start=1)
    }
    inputs |= {f"{name}, failed": error for name, error in failed.items()}
    artifact = open_artifact(config.root, "compare", settings, inputs)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        summary = summarise_comparison(config, methods, records, runs, failed)
        draft.write_text(PAGE, render_html(summary))
        draft.write_text(MARKDOWN, render_markdown(summary))
        draft.write_text(TABLE, render_terminal(summary))
        draft.write_text(SUMMARY, json.dumps(dump(summary), indent=1))
        draft.counts.update(
            {"methods": len(methods), "methods_failed": len(failed), "records": records.manifest.counts["records_test"]}
        )
        if summary.leaks:
            draft.counts["near_duplicates"] = len(summary.leaks.found)
            if summary.leaks.found:
                logger.warning("compare: %s", summary.leaks.sentence)
        draft.metrics = {
            method.name: {name: dataclasses.asdict(value) for name, value in method.estimates.items()}
            for method in summary.measured
        }
    return artifact
