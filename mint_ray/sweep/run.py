"""Run a sweep: trials around the pipeline, the finalists with other seeds, the winner on the test split."""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import logging
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from ruamel.yaml import YAML

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.config.loader import UserError, dump, fingerprint, one_line, replace
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.sweep import SweepConfig
from mint_ray.metrics import METRICS
from mint_ray.metrics.methods import read_methods
from mint_ray.pipeline import check_pipeline, run_pipeline
from mint_ray.plan import Done
from mint_ray.records import Method
from mint_ray.reports.sweep import SweepSummary, TrialRow, render_markdown, render_terminal
from mint_ray.reports.sweep_page import render_html
from mint_ray.runtime.parallel import run_pipelines
from mint_ray.sweep.space import check_space, grid
from mint_ray.sweep.study import (
    ARTIFACTS,
    CHANGES,
    CURVE,
    ERROR,
    SECONDS,
    AskAndTell,
    completed,
    open_study,
    study_name,
)
from mint_ray.sweep.trials import clear_runs, run_trials, rung_metric

logger = logging.getLogger("mint_ray")

PAGE, MARKDOWN, TABLE, TRIALS, BEST = "report.html", "report.md", "table.txt", "trials.json", "best.yaml"
SEEDS = "seeds"
"""User attribute of the study: `trial:seed` to the value of the trial's spec with that training seed, or its error."""
SEED_PATH, SPLIT_PATH = "train.trainer.seed", "evaluate.split"
DATA_SECTIONS = ("task", "fit", "score", "pair")
"""Sections that define the training data of the student; the others define how it is trained."""
MIN_TRIALS_FOR_IMPORTANCE = 6
EVALUATED = Method(student="aligned")
"""Method whose metric the sweep improves: free answers of the aligned student without retrieval."""


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The result of a sweep."""

    report: Artifact
    study: str
    """Name of the Optuna study."""
    winner: dict[str, Any]
    """Changes of the best spec, by dotted path."""
    trials: dict[str, int]
    """Number of trials by state."""
    failed: bool
    """True if a trial, or a run with another seed, failed."""


@dataclasses.dataclass(frozen=True)
class _Finalist:
    """A finalist and its values on the validation split: its own, then one per additional seed."""

    trial: FrozenTrial
    seeds: list[float | str]
    """Value of the metric per training seed, or the error of that run."""

    @property
    def values(self) -> list[float]:
        return [value for value in self.seeds if not isinstance(value, str)]


def run_sweep(config: SweepConfig, more: int = 0) -> SweepResult:
    """Run trials until there are `sweep.n_trials` and `more`, then run the winner and the default on the test split.

    An interrupted sweep continues when it is run again. Raises UserError for errors the user can fix, before any model
    is loaded.
    """
    sweep, default = config.sweep, config.pipeline
    check_sweep(config)
    on_validation = replace(default, {SPLIT_PATH: "validation"})
    with open_study(config) as study:
        # runs alone and first: trials reuse its scores and the answers of its base student
        baseline = run_pipeline(on_validation, "evaluate")
        trials = AskAndTell(study, sweep, sweep.n_trials + more)
        run_trials(trials, on_validation)
        clear_runs(config.root, trials)
        best = completed(study)[: sweep.finalists]
        if not best:
            errors = [trial.user_attrs[ERROR] for trial in study.trials if ERROR in trial.user_attrs]
            raise RuntimeError(f"no trial completed; last error: {errors[-1] if errors else 'none'}")
        finalists = _run_seeds(study, config, on_validation, best)
        winner = _choose(finalists, sweep.direction)
        best_spec = replace(default, {**winner.user_attrs[CHANGES], "title": f"{default.title}: best of the sweep"})
        tested = {"default": run_pipeline(default), "winner": run_pipeline(best_spec)}
        summary = _summarize(config, study, baseline, finalists, winner, tested)
        report = _write_report(config, summary, best_spec, finalists, tested)
    states = [trial.state.name.lower() for trial in study.trials]
    return SweepResult(
        report=report,
        study=study.study_name,
        winner=winner.user_attrs[CHANGES],
        trials={state: states.count(state) for state in dict.fromkeys(states)},
        failed="fail" in states or any(len(finalist.values) < len(finalist.seeds) for finalist in finalists),
    )


def check_sweep(config: SweepConfig) -> None:
    """Raise UserError if the space, the metric or the pipeline itself is invalid."""
    sweep = config.sweep
    if sweep.metric not in METRICS:
        close = difflib.get_close_matches(sweep.metric, METRICS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(METRICS)}"
        raise UserError(f"sweep.metric: got {sweep.metric!r}; {hint}")
    if config.prepare.splits.validation == 0:
        raise UserError("sweep: prepare.splits.validation is 0, and trials are evaluated on that split")
    if SEED_PATH in sweep.space and sweep.num_seeds:
        raise UserError(
            f"sweep.space.{SEED_PATH}: cannot be varied while sweep.num_seeds is {sweep.num_seeds}, which trains the "
            "finalists with other seeds"
        )
    pipeline = config.pipeline
    check_space(pipeline, sweep.space)
    if sweep.search.kind == "grid":
        next(grid(sweep.space))
    check_pipeline(pipeline)


def _run_seeds(
    study: optuna.Study, config: SweepConfig, on_validation: PipelineConfig, best: list[FrozenTrial]
) -> list[_Finalist]:
    """Run the finalists with additional training seeds; a run that fails has its error in place of a value."""
    sweep, known = config.sweep, dict(study.user_attrs.get(SEEDS, {}))
    first = on_validation.train.trainer.seed + 1
    seeds = range(first, first + sweep.num_seeds)
    specs: dict[str, PipelineConfig] = {}
    keys: dict[str, str] = {}
    for trial in best:
        for seed in seeds:
            name, key = f"trial {trial.number}, seed {seed}", f"{trial.number}:{seed}"
            if key not in known:
                specs[name] = replace(on_validation, {**trial.user_attrs[CHANGES], SEED_PATH: seed})
                keys[name] = key
    if specs:
        logger.info("sweep: %d runs of the finalists with other seeds", len(specs))
        for name, done in run_pipelines(specs, "evaluate", sweep.resources.max_concurrent, max_attempts=2):
            known[keys[name]] = (
                one_line(done, with_type=True) if isinstance(done, Exception) else _value(done, sweep.metric)
            )
            study.set_user_attr(SEEDS, known)
    return [_Finalist(trial, [trial.values[0], *(known[f"{trial.number}:{seed}"] for seed in seeds)]) for trial in best]


def _value(done: Done, metric: str) -> float | str:
    """Return the metric of the aligned student, or an error message if its answers have no such metric."""
    estimates = read_methods(done["evaluate"].manifest.metrics)[EVALUATED]
    return estimates[metric].value if metric in estimates else f"no {metric}; available: {', '.join(estimates)}"


def _choose(finalists: Sequence[_Finalist], direction: str) -> FrozenTrial:
    """Return the trial with the best mean over seeds; of equal ones the first, which was best in the search."""
    sign = 1 if direction == "maximize" else -1
    return max(finalists, key=lambda finalist: sign * statistics.fmean(finalist.values)).trial


def _summarize(
    config: SweepConfig,
    study: optuna.Study,
    baseline: Done,
    finalists: Sequence[_Finalist],
    winner: FrozenTrial,
    tested: Mapping[str, Done],
) -> SweepSummary:
    """Return all that the report shows."""
    sweep, resources = config.sweep, config.train.resources
    trials = study.get_trials(deepcopy=False)
    before = read_methods(baseline["evaluate"].manifest.metrics)[EVALUATED].get(sweep.metric)
    parameters = dict.fromkeys(name for trial in trials for name in trial.params)
    return SweepSummary(
        title=config.title,
        metric=sweep.metric,
        direction=sweep.direction,
        trials=[_row(trial) for trial in trials],
        importance=_importance(study),
        data_parameters=[name for name in parameters if name.startswith(DATA_SECTIONS)],
        curve_metric=rung_metric(sweep),
        default_value=before.value if before else None,
        seeds={finalist.trial.number: finalist.values for finalist in finalists},
        winner=winner.number,
        tested={name: read_methods(done["evaluate"].manifest.metrics)[EVALUATED] for name, done in tested.items()},
        confidence=config.evaluate.confidence,
        workers=resources.worker_range[1],
        uses_gpus=resources.gpus_per_worker > 0,
        config=dump(_public(config)),
        study=study.study_name,
    )


def _write_report(
    config: SweepConfig,
    summary: SweepSummary,
    best_spec: PipelineConfig,
    finalists: Sequence[_Finalist],
    tested: Mapping[str, Done],
) -> Artifact:
    """Write `report.html`, `report.md`, `table.txt`, `trials.json` and `best.yaml`."""
    rows = [dataclasses.asdict(row) for row in summary.trials]
    inputs = {
        "study": study_name(config),
        "trials": fingerprint(rows, {str(finalist.trial.number): finalist.seeds for finalist in finalists}),
        **{name: done["evaluate"].name for name, done in tested.items()},
    }
    artifact = open_artifact(config.root, "sweep", {"sweep": _public(config)}, inputs)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        draft.write_text(PAGE, render_html(summary))
        draft.write_text(MARKDOWN, render_markdown(summary))
        draft.write_text(TABLE, render_terminal(summary))
        draft.write_text(TRIALS, json.dumps(rows, indent=1))
        draft.write_text(BEST, _as_yaml(best_spec))
        draft.counts.update(f"trials {row.state}" for row in summary.trials)
    return artifact


def _public(config: SweepConfig) -> SweepConfig:
    """Return the config without its root, and without the storage's URL, which may contain a password."""
    return dataclasses.replace(config, root=".", sweep=dataclasses.replace(config.sweep, storage=None))


