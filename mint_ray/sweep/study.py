"""Optuna study of a sweep: the record of its trials, with an ask-and-tell interface that survives a crash.

The process that runs trials asks `AskAndTell` for a trial, reports every validation and tells the result. All of it is
in the study's storage when a call returns, and every call can be repeated: an interrupted trial is handed out again
under its number with the parameters that were sampled for it, and a report that arrives again is not counted twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mint_ray import storage
from mint_ray.config.loader import UserError, fingerprint, without_resources
from mint_ray.config.sweep import Asha, Float, Int, MultiObjective, Sweep, SweepConfig, Tpe
from mint_ray.sweep.lock import lock_file, lock_study
from mint_ray.sweep.space import draw, grid

logger = logging.getLogger("mint_ray")

SWEEPS = "sweeps"
"""Folder below the root for the journals of sweeps and their lock files."""
CHANGES, CURVE, DECISIONS, SECONDS, RUN, ERROR, METRICS, ARTIFACTS = (
    "changes", "curve", "decisions", "worker_seconds", "run", "error", "metrics", "artifacts",
)  # fmt: skip
"""User attributes of a trial."""
COST = "worker_seconds"
"""Name of the second objective of a multi-objective search."""


@dataclasses.dataclass(frozen=True)
class AskedTrial:
    """A trial to run."""

    number: int
    """Number of the trial in the study."""
    changes: dict[str, Any]
    """Differences from the spec, by dotted path."""
    seconds: float = 0.0
    """Worker-seconds that the trial used before it was interrupted."""


class AskAndTell:
    """Ask-and-tell interface to a study: hands out trials and records their validations and results."""

    def __init__(self, study: optuna.Study, sweep: Sweep, n_trials: int) -> None:
        self.study, self.sweep = study, sweep
        self.grid = list(islice(grid(sweep.space), n_trials)) if sweep.search.kind == "grid" else None
        self.n_trials = n_trials if self.grid is None else len(self.grid)
        self.running: dict[int, AskedTrial] = {}
        self._deferred: AskedTrial | None = None
        self._trials: dict[int, optuna.Trial] = {}
        self._interrupted: list[int] = []
        for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if any(trial.user_attrs.get(DECISIONS, {}).values()):
                # the process died between the decision to prune and telling it to the study
                study.tell(trial.number, state=TrialState.PRUNED)
            else:
                self._interrupted.append(trial.number)

    @property
    def is_exhausted(self) -> bool:
        """True if there is no further trial to start."""
        return not (self._deferred or self._interrupted) and self._count() >= self.n_trials

    @property
    def is_finished(self) -> bool:
        """True if there is no further trial to start and none is running."""
        return self.is_exhausted and not self.running

    def ask(self) -> AskedTrial | None:
        """Return a trial to run, or None if none can be started now.

        Two trials with equal changes do not run at the same time, so that the second reuses the first one's artifacts.
        """
        if len(self.running) >= self.sweep.resources.max_concurrent:
            return None
        if self._deferred is None:
            if self._interrupted:
                self._deferred = self._start(self._interrupted.pop(0))
            elif self._count() < self.n_trials:
                self._deferred = self._start(None)
            else:
                return None
        if any(trial.changes == self._deferred.changes for trial in self.running.values()):
            return None
        asked, self._deferred = self._deferred, None
        self.running[asked.number] = asked
        return asked

    def report(self, number: int, run: str, step: int, value: float, seconds: float) -> bool:
        """Record a validation during training; return True, after telling the study, if the trial is pruned.

        Args:
            number: Number of the trial.
            run: Name of its training run.
            step: Optimizer step of the validation.
            value: Value of the pruner's metric.
            seconds: Worker-seconds that the trial has used so far, over all attempts.
        """
        if (state := self._frozen(number).state) != TrialState.RUNNING:
            return state == TrialState.PRUNED
        trial = self._trials[number]
        curve = trial.user_attrs.get(CURVE, {})
        decisions = trial.user_attrs.get(DECISIONS, {})
        if trial.user_attrs.get(RUN) != run:
            trial.set_user_attr(RUN, run)
        self._set_cost(number, seconds)
        if str(step) in decisions:
            return bool(decisions[str(step)])
        is_new = str(step) not in curve
        if is_new:
            trial.set_user_attr(CURVE, curve | {str(step): value})
        if not isinstance(self.sweep.pruner, Asha):
            return False
        # a study has one direction, that of its metric: a loss is negated if the metric is maximized
        compared = value if self.sweep.pruner.direction == self.sweep.direction else -value
        if is_new and step not in self._frozen(number).intermediate_values:
            trial.report(compared, step)
            is_pruned = trial.should_prune()
        else:
            is_pruned = self._repeat_decision(number, step, compared)
        trial.set_user_attr(DECISIONS, decisions | {str(step): is_pruned})
        if is_pruned:
            self.study.tell(number, state=TrialState.PRUNED)
        return is_pruned

    def tell(self, number: int, metrics: Mapping[str, Any], artifacts: Mapping[str, str], seconds: float) -> None:
        """Record the result of a trial.

        Args:
            number: Number of the trial.
            metrics: Estimates of the aligned student on the validation split.
            artifacts: Stage to the name of its artifact.
            seconds: Worker-seconds that the trial used, over all attempts.
        """
        if self._frozen(number).state != TrialState.RUNNING:
            return
        value = metrics[self.sweep.metric]["value"] if self.sweep.metric in metrics else math.nan
        if math.isnan(value):
            self.record_error(number, f"metric {self.sweep.metric} is missing; available: {', '.join(metrics)}")
            self.tell_failed(number)
            return
        trial = self._trials[number]
        trial.set_user_attr(METRICS, dict(metrics))
        trial.set_user_attr(ARTIFACTS, dict(artifacts))
        self._set_cost(number, seconds)
        cost = self._frozen(number).user_attrs[SECONDS]
        self.study.tell(number, [value, cost] if isinstance(self.sweep.search, MultiObjective) else value)

    def record_error(self, number: int, error: str) -> None:
        """Record the error of an attempt; the trial may be attempted again."""
        if self._frozen(number).state == TrialState.RUNNING:
            self._trials[number].set_user_attr(ERROR, error)

    def tell_failed(self, number: int) -> None:
        """Record that a trial failed for good."""
        if self._frozen(number).state == TrialState.RUNNING:
            self.study.tell(number, state=TrialState.FAIL)

    def release(self, number: int) -> None:
        """Forget a trial that has stopped, so that another one can start in its place."""
        self.running.pop(number, None)
        self._trials.pop(number, None)

    def _start(self, number: int | None) -> AskedTrial:
        """Return a new trial, or an interrupted one, even if it was interrupted while its parameters were sampled."""
        self._seed(self._count() if number is None else number, "")
        trial = self.study.ask() if number is None else optuna.Trial(self.study, self._frozen(number)._trial_id)
        self._trials[trial.number] = trial
        # parameters that are sampled jointly must use this seed, not that of the first parameter that is still missing
        _ = trial.relative_params
        changes = trial.user_attrs.get(CHANGES)
        if changes is None:

            def suggest(name: str, parameter: Float | Int | Sequence[Any]) -> Any:
                # seeded by trial and name alone: a restarted process samples what an uninterrupted one would
                self._seed(trial.number, name)
                match parameter:
                    case Float():
                        return trial.suggest_float(name, parameter.low, parameter.high, log=parameter.log)
                    case Int():
                        return trial.suggest_int(
                            name, parameter.low, parameter.high, step=parameter.step, log=parameter.log
                        )
                    case _:
                        return trial.suggest_categorical(name, list(parameter))

            changes = draw(self.sweep.space, suggest)
            trial.set_user_attr(CHANGES, changes)
        return AskedTrial(trial.number, changes, trial.user_attrs.get(SECONDS, 0.0))

    def _seed(self, number: int, name: str) -> None:
        """Seed the study's sampler by trial and parameter; for a grid, fix the parameters of that trial."""
        search = self.sweep.search
        seed = getattr(search, "seed", 0)
        digest = hashlib.sha256(f"{seed}:{number}:{name}".encode()).digest()
        sampler = _sampler(self.sweep, int.from_bytes(digest[:4], "big"))
        if self.grid is not None and number < len(self.grid):
            sampler = PartialFixedSampler(self.grid[number], sampler)
        self.study.sampler = sampler

    def _repeat_decision(self, number: int, step: int, value: float) -> bool:
        """Repeat a pruning decision that was not recorded, in a copy of the study without this trial's own rungs."""
        frozen = self._frozen(number)
        if step not in frozen.intermediate_values:
            self._trials[number].report(value, step)
        copy = optuna.create_study(direction=self.study.direction, pruner=_pruner(self.sweep))
        for other in self.study.get_trials(deepcopy=False):
            if other.number != number and other.state != TrialState.WAITING:
                copy.add_trial(_as_finished(other))
        trial, is_pruned = copy.ask(), False
        for reported in sorted({*frozen.intermediate_values, step}):
            trial.report(value if reported == step else frozen.intermediate_values[reported], reported)
            is_pruned = trial.should_prune()
        # writes the rung to the storage, as the first call would have done
        self._trials[number].should_prune()
        return is_pruned

    def _set_cost(self, number: int, seconds: float) -> None:
        self._trials[number].set_user_attr(SECONDS, round(seconds, 3))

    def _count(self) -> int:
        return len(self.study.get_trials(deepcopy=False))

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]


