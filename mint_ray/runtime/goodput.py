"""Resource accounting: allocated, productive, lost and idle seconds of every attempt at an artifact.

Every attempt leaves a small journal, `journal/{artifact}/{attempt}.json` below the root. It is written when the attempt
ends and every few seconds before that, so that the time of an attempt whose driver dies is counted too. It holds what
the workers of the attempt reported. Times are seconds since 1970, on the clock of the machine that reports them.

Counted are the resources that workers reserve, as long as they have them, not the driver or nodes without a worker.
A task that dies with its worker reports nothing and is not counted. An actor that is lost is counted from its last
report to the start of its replacement.
"""

from __future__ import annotations

import contextvars
import dataclasses
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mint_ray import storage
from mint_ray.config.loader import UserError, dump, from_data, one_line

logger = logging.getLogger("mint_ray")

JOURNAL = "journal"
WRITE_INTERVAL_SECONDS = 15.0
"""Time between two writes of a journal; an attempt that is killed loses at most this much of its account."""


@dataclasses.dataclass(kw_only=True)
class WorkerUsage:
    """Seconds that one worker reported; for tasks, those of all tasks together."""

    started_at: float
    """Time at which its resources were allocated."""
    reported_at: float
    """Time of its last report."""
    startup: float = 0.0
    productive: float = 0.0
    lost: float = 0.0
    """Seconds spent on work that an earlier worker or attempt had done before it failed."""
    lost_at: float | None = None
    """Time at which the worker was known to have failed."""


@dataclasses.dataclass(kw_only=True)
class WorkerPool:
    """Workers that were requested together."""

    cpus: float
    """CPUs per worker."""
    gpus: float
    """GPUs per worker."""
    max_workers: int | None
    """Maximum number of workers at a time; None for tasks, which have no resources allocated between two reports."""
    is_durable: bool
    """True if completed work is kept if the attempt is interrupted."""
    requested_at: float
    released_at: float | None = None
    """Time at which the resources were released; None if the attempt crashed before reporting it."""
    max_step: int = 0
    """Last training step that was reached; 0 for workers that do not train."""
    workers: dict[str, WorkerUsage] = dataclasses.field(default_factory=dict)

    def report(
        self,
        worker: str,
        *,
        started_at: float,
        at: float,
        startup: float = 0.0,
        productive: float = 0.0,
        lost: float = 0.0,
    ) -> None:
        """Add the seconds that a worker has spent up to the time `at`."""
        with _LOCK:
            usage = self.workers.setdefault(worker, WorkerUsage(started_at=started_at, reported_at=at))
            usage.started_at = min(usage.started_at, started_at)
            usage.reported_at = max(usage.reported_at, at)
            usage.startup += startup
            usage.productive += productive
            usage.lost += lost

    def mark_lost(self, worker: str, at: float) -> None:
        """Record that a worker has failed."""
        with _LOCK:
            self.workers[worker].lost_at = at


@dataclasses.dataclass(kw_only=True)
class Attempt:
    """One process's work on an artifact."""

    started_at: float
    updated_at: float
    """Time at which the journal was last written."""
    is_finished: bool = False
    """True if the attempt ended by itself, successfully or with an error."""
    has_published: bool = False
    """True if this attempt published the artifact."""
    pools: list[WorkerPool] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResourceSeconds:
    """Number of CPUs and GPUs times the seconds for which they were allocated."""

    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def __add__(self, other: ResourceSeconds) -> ResourceSeconds:
        return ResourceSeconds(
            cpu_seconds=self.cpu_seconds + other.cpu_seconds, gpu_seconds=self.gpu_seconds + other.gpu_seconds
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goodput:
    """Cost of an artifact over all attempts; `allocated` is the sum of the four fields after it."""

    attempts: int = 0
    wall_seconds: float = 0.0
    waiting_seconds: float = 0.0
    """Wall clock between a request for workers and the start of the first one."""
    allocated: ResourceSeconds = ResourceSeconds()
    startup: ResourceSeconds = ResourceSeconds()
    """Time to start processes and load models, up to the first work."""
    productive: ResourceSeconds = ResourceSeconds()
    """Time whose work ended in the artifact."""
    lost: ResourceSeconds = ResourceSeconds()
    """Time whose work was lost with a worker or an attempt, or repeated after that."""
    idle: ResourceSeconds = ResourceSeconds()
    """Time without work: waiting for input, for other workers, for the driver, or for the last checkpoint."""

    def __add__(self, other: Goodput) -> Goodput:
        both = {
            field.name: getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self)
        }
        return Goodput(**both)


def sum_attempts(attempts: Sequence[Attempt]) -> Goodput:
    """Return the cost of several attempts at one artifact."""
    total = Goodput()
    for attempt in attempts:
        total += Goodput(attempts=1, wall_seconds=attempt.updated_at - attempt.started_at)
        for pool in attempt.pools:
            total += _pool_goodput(pool, attempt)
    return total


def measure_goodput(root: str, artifact: str) -> Goodput:
    """Return the cost so far of the artifact with that name."""
    return sum_attempts(read_attempts(root, artifact))


def read_attempts(root: str, artifact: str) -> list[Attempt]:
    """Return the journals of an artifact, oldest first, without those that cannot be read."""
    folder = storage.join(root, JOURNAL, artifact)
    attempts = []
    for uri in storage.list_files(folder) if storage.exists(folder) else []:
        try:
            attempts.append(from_data(Attempt, json.loads(storage.read_bytes(uri)), uri))
        except (UserError, ValueError):
            logger.warning("%s: cannot be read; the cost of this attempt is not counted", uri)
    return sorted(attempts, key=lambda attempt: attempt.started_at)


