"""What a run rented, what of it became bytes of its artifacts, and where the rest went.

Every attempt at an artifact leaves a small journal, `journal/{artifact}/{attempt}.json` below the root, written when it
ends and every few seconds before: of an attempt whose driver dies, the time up to then is not forgotten. It holds what
the attempt's workers told of themselves; times are seconds since 1970, on the clock of whoever told them.

Counted is what workers reserve while they hold it: not the driver, not machines that nobody holds. A task that dies
with its worker tells nothing, and is not seen; an actor that is lost is, from what it told last until another stood in
its place.
"""

from __future__ import annotations

import contextvars
import dataclasses
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mint_ray import storage
from mint_ray.config.loader import UserError, dump, from_data

logger = logging.getLogger("mint_ray")

JOURNAL = "journal"
BEAT_SECONDS = 15.0
"""An attempt that is cut off is short of so much at most."""


@dataclasses.dataclass(kw_only=True)
class Lease:
    """What one worker has told of itself, in seconds; of tasks, all of them together."""

    since: float
    """When it began to hold what it was given."""
    seen: float
    """When it told last."""
    startup: float = 0.0
    work: float = 0.0
    redone: float = 0.0
    """Work that was done before, by a worker or attempt that was lost."""
    until: float | None = None
    """When it was known to be lost."""


@dataclasses.dataclass(kw_only=True)
class Pool:
    """Workers that were asked for together."""

    cpus: float
    """Of each, and `gpus` likewise."""
    gpus: float
    most: int | None
    """At a time; None for tasks, which hold nothing between what they tell."""
    keeps: bool
    """Whether what they have told is done for good, although the attempt be cut off."""
    asked: float
    until: float | None = None
    """When they were given back; None where nobody lived to tell."""
    reached: int = 0
    """Of a training: the last step."""
    leases: dict[str, Lease] = dataclasses.field(default_factory=dict)

    def tell(
        self, worker: str, *, since: float, at: float, startup: float = 0.0, work: float = 0.0, redone: float = 0.0
    ) -> None:
        """Add what a worker, held `since` then, has done up to `at`."""
        with _LOCK:
            lease = self.leases.setdefault(worker, Lease(since=since, seen=at))
            lease.since, lease.seen = min(lease.since, since), max(lease.seen, at)
            lease.startup += startup
            lease.work += work
            lease.redone += redone

    def lose(self, worker: str, at: float) -> None:
        """Say that a worker is gone."""
        with _LOCK:
            self.leases[worker].until = at