def study_name(config: SweepConfig) -> str:
    """Return the name of the study: a fingerprint of all settings that affect sampling and evaluation of trials."""
    named = {key: value for key, value in without_resources(config).items() if key not in ("root", "title")}
    excluded = ("storage", "n_trials", "finalists", "num_seeds")
    named["sweep"] = {key: value for key, value in named["sweep"].items() if key not in excluded}
    return f"sweep-{fingerprint(named)}"


@contextmanager
def open_study(config: SweepConfig) -> Iterator[optuna.Study]:
    """Open the study of a sweep, created if it does not exist, and lock it for the duration of the block.

    Raises UserError if another process runs this sweep, or if the storage cannot be reached.
    """
    # trials are logged by the sweep itself; experimental features are used on purpose
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    sweep, name, root = config.sweep, study_name(config), storage.absolute(config.root).removeprefix("file://")
    url = sweep.storage
    if url is None and "://" in root:
        raise UserError(f"sweep.storage: a journal file cannot be in {root}; set a database or a local journal file")
    url = url or f"{root}/{SWEEPS}/{name}.journal"
    what = f"{name} in {_without_credentials(url)}"
    if "://" in url and not url.startswith("sqlite:"):
        study = _load(_database(url), config, name)
        with lock_study(study, what):
            yield study
        return
    path = Path(url.removeprefix("sqlite:///")).absolute()
    with lock_file(path.with_name(f"{path.name}.{name}.lock"), what):
        logger.info("sweep: study %s", what)
        yield _load(_database(url) if "://" in url else _journal(path), config, name)


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """Return the completed trials, best first; equal ones in the order of their numbers."""
    sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return sorted(trials, key=lambda trial: (sign * trial.values[0], trial.number))


