"""The Optuna study of a sweep: the one place that knows which trials there are and what became of them.

Whoever runs trials asks `Ledger.next` for one and tells it of every validation and of the end. Everything is in the
store by the time a call returns, and every call may be made again: a trial that was cut off is handed out again under
its number, with what was drawn for it, and what it said before is not counted twice.
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
from mint_ray.config.loader import UserError, dump, fingerprint
from mint_ray.config.sweep import Asha, Float, Int, MultiObjective, Sweep, SweepConfig, Tpe
from mint_ray.sweep.lock import hold_file, hold_study
from mint_ray.sweep.space import draw, grid

logger = logging.getLogger("mint_ray")

SWEEPS = "sweeps"
"""Folder below the root for the journals of sweeps and their locks."""
CHANGES, CURVE, DECISIONS, SECONDS, RUN, ERROR, METRICS, ARTIFACTS = (
    "changes", "curve", "decisions", "worker_seconds", "run", "error", "metrics", "artifacts",
)  # fmt: skip
"""What a trial carries in the study besides Optuna's own."""
COST = "worker_seconds"
FINISHED = "finished"


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A trial to be run."""

    number: int
    changes: dict[str, Any]
    """What differs from the spec, by dotted path."""
    seconds: float = 0.0
    """What it has cost so far, before it was cut off."""


class Ledger:
    """Hands out trials, and writes down what becomes of them."""

    def __init__(self, study: optuna.Study, sweep: Sweep, trials: int) -> None:
        self.study, self.sweep = study, sweep
        self.grid = list(islice(grid(sweep.space), trials)) if sweep.search.kind == "grid" else None
        self.total = trials if self.grid is None else len(self.grid)
        self.live: dict[int, Drawn] = {}
        self._held: Drawn | None = None
        self._trials: dict[int, optuna.Trial] = {}
        self._cut_off: list[int] = []
        for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if any(trial.user_attrs.get(DECISIONS, {}).values()):
                # given up, and cut off before that was told
                study.tell(trial.number, state=TrialState.PRUNED)
            else:
                self._cut_off.append(trial.number)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to run."""
        return not (self.live or self._held or self._cut_off) and self._count() >= self.total

    def next(self) -> Drawn | str | None:
        """A trial to run, None while there is none to be had yet, or FINISHED.

        Two trials that drew the same are not run at the same time: the second finds what the first has made.
        """
        if len(self.live) >= self.sweep.resources.max_concurrent:
            return None
        if self._held is None:
            if self._cut_off:
                self._held = self._open(self._cut_off.pop(0))
            elif self._count() < self.total:
                self._held = self._open(None)
            else:
                return FINISHED
        if any(drawn.changes == self._held.changes for drawn in self.live.values()):
            return None
        drawn, self._held = self._held, None
        self.live[drawn.number] = drawn
        return drawn

    def evaluated(self, number: int, run: str, step: int, value: float, seconds: float) -> bool:
        """Write down a validation during training; whether the trial is given up, and told so to the study.

        `seconds` are all that the trial has cost.
        """
        if (state := self._frozen(number).state) != TrialState.RUNNING:
            return state == TrialState.PRUNED
        trial = self._trials[number]
        curve = trial.user_attrs.get(CURVE, {})
        decisions = trial.user_attrs.get(DECISIONS, {})
        if trial.user_attrs.get(RUN) != run:
            trial.set_user_attr(RUN, run)
        self._cost(number, seconds)
        if str(step) in decisions:
            return bool(decisions[str(step)])
        fresh = str(step) not in curve
        if fresh:
            trial.set_user_attr(CURVE, curve | {str(step): value})
        if not isinstance(self.sweep.pruner, Asha):
            return False
        # the study has one direction, the metric's: a loss is turned round where a larger metric is better
        compared = value if self.sweep.pruner.direction == self.sweep.direction else -value
        if fresh and step not in self._frozen(number).intermediate_values:
            trial.report(compared, step)
            given_up = trial.should_prune()
        else:
            given_up = self._decide_again(number, step, compared)
        trial.set_user_attr(DECISIONS, decisions | {str(step): given_up})
        if given_up:
            self.study.tell(number, state=TrialState.PRUNED)
        return given_up

    def finished(self, number: int, metrics: Mapping[str, Any], artifacts: Mapping[str, str], seconds: float) -> None:
        """Write down what a trial came to; `metrics` are estimates of the aligned student on the validation split."""
        if self._frozen(number).state != TrialState.RUNNING:
            return
        value = metrics[self.sweep.metric]["value"] if self.sweep.metric in metrics else math.nan
        if math.isnan(value):
            self.raised(number, f"no {self.sweep.metric}; there are {', '.join(metrics)}")
            self.failed(number)
            return
        trial = self._trials[number]
        trial.set_user_attr(METRICS, dict(metrics))
        trial.set_user_attr(ARTIFACTS, dict(artifacts))
        self._cost(number, seconds)
        cost = self._frozen(number).user_attrs[SECONDS]
        self.study.tell(number, [value, cost] if isinstance(self.sweep.search, MultiObjective) else value)

    def raised(self, number: int, error: str) -> None:
        """Write down what a trial raised; it may be tried once more."""
        if self._frozen(number).state == TrialState.RUNNING:
            self._trials[number].set_user_attr(ERROR, error)

    def failed(self, number: int) -> None:
        """Write down that a trial is not tried any more."""
        if self._frozen(number).state == TrialState.RUNNING:
            self.study.tell(number, state=TrialState.FAIL)

    def closed(self, number: int) -> None:
        """Nothing of the trial runs any more."""
        self.live.pop(number, None)
        self._trials.pop(number, None)

    def _open(self, number: int | None) -> Drawn:
        """A new trial, or the one that was cut off, whole: also if it was while its parameters were drawn."""
        self._seed(self._count() if number is None else number, "")
        trial = self.study.ask() if number is None else optuna.Trial(self.study, self._frozen(number)._trial_id)
        self._trials[trial.number] = trial
        # what is drawn together is drawn with this seed, not with that of the first parameter that is still missing
        _ = trial.relative_params
        changes = trial.user_attrs.get(CHANGES)
        if changes is None:

            def suggest(name: str, varied: Float | Int | Sequence[Any]) -> Any:
                # from number and name alone: what was drawn before the driver died leaves no trace in what comes after
                self._seed(trial.number, name)
                match varied:
                    case Float():
                        return trial.suggest_float(name, varied.low, varied.high, log=varied.log)
                    case Int():
                        return trial.suggest_int(name, varied.low, varied.high, step=varied.step, log=varied.log)
                    case _:
                        return trial.suggest_categorical(name, list(varied))

            changes = draw(self.sweep.space, suggest)
            trial.set_user_attr(CHANGES, changes)
        return Drawn(trial.number, changes, trial.user_attrs.get(SECONDS, 0.0))

    def _seed(self, number: int, name: str) -> None:
        search = self.sweep.search
        seed = getattr(search, "seed", 0)
        digest = hashlib.sha256(f"{seed}:{number}:{name}".encode()).digest()
        sampler = _sampler(self.sweep, int.from_bytes(digest[:4], "big"))
        if self.grid is not None and number < len(self.grid):
            sampler = PartialFixedSampler(self.grid[number], sampler)
        self.study.sampler = sampler

    def _decide_again(self, number: int, step: int, value: float) -> bool:
        """What the pruner said of a step, or would have, whose answer was lost: asked anew without what it left."""
        frozen = self._frozen(number)
        if step not in frozen.intermediate_values:
            self._trials[number].report(value, step)
        copy = optuna.create_study(direction=self.study.direction, pruner=_pruner(self.sweep))
        for other in self.study.get_trials(deepcopy=False):
            if other.number != number and other.state != TrialState.WAITING:
                copy.add_trial(_as_finished(other))
        trial, given_up = copy.ask(), False
        for reported in sorted({*frozen.intermediate_values, step}):
            trial.report(value if reported == step else frozen.intermediate_values[reported], reported)
            given_up = trial.should_prune()
        # leaves the rung in the store, as the first asking would have
        self._trials[number].should_prune()
        return given_up

    def _cost(self, number: int, seconds: float) -> None:
        self._trials[number].set_user_attr(SECONDS, round(seconds, 3))

    def _count(self) -> int:
        return len(self.study.get_trials(deepcopy=False))

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]