@dataclasses.dataclass(kw_only=True)
class Attempt:
    """One process that set about an artifact."""

    started: float
    seen: float
    """When its journal was written last."""
    ended: bool = False
    """Whether it came to an end of its own, good or bad."""
    published: bool = False
    """Whether it is the one that published the artifact."""
    pools: list[Pool] = dataclasses.field(default_factory=list)
    within: list[str] = dataclasses.field(default_factory=list)
    """Artifacts that were made on the way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Amount:
    """What was held, times how long."""

    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            cpu_seconds=self.cpu_seconds + other.cpu_seconds, gpu_seconds=self.gpu_seconds + other.gpu_seconds
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goodput:
    """What an artifact has cost, over all attempts at it; `rented` is the sum of the four behind it."""

    attempts: int = 0
    wall_seconds: float = 0.0
    waited_seconds: float = 0.0
    """Of the wall clock: workers were asked for and none was there."""
    rented: Amount = Amount()
    startup: Amount = Amount()
    """Starting processes and loading models, up to the first work."""
    work: Amount = Amount()
    """What ended in the artifact."""
    redone: Amount = Amount()
    """What was lost with a worker or an attempt."""
    idle: Amount = Amount()
    """Held without work: for lack of input, for the others, for the driver, and to save a student at the end."""

    def __add__(self, other: Goodput) -> Goodput:
        both = {
            field.name: getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self)
        }
        return Goodput(**both)


def weigh(attempts: Sequence[Attempt]) -> Goodput:
    """Add up what attempts at one artifact tell."""
    total = Goodput()
    for attempt in attempts:
        total += Goodput(attempts=1, wall_seconds=attempt.seen - attempt.started)
        for pool in attempt.pools:
            total += _weigh_pool(pool, attempt)
    return total


def measure_goodput(root: str, artifact: str) -> Goodput:
    """What the artifact of that name has cost so far, with those that were made on the way to it."""
    attempts = read_attempts(root, artifact)
    total = weigh(attempts)
    for name in sorted({name for attempt in attempts for name in attempt.within}):
        # its wall clock is part of that of the attempt around it
        total += dataclasses.replace(weigh(read_attempts(root, name)), attempts=0, wall_seconds=0.0)
    return total


def read_attempts(root: str, artifact: str) -> list[Attempt]:
    """The journals of an artifact, oldest first; one that cannot be read is left out."""
    folder = storage.join(root, JOURNAL, artifact)
    found = []
    for uri in storage.list_files(folder) if storage.exists(folder) else []:
        try:
            found.append(from_data(Attempt, json.loads(storage.read_bytes(uri)), uri))
        except (UserError, ValueError):
            logger.warning("%s: cannot be read; what it tells is left out of what the run has cost", uri)
    return sorted(found, key=lambda attempt: attempt.started)


class Journal:
    """Keeps the journal of an attempt while it runs."""

    def __init__(self, root: str, artifact: str) -> None:
        self.root, self.artifact = root, artifact
        self.uri = storage.join(root, JOURNAL, artifact, f"{uuid.uuid4().hex[:12]}.json")
        self.attempt = Attempt(started=time.time(), seen=time.time())
        self.over = threading.Event()

    def write(self) -> None:
        """Write what is known now. A store that fails costs a figure, never the run."""
        with _LOCK:
            self.attempt.seen = time.time()
            content = json.dumps(dump(self.attempt)).encode()
        try:
            storage.write_bytes(self.uri, content)
        except Exception as error:
            logger.warning("%s: cannot be written (%s)", self.uri, " ".join(str(error).split()))

    def beat(self) -> None:
        """Write again and again until it is over."""
        while not self.over.wait(BEAT_SECONDS):
            self.write()


@contextmanager
def keep_journal(root: str, artifact: str) -> Iterator[Attempt]:
    """The attempt at an artifact that the block is; who publishes says so in it."""
    journal, around = Journal(root, artifact), _open.get()
    if around is not None:
        around.attempt.within.append(artifact)
    token = _open.set(journal)
    thread = threading.Thread(target=journal.beat, daemon=True)
    thread.start()
    try:
        yield journal.attempt
    finally:
        _open.reset(token)
        journal.over.set()
        thread.join()
        journal.attempt.ended = True
        journal.write()


@contextmanager
def ask(cpus: float, gpus: float, *, most: int | None, keeps: bool) -> Iterator[Pool]:
    """Workers of the attempt that is going on in this thread, from when they are asked for until they are given up."""
    pool = Pool(cpus=cpus, gpus=gpus, most=most, keeps=keeps, asked=time.time())
    journal = _open.get()
    if journal is not None:
        with _LOCK:
            journal.attempt.pools.append(pool)
    try:
        yield pool
    finally:
        pool.until = time.time()


def steps_reached() -> int:
    """How far the training of the attempt that is going on came in those before it."""
    journal = _open.get()
    attempts = read_attempts(journal.root, journal.artifact) if journal is not None else []
    return max((pool.reached for attempt in attempts for pool in attempt.pools), default=0)


_LOCK = threading.Lock()
_open: contextvars.ContextVar[Journal | None] = contextvars.ContextVar("journal", default=None)


def _weigh_pool(pool: Pool, attempt: Attempt) -> Goodput:
    end = pool.until if pool.until is not None else attempt.seen
    leases = _with_ends(pool, end)
    total = Goodput(waited_seconds=max(0.0, min((lease.since for lease in leases), default=end) - pool.asked))
    for lease in leases:
        work, redone = lease.work, lease.redone
        rented = lease.startup + work + redone
        if pool.most is not None:
            until = end if lease.until is None else lease.until
            idle = max(0.0, until - lease.since - rented)
            rented += idle
            if lease.until is not None or pool.until is None:
                # what it was at has ended nowhere
                redone += min(idle, max(0.0, until - lease.seen))
        if not pool.keeps and not attempt.published:
            work, redone = 0.0, redone + work

        def amount(seconds: float) -> Amount:
            return Amount(cpu_seconds=pool.cpus * seconds, gpu_seconds=pool.gpus * seconds)

        total += Goodput(
            rented=amount(rented),
            startup=amount(lease.startup),
            work=amount(work),
            redone=amount(redone),
            idle=amount(rented - lease.startup - work - redone),
        )
    return total


def _with_ends(pool: Pool, end: float) -> list[Lease]:
    """The leases, those ended whose worker another has taken the place of: more were seen than there can be."""
    leases = sorted(pool.leases.values(), key=lambda lease: lease.since)
    held = [lease for lease in leases if lease.until is None]
    later = held[pool.most :] if pool.most is not None else []
    gone = sorted(held, key=lambda lease: lease.seen)[: len(later)]
    ends = {id(lease): min(end, max(lease.seen, other.since)) for lease, other in zip(gone, later, strict=True)}
    return [dataclasses.replace(lease, until=ends.get(id(lease), lease.until)) for lease in leases]
