"""Run trials by Ray Tune: what is tried next and what is given up, the study decides; Tune keeps nothing of its own."""

from __future__ import annotations

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
from mint_ray.config.loader import dump, from_data, replace
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.sweep import Asha, Sweep
from mint_ray.pipeline import run_pipeline
from mint_ray.runtime.parallel import DRIVER
from mint_ray.runtime.session import connect
from mint_ray.stages.evaluate import ALIGNED
from mint_ray.stages.train import GROUP
from mint_ray.sweep.study import RUN, SECONDS, Ledger
from mint_ray.telemetry import record_metric

logger = logging.getLogger("mint_ray")

REMOVE_AFTER_SECONDS = 20.0
"""After a trial is stopped: more than Tune waits for its end, for a live controller would make a new group."""


def run_trials(ledger: Ledger, config: PipelineConfig) -> None:
    """Run what the ledger hands out until it has no more; a trial that raises is tried once more."""
    if ledger.is_finished:
        return
    connect()
    os.environ |= {
        # the study is the record: no CSV, JSON or TensorBoard beside it
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        # Ctrl-C ends the sweep, and does not only end the search
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        # its table of parameters says less than the log does
        "RAY_AIR_NEW_OUTPUT": "0",
        # a trial that was given up hangs in a report; it need not be waited for
        "TUNE_FORCE_TRIAL_CLEANUP_S": "5",
    }
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    scheduler = StudyScheduler(ledger)
    with tempfile.TemporaryDirectory(prefix="mint-ray-") as place:
        tune.Tuner(
            tune.with_resources(run_trial, tune.PlacementGroupFactory([DRIVER])),
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(ledger, config),
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=False,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name="sweep", storage_path=place, verbose=0, failure_config=tune.FailureConfig(max_failures=1)
            ),
        ).fit()
    for timer in scheduler.removals:
        timer.join()


def run_trial(job: dict[str, Any]) -> None:
    """One trial, in an actor of its own."""
    trial = json.loads(job["trial"])
    config, metric = from_data(PipelineConfig, trial["config"]), trial["metric"]
    started, workers = time.monotonic(), config.train.resources.least_and_most_workers[1]

    def cost() -> float:
        return float(trial["seconds"] + (time.monotonic() - started) * workers)

    def on_evaluation(run: str, step: int, logged: dict[str, float]) -> None:
        if f"eval_{metric}" not in logged:
            known = ", ".join(sorted(key.removeprefix("eval_") for key in logged if key.startswith("eval_")))
            raise ValueError(f"sweep.pruner.metric: got {metric!r}; the validation has {known}")
        # comes back when the scheduler has decided; if that is to stop, it does not
        tune.report(
            {
                "run": run,
                "step": step,
                "rung": logged[f"eval_{metric}"],
                "cost": cost(),
                "group": logged.get(GROUP, ""),
            }
        )

    done = run_pipeline(config, "evaluate", on_evaluation)
    artifacts = {stage: artifact.name for stage, artifact in done.items()}
    metrics = done["evaluate"].manifest.metrics[ALIGNED]
    tune.report({"metrics": json.dumps(metrics), "artifacts": json.dumps(artifacts), "cost": cost()})


class StudySearcher(Searcher):
    """Tune's view of the ledger."""

    def __init__(self, ledger: Ledger, config: PipelineConfig) -> None:
        super().__init__()
        self.ledger, self.config = ledger, config
        self.numbers: dict[str, int] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        drawn = self.ledger.next()
        if drawn is None:
            return None
        if isinstance(drawn, str):
            return str(Searcher.FINISHED)
        sweep = self.ledger.sweep
        _tell_states(self.ledger)
        changed = ", ".join(f"{path} {json.dumps(value)}" for path, value in drawn.changes.items())
        logger.info("sweep: trial %d (%d in all): %s", drawn.number, self.ledger.total, changed)
        self.numbers[trial_id] = drawn.number
        trial = {
            "config": dump(replace(self.config, drawn.changes)),
            "metric": rung_metric(sweep),
            "seconds": drawn.seconds,
        }
        return {"number": drawn.number, "trial": json.dumps(trial)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self.numbers.pop(trial_id)
        if error:
            self.ledger.failed(number)
        self.ledger.closed(number)
        seconds = self.ledger.study.get_trials(deepcopy=False)[number].user_attrs.get(SECONDS, 0.0)
        gpus = self.config.train.resources.gpus_per_worker
        record_metric("trial_gpu_seconds", seconds * gpus, run=self.ledger.study.study_name)
        _tell_states(self.ledger)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is in its own store."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from its study")

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its arguments for a restore that is never made; the store's address may hold a password
        return {}


class StudyScheduler(FIFOScheduler):
    """Passes on to the ledger what trials report, and lets it say which of them stop."""

    _supports_buffered_results = False

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.removals: list[threading.Timer] = []

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        number = trial.config["number"]
        if "rung" in result and not result.get("done"):
            step, value = int(result["step"]), float(result["rung"])
            if self.ledger.evaluated(number, result["run"], step, value, result["cost"]):
                self._free(result.get("group"))
                logger.info("sweep: trial %d given up at step %d", number, step)
                return str(TrialScheduler.STOP)
            logger.info("sweep: trial %d at step %d: %s %.4g", number, step, rung_metric(self.ledger.sweep), value)
        if "metrics" in result:
            metrics = json.loads(result["metrics"])
            self.ledger.finished(number, metrics, json.loads(result["artifacts"]), result["cost"])
            logger.info("sweep: trial %d: %s", number, self._value(metrics))
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        # before the second attempt, and after it
        error = _last_line(Path(trial.error_file).read_text(encoding="utf-8"))
        self.ledger.raised(trial.config["number"], error)
        logger.warning("sweep: trial %d raised: %s", trial.config["number"], error)

    def _free(self, group: str | None) -> None:
        """Give back what a stopped trial's training held, once its driver is dead.

        Ray keeps the placement group of a dead controller for as long as the job lives. Ray Train leaves that to a
        cleaner, which looks for a cluster by RAY_ADDRESS or on this machine, and dies where there are two.
        """
        if group:
            timer = threading.Timer(REMOVE_AFTER_SECONDS, _remove_group, [group])
            timer.daemon = True
            timer.start()
            self.removals.append(timer)

    def _value(self, metrics: Mapping[str, Any]) -> str:
        metric = self.ledger.sweep.metric
        return f"{metric} {metrics[metric]['value']:.4g}" if metric in metrics else f"no {metric}"

    def __getstate__(self) -> dict[str, Any]:
        return {}


def clear_runs(root: str, ledger: Ledger) -> None:
    """Remove the checkpoints of trials that were given up or failed: nobody goes on from them."""
    for trial in ledger.study.get_trials(deepcopy=False):
        run = trial.user_attrs.get(RUN)
        if run and trial.state.name in ("PRUNED", "FAIL"):
            with suppress(OSError):
                storage.delete_folder(storage.join(storage.absolute(root), RUNS, run))


def rung_metric(sweep: Sweep) -> str:
    """The validation metric of training that trials are followed by."""
    return sweep.pruner.metric if isinstance(sweep.pruner, Asha) else Asha().metric


def _remove_group(group: str) -> None:
    # a group that is gone already is no error
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def _tell_states(ledger: Ledger) -> None:
    states = Counter(trial.state.name for trial in ledger.study.get_trials(deepcopy=False))
    for state in TrialState:
        record_metric("sweep_trials", states[state.name], run=ledger.study.study_name, state=state.name.lower())


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.config['number']:05d}"


def _last_line(error: object) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