def _row(trial: FrozenTrial) -> TrialRow:
    attributes = trial.user_attrs
    start, end = trial.datetime_start, trial.datetime_complete
    return TrialRow(
        number=trial.number,
        state=trial.state.name.lower(),
        # the value of a pruned trial is its last value at a rung, which is another metric
        value=trial.values[0] if trial.state == TrialState.COMPLETE and trial.values else None,
        parameters=dict(trial.params),
        changes=attributes.get(CHANGES, {}),
        curve=[(int(step), value) for step, value in attributes.get(CURVE, {}).items()],
        worker_seconds=attributes.get(SECONDS, 0.0),
        wall_seconds=(end - start).total_seconds() if start and end else 0.0,
        error=attributes.get(ERROR) if trial.state == TrialState.FAIL else None,
        artifacts=attributes.get(ARTIFACTS, {}),
    )


def _importance(study: optuna.Study) -> dict[str, float]:
    """Return the importance of each parameter, largest first; they sum to 1. Empty with fewer than six trials.

    By conditional PED-ANOVA (arXiv 2304.10255, 2601.20800): the importance for reaching the best trials. Conditional
    parameters, such as those of one sampler, are weighed among the trials that have them.
    """
    trials = completed(study)
    if len(trials) < MIN_TRIALS_FOR_IMPORTANCE:
        return {}
    sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
    with warnings.catch_warnings():
        # Optuna warns that a given target is minimized, which the sign takes into account
        warnings.simplefilter("ignore")
        return get_param_importances(
            study,
            # the best tenth, but at least five trials unless that is more than half
            evaluator=PedAnovaImportanceEvaluator(target_quantile=max(0.1, min(5 / len(trials), 0.5))),
            # the metric alone, also where the cost of a trial is a second objective
            target=lambda trial: sign * trial.values[0],
        )


def _as_yaml(config: PipelineConfig) -> str:
    target = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(dump(config), target)
    return target.getvalue()
