"""Run trials in Ray Tune; the study decides what is tried next and what is pruned, and Tune keeps no record."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group

from mint_ray import storage
from mint_ray.artifacts import RUNS
from mint_ray.config.loader import one_line, replace
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.sweep import Asha, Sweep
from mint_ray.metrics.methods import read_methods
from mint_ray.pipeline import run_pipeline
from mint_ray.records import Method
from mint_ray.runtime.parallel import DRIVER_RESOURCES
from mint_ray.runtime.session import connect
from mint_ray.stages.train import GROUP
from mint_ray.sweep.study import RUN, SECONDS, AskAndTell
from mint_ray.telemetry import record_metric

logger = logging.getLogger("mint_ray")

REMOVE_AFTER_SECONDS = 20.0
"""Delay between stopping a trial and removing its placement group; longer than Tune waits for the trial to end,
because a controller that is still alive would create the group again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialJob:
    """The work of one trial, sent to its actor."""

    config: PipelineConfig
    """The resolved spec of the trial."""
    metric: str
    """Validation metric of training that the pruner compares."""
    seconds: float
    """Worker-seconds that earlier attempts used."""


def run_trials(trials: AskAndTell, config: PipelineConfig) -> None:
    """Run trials of the study until none is left; a trial that fails is attempted once more."""
    if trials.is_finished:
        return
    connect()
    os.environ |= {
        # the study is the record: no CSV, JSON or TensorBoard files of Tune
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        # Ctrl-C stops the whole sweep, not only the search
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        # no table of trials in the terminal; the log has more
        "RAY_AIR_NEW_OUTPUT": "0",
        # a pruned trial is blocked in a report, so there is nothing to wait for
        "TUNE_FORCE_TRIAL_CLEANUP_S": "5",
    }
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    scheduler = StudyScheduler(trials)
    with tempfile.TemporaryDirectory(prefix="mint-ray-") as folder:
        tune.Tuner(
            tune.with_resources(run_trial, tune.PlacementGroupFactory([DRIVER_RESOURCES])),
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(trials, config),
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=False,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name="sweep", storage_path=folder, verbose=0, failure_config=tune.FailureConfig(max_failures=1)
            ),
        ).fit()
    for timer in scheduler.removals:
        timer.join()


def run_trial(tune_config: dict[str, Any]) -> None:
    """Run one trial in its own actor and report its validations and its metrics to Tune."""
    job: TrialJob = tune_config["job"]
    started, workers = time.monotonic(), job.config.train.resources.worker_range[1]

    def cost() -> float:
        return job.seconds + (time.monotonic() - started) * workers

    def on_evaluation(run: str, step: int, logged: dict[str, float]) -> None:
        if f"eval_{job.metric}" not in logged:
            known = ", ".join(sorted(key.removeprefix("eval_") for key in logged if key.startswith("eval_")))
            raise ValueError(f"sweep.pruner.metric: got {job.metric!r}; available: {known}")
        # returns after the scheduler has decided; does not return if the trial is pruned
        tune.report(
            {
                "run": run,
                "step": step,
                "rung": logged[f"eval_{job.metric}"],
                "cost": cost(),
                "group": logged.get(GROUP, ""),
            }
        )

    done = run_pipeline(job.config, "evaluate", on_evaluation)
    artifacts = {stage: artifact.name for stage, artifact in done.items()}
    metrics = read_methods(done["evaluate"].manifest.metrics)[Method(student="aligned")]
    estimates = {name: dataclasses.asdict(estimate) for name, estimate in metrics.items()}
    # as JSON, because Tune flattens nested dictionaries
    tune.report({"metrics": json.dumps(estimates), "artifacts": json.dumps(artifacts), "cost": cost()})


