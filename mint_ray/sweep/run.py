"""Find the best spec: trials around the pipeline, the best of them with other seeds, the winner on the test split."""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import logging
import statistics
import warnings
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from ruamel.yaml import YAML

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.config.loader import UserError, dump, fingerprint, replace
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.sweep import SweepConfig
from mint_ray.metrics import METRICS, Estimate
from mint_ray.pipeline import Done, check_pipeline, run_pipeline
from mint_ray.reports.sweep import SweepSummary, TrialRow, render_markdown, render_terminal
from mint_ray.reports.sweep_page import render_html
from mint_ray.runtime.parallel import one_line, run_several
from mint_ray.stages.evaluate import ALIGNED
from mint_ray.sweep.space import check_space, grid
from mint_ray.sweep.study import ARTIFACTS, CHANGES, CURVE, ERROR, SECONDS, Ledger, completed, open_study, study_name
from mint_ray.sweep.trials import clear_runs, run_trials, rung_metric

logger = logging.getLogger("mint_ray")

PAGE, MARKDOWN, TABLE, TRIALS, BEST = "report.html", "report.md", "table.txt", "trials.json", "best.yaml"
SEEDS = "seeds"
"""Attribute of the study: `trial:seed` to what the trial's spec came to with that training seed, or what it raised."""
SEED_PATH, SPLIT_PATH = "train.trainer.seed", "evaluate.split"
DATA_SIDE = ("task", "fit", "score", "pair")
"""Sections that decide what the student is taught, rather than how."""
FEWEST_FOR_IMPORTANCE = 6


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a sweep left behind."""

    report: Artifact
    study: str
    """Name of the Optuna study."""
    winner: dict[str, Any]
    """What the best spec changes, by dotted path."""
    trials: dict[str, int]
    """State to number of trials."""
    failed: bool
    """Whether a trial, or a run with another seed, raised."""


def run_sweep(config: SweepConfig, more: int = 0) -> Outcome:
    """Try specs until there are `sweep.trials` and `more`, and run the best on the test split beside the default.

    A sweep that was cut off goes on when it is run again. Raises UserError for what the user can mend, before any
    model is loaded.
    """
    sweep, default = config.sweep, config.pipeline
    check_sweep(config)
    judged = replace(default, {SPLIT_PATH: "validation"})
    with open_study(config) as study:
        # first and alone: trials find the scores, and what the base student says, as it leaves them
        baseline = run_pipeline(judged, "evaluate")
        ledger = Ledger(study, sweep, sweep.trials + more)
        run_trials(ledger, judged)
        clear_runs(config.root, ledger)
        best = completed(study)[: sweep.best]
        if not best:
            errors = [trial.user_attrs[ERROR] for trial in study.trials if ERROR in trial.user_attrs]
            raise RuntimeError(f"no trial came to its end; the last raised {errors[-1] if errors else 'nothing'}")
        values = _run_seeds(study, config, judged, best)
        winner = _choose(best, values, sweep.direction)
        best_spec = replace(default, {**winner.user_attrs[CHANGES], "title": f"{default.title}: best of the sweep"})
        tested = {"default": run_pipeline(default), "winner": run_pipeline(best_spec)}
        report = _write_report(config, study, baseline, best_spec, values, winner, tested)
    states = [trial.state.name.lower() for trial in study.trials]
    raised = any(isinstance(value, str) for found in values.values() for value in found)
    return Outcome(
        report=report,
        study=study.study_name,
        winner=winner.user_attrs[CHANGES],
        trials={state: states.count(state) for state in dict.fromkeys(states)},
        failed="fail" in states or raised,
    )


def check_sweep(config: SweepConfig) -> None:
    """Raise UserError if the space, the metric or the run itself cannot be meant so."""
    sweep = config.sweep
    if sweep.metric not in METRICS:
        near = difflib.get_close_matches(sweep.metric, METRICS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(METRICS)}"
        raise UserError(f"sweep.metric: got {sweep.metric!r}; {hint}")
    if config.prepare.splits.validation == 0:
        raise UserError("sweep: prepare.splits.validation is 0, and trials are judged on that split")
    if SEED_PATH in sweep.space and sweep.seeds:
        raise UserError(f"sweep.space.{SEED_PATH}: seeds are tried on the best trials (sweep.seeds), not searched for")
    check_space(config.pipeline, sweep.space)
    if sweep.search.kind == "grid":
        next(grid(sweep.space))
    check_pipeline(config.pipeline)


def _run_seeds(
    study: optuna.Study, config: SweepConfig, judged: PipelineConfig, best: list[FrozenTrial]
) -> dict[int, list[float | str]]:
    """Trial to its own value and those of the other seeds; what raised is its error."""
    sweep, known = config.sweep, dict(study.user_attrs.get(SEEDS, {}))
    first = config.train.trainer.seed + 1
    asked = [(trial, seed) for trial in best for seed in range(first, first + sweep.seeds)]
    missing = [(trial, seed) for trial, seed in asked if f"{trial.number}:{seed}" not in known]
    if missing:
        logger.info("sweep: %d runs with other seeds", len(missing))
        key_of = {f"trial {trial.number}, seed {seed}": f"{trial.number}:{seed}" for trial, seed in missing}
        specs = {
            name: replace(judged, {**trial.user_attrs[CHANGES], SEED_PATH: seed})
            for name, (trial, seed) in zip(key_of, missing, strict=True)
        }
        for name, done in run_several(specs, "evaluate", sweep.resources.max_concurrent, attempts=2):
            known[key_of[name]] = one_line(done) if isinstance(done, Exception) else _value(done, sweep.metric)
            study.set_user_attr(SEEDS, known)
    return {
        trial.number: [
            trial.values[0],
            *(known[f"{trial.number}:{seed}"] for seed in range(first, first + sweep.seeds)),
        ]
        for trial in best
    }


def _value(done: Done, metric: str) -> float | str:
    """What the aligned student came to; a student whose answers have no such metric is told like one that raised."""
    metrics = done["evaluate"].manifest.metrics[ALIGNED]
    return float(metrics[metric]["value"]) if metric in metrics else f"no {metric}; there are {', '.join(metrics)}"


def _choose(best: list[FrozenTrial], values: dict[int, list[float | str]], direction: str) -> FrozenTrial:
    """The trial with the best mean over seeds; the first of equal ones, which did best in the search."""
    sign = 1 if direction == "maximize" else -1
    return max(best, key=lambda trial: sign * statistics.fmean(_numbers(values[trial.number])))


def _write_report(
    config: SweepConfig,
    study: optuna.Study,
    baseline: Done,
    best_spec: PipelineConfig,
    values: dict[int, list[float | str]],
    winner: FrozenTrial,
    tested: dict[str, Done],
) -> Artifact:
    rows = [_row(trial) for trial in study.get_trials(deepcopy=False)]
    told = dump(config)
    # where it lies may hold a password
    told["sweep"].pop("store")
    told.pop("root")
    inputs = {
        "study": study_name(config),
        "trials": fingerprint(
            [dataclasses.asdict(row) for row in rows], {str(key): value for key, value in values.items()}
        ),
        **{name: done["evaluate"].name for name, done in tested.items()},
    }
    artifact = open_artifact(config.root, "sweep", {"sweep": told}, inputs)
    if artifact.is_complete:
        return artifact
    sweep = config.sweep
    before = baseline["evaluate"].manifest.metrics[ALIGNED].get(sweep.metric)
    summary = SweepSummary(
        title=config.title,
        metric=sweep.metric,
        direction=sweep.direction,
        trials=rows,
        importance=_importance(study),
        data_side=[name for name in _parameters(study) if name.startswith(DATA_SIDE)],
        curve_metric=rung_metric(sweep),
        default_value=before["value"] if before else None,
        seeds={number: _numbers(found) for number, found in values.items()},
        winner=winner.number,
        methods={
            f"{ALIGNED}, {name}": {
                metric: Estimate(**estimate) for metric, estimate in done["evaluate"].manifest.metrics[ALIGNED].items()
            }
            for name, done in tested.items()
        },
        confidence=config.evaluate.confidence,
        workers=config.train.resources.least_and_most_workers[1],
        gpus=config.train.resources.gpus_per_worker > 0,
        prunes=sweep.pruner.kind != "none",
        config=told,
        study=study.study_name,
    )
    with artifact.write() as draft:
        draft.write_text(PAGE, render_html(summary))
        draft.write_text(MARKDOWN, render_markdown(summary))
        draft.write_text(TABLE, render_terminal(summary))
        draft.write_text(TRIALS, json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        draft.write_text(BEST, _as_yaml(best_spec))
        draft.counts.update(f"trials {row.state}" for row in rows)
    return artifact


def _row(trial: FrozenTrial) -> TrialRow:
    attributes = trial.user_attrs
    ended, began = trial.datetime_complete, trial.datetime_start
    return TrialRow(
        number=trial.number,
        state=trial.state.name.lower(),
        # a trial that was given up is told with the last value at a rung, which is another metric
        value=trial.values[0] if trial.state == TrialState.COMPLETE and trial.values else None,
        parameters=dict(trial.params),
        changes=attributes.get(CHANGES, {}),
        curve=[(int(step), value) for step, value in attributes.get(CURVE, {}).items()],
        worker_seconds=attributes.get(SECONDS, 0.0),
        wall_seconds=(ended - began).total_seconds() if ended and began else 0.0,
        error=attributes.get(ERROR) if trial.state == TrialState.FAIL else None,
        artifacts=attributes.get(ARTIFACTS, {}),
    )


def _importance(study: optuna.Study) -> dict[str, float]:
    """Share of each parameter in what set the best trials apart, most first; sums to 1. Empty below six trials.

    By conditional PED-ANOVA (arXiv 2304.10255, 2601.20800), which weighs what only some trials have, such as a
    sampler's own parameters, among those that have it.
    """
    done = completed(study)
    if len(done) < FEWEST_FOR_IMPORTANCE:
        return {}
    sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
    with warnings.catch_warnings():
        # that a small target counts as a good one is what the sign is for
        warnings.simplefilter("ignore")
        found = get_param_importances(
            study,
            # the best tenth, and no fewer than five trials unless that were more than half
            evaluator=PedAnovaImportanceEvaluator(target_quantile=max(0.1, min(5 / len(done), 0.5))),
            target=lambda trial: sign * trial.values[0],
            normalize=False,
        )
    whole = sum(found.values())
    return {name: share / whole if whole else 0.0 for name, share in sorted(found.items(), key=lambda item: -item[1])}


def _parameters(study: optuna.Study) -> list[str]:
    return list(dict.fromkeys(name for trial in study.get_trials(deepcopy=False) for name in trial.params))


def _numbers(values: list[float | str]) -> list[float]:
    return [value for value in values if not isinstance(value, str)]


def _as_yaml(config: PipelineConfig) -> str:
    target = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(dump(config), target)
    return target.getvalue()
