"""The connection to Ray, made once by the first stage that has work for it, and how rows go through its actors."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import pyarrow as pa
import ray.data

from mint_ray.artifacts import Artifact
from mint_ray.config.loader import UserError
from mint_ray.records import from_table, schema_of, to_table
from mint_ray.runtime import goodput
from mint_ray.runtime.session import PATIENCE, connect, tell_what_lacks
from mint_ray.telemetry import record_metric

Made = TypeVar("Made")

COMPLAINT = "what the user can mend"
"""Column of a block that stands for an error."""
HELD = "what its workers held"
"""Column of a block whose first row holds, in JSON, the resources of the workers that made it."""
TASKS = "tasks"
"""Stands for all tasks of a pool, as if they were one worker."""
BLOCKS_PER_ACTOR = 100
"""Blocks into which parts are gathered for each actor of a pool, at most: the driver's memory grows with their number,
and the last of them is what the other actors wait for."""


@dataclasses.dataclass(frozen=True)
class Ahead:
    """What tasks do with each part before an actor of the pool gets it, so that the two overlap.

    `worker(*arguments).work(part)` returns a table of one row in the columns `worker.columns`; the actor's `work` is
    then given that as well. Finished rows wait in Ray's object store; when they have filled the share of it that Ray
    Data grants a step, it starts no further task until the actors have caught up.
    """

    worker: Any
    arguments: tuple[Any, ...]
    cpus: float
    """Processors of one task, beside those of the actors."""
    memory: int
    """Bytes of one task."""
    tasks: int
    """Most tasks at a time: tasks without a bound would take the processors that actors are still waiting for."""


def map_blocks(
    blocks: list[pa.Table],
    actor: type[Any],
    arguments: tuple[Any, ...],
    *,
    actors: tuple[int, int] | None,
    cpus: float,
    gpus: float,
    ahead: Ahead | None = None,
    keeps: bool = False,
) -> Iterator[pa.Table]:
    """Each block through one of a pool of `actor(*arguments)`, which grows from least to most `actors` as Ray has room;
    None makes one for each block, in a task. A block whose worker dies is given to another. With `ahead`, each block
    goes through a task that does that first. `keeps` says whether what was made stays made if the run is cut off.

    Raises the UserError that an actor raised.
    """
    connect()
    # seconds since 1970, for the workers have clocks of their own
    asked = time.time()
    if actors is None:
        work: Any = _in_task
        how: dict[str, Any] = {"fn_args": (actor, arguments, "work", asked)}
    else:
        work = _Outspoken
        pool = ray.data.ActorPoolStrategy(min_size=actors[0], max_size=actors[1])
        how = {"fn_constructor_args": (actor, arguments, "work", asked), "compute": pool}
    # blocks come cut: the tasks of a repartition would wait for ever for the processors that the actors hold
    dataset = ray.data.from_arrow(blocks)
    if ahead is not None:
        # memory= also keeps Ray Data from fusing the two, which would decode on the teacher's time
        dataset = dataset.map_batches(
            _in_task,
            batch_size=None,
            batch_format="pyarrow",
            fn_args=(ahead.worker, ahead.arguments, "ahead", asked),
            num_cpus=ahead.cpus,
            memory=ahead.memory,
            compute=ray.data.TaskPoolStrategy(size=min(ahead.tasks, len(blocks))),
        )
    mapped = dataset.map_batches(work, batch_size=None, batch_format="pyarrow", num_cpus=cpus, num_gpus=gpus, **how)
    fewest = actors[0] if actors and ahead else 1
    needed = {"CPU": fewest * cpus + (ahead.cpus if ahead else 0), "GPU": fewest * gpus}
    timer = threading.Timer(PATIENCE, tell_what_lacks, (needed,))
    timer.daemon = True
    with ExitStack() as stack:
        pools = {"work": stack.enter_context(goodput.ask(cpus, gpus, most=actors and actors[1], keeps=keeps))}
        if ahead is not None:
            pools["ahead"] = stack.enter_context(goodput.ask(ahead.cpus, 0, most=None, keeps=keeps))
        stack.callback(timer.cancel)
        timer.start()
        for batch in mapped.iter_batches(batch_size=None, batch_format="pyarrow"):
            timer.cancel()
            if batch.column_names == [COMPLAINT]:
                raise UserError(batch[COMPLAINT][0].as_py())
            batch, told = _take_told(batch)
            for pool_name, worker, figures in told:
                pools[pool_name].tell(worker, **figures)
            yield batch


def map_parts(
    artifact: Artifact,
    parts: Sequence[Any],
    made: type[Made],
    actor: type[Any],
    arguments: tuple[Any, ...],
    *,
    actors: tuple[int, int] | None,
    cpus: float,
    gpus: float,
    ahead: Ahead | None = None,
) -> Iterator[Made]:
    """What `actor(*arguments).work(part)` made of each part, a row of class `made`, in the order of the parts.

    A part is a row with a `path` of its own; `work` writes the files that `made.files` tells of into `artifact`. A part
    that has a completion record there is not worked on again, nor ahead of that: only what was in flight when a run was
    cut off is. With `ahead`, `work` is also given the row that was made for the part.
    """
    part = type(parts[0])
    together = 1
    if ahead is not None:
        ahead = dataclasses.replace(
            ahead, worker=_PartAhead, arguments=(artifact, part, made, ahead.worker, ahead.arguments)
        )
    elif actors is not None:
        # a worker that dies does again no more of a block than the part that it was at: the others have their records
        together = parts_together(len(parts), actors[1])
    blocks = [to_table(list(parts[start : start + together]), part) for start in range(0, len(parts), together)]
    worker = (artifact, part, made, actor, arguments)
    for batch in map_blocks(blocks, PartActor, worker, actors=actors, cpus=cpus, gpus=gpus, ahead=ahead, keeps=True):
        yield from from_table(made, batch.cast(schema_of(made)))


def parts_together(parts: int, actors: int) -> int:
    """How many parts make a block."""
    return math.ceil(parts / (BLOCKS_PER_ACTOR * actors))


class PartActor:
    """Holds an actor that works on parts, made when the first part is met that is not finished."""

    def __init__(
        self, artifact: Artifact, part: type[Any], made: type[Any], actor: type[Any], arguments: tuple[Any, ...]
    ) -> None:
        self.artifact, self.part, self.made = artifact, part, made
        self.loading = 0.0
        """Seconds that it took to make the actor."""
        self.make = functools.cache(lambda: self._load(actor, arguments))

    def __call__(self, batch: pa.Table) -> pa.Table:
        parts, before = _cut(batch, self.part)
        return to_table([self._make(part, before) for part in parts], self.made)

    def _load(self, actor: type[Any], arguments: tuple[Any, ...]) -> Any:
        started = time.time()
        try:
            return actor(*arguments)
        finally:
            self.loading += time.time() - started

    def _make(self, part: Any, before: pa.Table | None) -> Any:
        found = self.artifact.finished_part(part.path, self.made)
        if found is not None:
            return found
        made = self.make().work(part) if before is None else self.make().work(part, before)
        # after its files: a record says that they are there
        self.artifact.finish_part(part.path, made)
        written = sum(file.bytes for file in made.files)
        record_metric("bytes_written", written, stage=self.artifact.stage, run=self.artifact.name)
        return made


class _PartAhead:
    """Adds to a part what its worker makes of it, or nulls if the part is finished."""

    def __init__(
        self, artifact: Artifact, part: type[Any], made: type[Any], worker: Any, arguments: tuple[Any, ...]
    ) -> None:
        self.artifact, self.part, self.made = artifact, part, made
        self.make = functools.cache(lambda: worker(*arguments))
        self.columns: pa.Schema = worker.columns

    def __call__(self, batch: pa.Table) -> pa.Table:
        (part,), _ = _cut(batch, self.part)
        if self.artifact.finished_part(part.path, self.made) is not None:
            before = pa.Table.from_arrays([pa.nulls(1, kind) for kind in self.columns.types], schema=self.columns)
        else:
            before = self.make().work(part)
        for field in self.columns:
            batch = batch.append_column(field, before[field.name])
        return batch


def _cut(batch: pa.Table, part: type[Any]) -> tuple[list[Any], pa.Table | None]:
    """The parts of a block, and what was made ahead of them."""
    schema = schema_of(part)
    before = batch.drop_columns(schema.names)
    return from_table(part, batch.select(schema.names).cast(schema)), before if before.column_names else None


_fresh = True
"""Whether nothing of ours has been done in this process."""


class _Outspoken:
    """An actor whose UserErrors come back as blocks: what Ray carries over, it wraps and adds words of its own to.

    Beside each block it tells what it held for it; `asked` is when its pool was asked for.
    """

    def __init__(self, actor: type[Any], arguments: tuple[Any, ...], pool: str, asked: float) -> None:
        self.actor: Any = None
        self.complaint = ""
        self.pool, self.name = pool, uuid.uuid4().hex
        self.since = held_since(asked)
        try:
            self.actor = actor(*arguments)
        except UserError as error:
            self.complaint = str(error)
        self.startup, self.work = time.time() - self.since, 0.0

    def __call__(self, batch: pa.Table) -> pa.Table:
        batch, told = _take_told(batch)
        if batch.column_names == [COMPLAINT]:
            return batch
        if self.actor is not None:
            begun, loading = time.time(), getattr(self.actor, "loading", 0.0)
            try:
                return self._tell(self.actor(batch), begun, loading, told)
            except UserError as error:
                self.complaint = str(error)
        return pa.table({COMPLAINT: [self.complaint]})

    def _tell(self, made: pa.Table, begun: float, loading: float, told: list[Any]) -> pa.Table:
        now, loaded = time.time(), getattr(self.actor, "loading", 0.0) - loading
        self.startup += loaded
        self.work += now - begun - loaded
        if not len(made):
            return made  # the next one that has a row takes it along
        figures = {"since": self.since, "at": now, "startup": self.startup, "work": self.work}
        self.startup = self.work = 0.0
        held = json.dumps([*told, (self.pool, self.name, figures)])
        return made.append_column(HELD, pa.array([held] + [None] * (len(made) - 1), pa.string()))


def _take_told(batch: pa.Table) -> tuple[pa.Table, list[Any]]:
    """A block without its column `HELD`, and what stands there."""
    if HELD not in batch.column_names:
        return batch, []
    return batch.drop_columns([HELD]), json.loads(batch[HELD][0].as_py())


def held_since(asked: float) -> float:
    """When this process began to hold what was asked for at `asked`, both in seconds since 1970: its own start, if that
    came later and this is what it was started for."""
    global _fresh
    fresh, _fresh = _fresh, False
    started = _process_start() if fresh else 0.0
    return started if started > asked else time.time()


def _process_start() -> float:
    """Seconds since 1970; 0 where the machine does not tell."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as stat, open("/proc/uptime", encoding="utf-8") as uptime:
            # behind the name, which may hold anything
            ticks = int(stat.read().rpartition(")")[2].split()[19])
            up = float(uptime.read().split()[0])
    except OSError:
        return 0.0
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


def _in_task(batch: pa.Table, actor: type[Any], arguments: tuple[Any, ...], pool: str, asked: float) -> pa.Table:
    worker = _Outspoken(actor, arguments, pool, asked)
    # tasks hold nothing from one to the next: they are one worker
    worker.name = TASKS
    return worker(batch)