def study_name(config: SweepConfig) -> str:
    """Named by everything that decides what trials are drawn and how they are judged."""
    told = {key: value for key, value in dump(config).items() if key not in ("root", "title")}
    left_out = ("store", "trials", "best", "seeds")
    told["sweep"] = {key: value for key, value in told["sweep"].items() if key not in left_out}
    return f"sweep-{fingerprint(told)}"


@contextmanager
def open_study(config: SweepConfig) -> Iterator[optuna.Study]:
    """The study of a sweep, made if need be and held as long as the block lasts.

    Raises UserError if another process runs this sweep, or its store is out of reach.
    """
    # Optuna tells each trial itself, and warns of what is experimental
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    sweep, name, root = config.sweep, study_name(config), storage.absolute(config.root).removeprefix("file://")
    store = sweep.store
    if store is None and "://" in root:
        raise UserError(f"sweep.store: a journal cannot lie in {root}; name a database or a journal file")
    store = store or f"{root}/{SWEEPS}/{name}.journal"
    what = f"{name} in {_without_secrets(store)}"
    if "://" in store and not store.startswith("sqlite:"):
        study = _load(_database(store), config, name)
        with hold_study(study, what):
            yield study
        return
    path = Path(store.removeprefix("sqlite:///")).absolute()
    with hold_file(path.with_name(f"{path.name}.{name}.held"), what):
        logger.info("sweep: study %s", what)
        yield _load(_database(store) if "://" in store else _journal(path), config, name)


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that ran to their end, best first; equal ones in order of their numbers."""
    sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
    found = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return sorted(found, key=lambda trial: (sign * trial.values[0], trial.number))


def _load(store: BaseStorage, config: SweepConfig, name: str) -> optuna.Study:
    sweep = config.sweep
    both = isinstance(sweep.search, MultiObjective)
    study = optuna.create_study(
        storage=store,
        study_name=name,
        load_if_exists=True,
        directions=[StudyDirection[sweep.direction.upper()], *([StudyDirection.MINIMIZE] if both else [])],
        pruner=_pruner(sweep),
    )
    if study.metric_names is None:
        study.set_metric_names([sweep.metric, *([COST] if both else [])])
        study.set_user_attr("title", config.title)
    return study


def _database(url: str) -> BaseStorage:
    place = _without_secrets(url)
    try:
        return RDBStorage(url)
    except ImportError as error:
        raise UserError(f"sweep.store: {place}: {error}") from error
    except Exception as error:
        # what the driver says may repeat the URL
        raise UserError(f"sweep.store: {place} cannot be used: {type(error).__name__}") from None


def _journal(path: Path) -> BaseStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    # this process alone writes: what another left when it was killed is nobody's any more
    Path(f"{path}.lock").unlink(missing_ok=True)
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            os.truncate(path, len(whole[0]) + len(whole[1]))
    return JournalStorage(JournalFileBackend(str(path)))


def _sampler(sweep: Sweep, seed: int) -> BaseSampler:
    match sweep.search:
        case Tpe() | MultiObjective():
            return TPESampler(
                seed=seed,
                n_startup_trials=sweep.search.startup_trials,
                # parameters are drawn together, and those that only some trials have in a group of their own
                group=isinstance(sweep.search, Tpe),
                # trials that run beside each other must not all go to the same place
                constant_liar=sweep.resources.max_concurrent > 1,
            )
        case _:
            return RandomSampler(seed=seed)


def _pruner(sweep: Sweep) -> BasePruner:
    if isinstance(sweep.pruner, Asha):
        return SuccessiveHalvingPruner(
            min_resource=sweep.pruner.first_step, reduction_factor=sweep.pruner.reduction_factor
        )
    return NopPruner()


def _as_finished(trial: FrozenTrial) -> FrozenTrial:
    """A trial that an in-memory study takes: of one that still runs only the rungs count."""
    if trial.state.is_finished():
        return trial
    return optuna.trial.create_trial(
        state=TrialState.FAIL, system_attrs=trial.system_attrs, intermediate_values=trial.intermediate_values
    )


def _without_secrets(store: str) -> str:
    if "://" not in store:
        return store
    parts = urlsplit(store)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