def _load(backend: BaseStorage, config: SweepConfig, name: str) -> optuna.Study:
    sweep = config.sweep
    has_cost = isinstance(sweep.search, MultiObjective)
    study = optuna.create_study(
        storage=backend,
        study_name=name,
        load_if_exists=True,
        directions=[StudyDirection[sweep.direction.upper()], *([StudyDirection.MINIMIZE] if has_cost else [])],
        pruner=_pruner(sweep),
    )
    if study.metric_names is None:
        study.set_metric_names([sweep.metric, *([COST] if has_cost else [])])
        study.set_user_attr("title", config.title)
    return study


def _database(url: str) -> BaseStorage:
    place = _without_credentials(url)
    try:
        return RDBStorage(url)
    except ImportError as error:
        raise UserError(f"sweep.storage: {place}: {error}") from error
    except Exception as error:
        # the driver's message may contain the URL with its password
        raise UserError(f"sweep.storage: {place} cannot be used: {type(error).__name__}") from None


def _journal(path: Path) -> BaseStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    # only this process writes here, so a lock left by a killed process is stale, and so is a line that it cut short
    Path(f"{path}.lock").unlink(missing_ok=True)
    if path.exists():
        lines, newline, partial_line = path.read_bytes().rpartition(b"\n")
        if partial_line:
            os.truncate(path, len(lines) + len(newline))
    return JournalStorage(JournalFileBackend(str(path)))


def _sampler(sweep: Sweep, seed: int) -> BaseSampler:
    match sweep.search:
        case Tpe() | MultiObjective():
            return TPESampler(
                seed=seed,
                n_startup_trials=sweep.search.n_startup_trials,
                # sample parameters jointly, with a group of its own for the conditional parameters of a choice
                group=isinstance(sweep.search, Tpe),
                # keep concurrent trials from sampling the same region
                constant_liar=sweep.resources.max_concurrent > 1,
            )
        case _:
            return RandomSampler(seed=seed)


def _pruner(sweep: Sweep) -> BasePruner:
    if isinstance(sweep.pruner, Asha):
        return SuccessiveHalvingPruner(
            min_resource=sweep.pruner.grace_period, reduction_factor=sweep.pruner.reduction_factor
        )
    return NopPruner()


def _as_finished(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial that can be added to another study; of a running trial only the rungs are kept."""
    if trial.state.is_finished():
        return trial
    return optuna.trial.create_trial(
        state=TrialState.FAIL, system_attrs=trial.system_attrs, intermediate_values=trial.intermediate_values
    )


def _without_credentials(url: str) -> str:
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