class Journal:
    """The journal of one running attempt."""

    def __init__(self, root: str, artifact: str) -> None:
        self.root, self.artifact = root, artifact
        self.uri = storage.join(root, JOURNAL, artifact, f"{uuid.uuid4().hex[:12]}.json")
        self.attempt = Attempt(started_at=time.time(), updated_at=time.time())
        self.ended = threading.Event()

    def write(self) -> None:
        """Write the journal. Failing storage is logged and never ends the run."""
        with _LOCK:
            self.attempt.updated_at = time.time()
            content = json.dumps(dump(self.attempt)).encode()
        try:
            storage.write_bytes(self.uri, content)
        except Exception as error:
            logger.warning("%s: cannot be written (%s)", self.uri, one_line(error))

    def write_periodically(self) -> None:
        """Write the journal every few seconds until the attempt has ended."""
        while not self.ended.wait(WRITE_INTERVAL_SECONDS):
            self.write()


@contextmanager
def record_attempt(root: str, artifact: str) -> Iterator[Attempt]:
    """Record the block as an attempt at an artifact. The block sets `has_published` if it publishes the artifact."""
    journal = Journal(root, artifact)
    token = _current.set(journal)
    thread = threading.Thread(target=journal.write_periodically, daemon=True)
    thread.start()
    try:
        yield journal.attempt
    finally:
        _current.reset(token)
        journal.ended.set()
        thread.join()
        journal.attempt.is_finished = True
        journal.write()


@contextmanager
def record_pool(cpus: float, gpus: float, *, max_workers: int | None, is_durable: bool) -> Iterator[WorkerPool]:
    """Record a pool of workers, requested now and released at the end of the block, in this thread's attempt."""
    pool = WorkerPool(cpus=cpus, gpus=gpus, max_workers=max_workers, is_durable=is_durable, requested_at=time.time())
    journal = _current.get()
    if journal is not None:
        with _LOCK:
            journal.attempt.pools.append(pool)
    try:
        yield pool
    finally:
        pool.released_at = time.time()


def last_step_of_earlier_attempts() -> int:
    """Return the last training step that earlier attempts at this thread's artifact reached; 0 without any."""
    journal = _current.get()
    attempts = read_attempts(journal.root, journal.artifact) if journal is not None else []
    return max((pool.max_step for attempt in attempts for pool in attempt.pools), default=0)


def process_started_at() -> float:
    """Return the time at which this process was started; 0 if the system does not say."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as stat, open("/proc/uptime", encoding="utf-8") as uptime:
            # the fields after the name, which is in parentheses and can contain anything
            ticks = int(stat.read().rpartition(")")[2].split()[19])
            up_seconds = float(uptime.read().split()[0])
    except OSError:
        return 0.0
    return time.time() - up_seconds + ticks / os.sysconf("SC_CLK_TCK")


_LOCK = threading.Lock()
_current: contextvars.ContextVar[Journal | None] = contextvars.ContextVar("journal", default=None)


def _pool_goodput(pool: WorkerPool, attempt: Attempt) -> Goodput:
    end = pool.released_at if pool.released_at is not None else attempt.updated_at
    workers = _with_replaced_workers(pool, end)
    first_start = min((usage.started_at for usage in workers), default=end)
    total = Goodput(waiting_seconds=max(0.0, first_start - pool.requested_at))
    for usage in workers:
        productive, lost = usage.productive, usage.lost
        allocated = usage.startup + productive + lost
        if pool.max_workers is not None:
            until = end if usage.lost_at is None else usage.lost_at
            idle = max(0.0, until - usage.started_at - allocated)
            allocated += idle
            if usage.lost_at is not None or pool.released_at is None:
                # the work since its last report is lost
                lost += min(idle, max(0.0, until - usage.reported_at))
        if not pool.is_durable and not attempt.has_published:
            productive, lost = 0.0, lost + productive

        def amount(seconds: float) -> ResourceSeconds:
            return ResourceSeconds(cpu_seconds=pool.cpus * seconds, gpu_seconds=pool.gpus * seconds)

        total += Goodput(
            allocated=amount(allocated),
            startup=amount(usage.startup),
            productive=amount(productive),
            lost=amount(lost),
            idle=amount(allocated - usage.startup - productive - lost),
        )
    return total


def _with_replaced_workers(pool: WorkerPool, end: float) -> list[WorkerUsage]:
    """Return the workers of a pool, with `lost_at` set for those that were replaced.

    If more workers reported than can exist at a time, those that reported least recently must have been replaced.
    """
    workers = sorted(pool.workers.values(), key=lambda usage: usage.started_at)
    remaining = [usage for usage in workers if usage.lost_at is None]
    replacements = remaining[pool.max_workers :] if pool.max_workers is not None else []
    replaced = sorted(remaining, key=lambda usage: usage.reported_at)[: len(replacements)]
    lost_at = {
        id(usage): min(end, max(usage.reported_at, replacement.started_at))
        for usage, replacement in zip(replaced, replacements, strict=True)
    }
    return [dataclasses.replace(usage, lost_at=lost_at.get(id(usage), usage.lost_at)) for usage in workers]