class StudySearcher(Searcher):
    """Search algorithm of Tune that asks the study for trials."""

    def __init__(self, trials: AskAndTell, config: PipelineConfig) -> None:
        super().__init__()
        self.trials, self.config = trials, config
        self.numbers: dict[str, int] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Accept Tune's search properties, none of which is used."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the configuration of the next trial, None if none can start now, or FINISHED."""
        if self.trials.is_exhausted:
            return str(Searcher.FINISHED)
        asked = self.trials.ask()
        if asked is None:
            return None
        _record_states(self.trials)
        changes = ", ".join(f"{path} {json.dumps(value)}" for path, value in asked.changes.items())
        logger.info("sweep: trial %d (%d in total): %s", asked.number, self.trials.n_trials, changes)
        self.numbers[trial_id] = asked.number
        job = TrialJob(
            config=replace(self.config, asked.changes), metric=rung_metric(self.trials.sweep), seconds=asked.seconds
        )
        return {"number": asked.number, "job": job}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record that a trial has stopped."""
        number = self.numbers.pop(trial_id)
        if error:
            self.trials.tell_failed(number)
        self.trials.release(number)
        study = self.trials.study
        seconds = study.get_trials(deepcopy=False)[number].user_attrs.get(SECONDS, 0.0)
        record_metric("trial_gpu_seconds", seconds * self.config.train.resources.gpus_per_worker, run=study.study_name)
        _record_states(self.trials)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study has its own storage."""

    def restore(self, checkpoint_path: str) -> None:
        """Raise NotImplementedError: an interrupted sweep continues from its study."""
        raise NotImplementedError("an interrupted sweep continues from its study")

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its arguments for a restore that is never done; the storage's URL may contain a password
        return {}


class StudyScheduler(FIFOScheduler):
    """Scheduler of Tune that reports results to the study and stops the trials that it prunes."""

    _supports_buffered_results = False

    def __init__(self, trials: AskAndTell) -> None:
        super().__init__()
        self.trials = trials
        self.removals: list[threading.Timer] = []

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Report a validation or the result of a trial to the study; return STOP if the trial is pruned."""
        number = trial.config["number"]
        if "rung" in result and not result.get("done"):
            step, value = int(result["step"]), float(result["rung"])
            if self.trials.report(number, result["run"], step, value, result["cost"]):
                self._remove_group_later(result.get("group"))
                logger.info("sweep: trial %d pruned at step %d", number, step)
                return str(TrialScheduler.STOP)
            logger.info("sweep: trial %d at step %d: %s %.4g", number, step, rung_metric(self.trials.sweep), value)
        if "metrics" in result:
            metrics = json.loads(result["metrics"])
            self.trials.tell(number, metrics, json.loads(result["artifacts"]), result["cost"])
            logger.info("sweep: trial %d complete: %s", number, self._value(metrics))
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Record the error of an attempt; Tune calls this before the second attempt and after it."""
        error = one_line(RuntimeError(Path(trial.error_file).read_text(encoding="utf-8")))
        self.trials.record_error(trial.config["number"], error)
        logger.warning("sweep: trial %d failed: %s", trial.config["number"], error)

    def _remove_group_later(self, group: str | None) -> None:
        """Remove the placement group of a stopped trial's training, after its driver has ended.

        Ray keeps the placement group of a dead controller for as long as the job lives. Ray Train leaves its removal to
        a cleaner, which finds the cluster by RAY_ADDRESS or on this machine, and fails if there are two.
        """
        if group:
            timer = threading.Timer(REMOVE_AFTER_SECONDS, _remove_group, [group])
            timer.daemon = True
            timer.start()
            self.removals.append(timer)

    def _value(self, metrics: Mapping[str, Any]) -> str:
        metric = self.trials.sweep.metric
        return f"{metric} {metrics[metric]['value']:.4g}" if metric in metrics else f"no {metric}"

    def __getstate__(self) -> dict[str, Any]:
        return {}


def clear_runs(root: str, trials: AskAndTell) -> None:
    """Remove the checkpoints of pruned and failed trials, from which no run resumes."""
    for trial in trials.study.get_trials(deepcopy=False):
        run = trial.user_attrs.get(RUN)
        if run and trial.state in (TrialState.PRUNED, TrialState.FAIL):
            with suppress(OSError):
                storage.delete_folder(storage.join(storage.absolute(root), RUNS, run))


def rung_metric(sweep: Sweep) -> str:
    """Return the validation metric of training that is recorded for every trial and that the pruner compares."""
    return sweep.pruner.metric if isinstance(sweep.pruner, Asha) else Asha().metric


def _remove_group(group: str) -> None:
    # removing a group that no longer exists is no error
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def _record_states(trials: AskAndTell) -> None:
    states = Counter(trial.state for trial in trials.study.get_trials(deepcopy=False))
    for state in TrialState:
        record_metric("sweep_trials", states[state], run=trials.study.study_name, state=state.name.lower())


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.config['number']:05d}"
