"""Process the parts of a table with Ray Data: in tasks or in a pool of actors, each part exactly once.

`map_parts` is what most stages use. A part that has a completion record is not processed again. `map_blocks` underneath
works on Arrow tables and knows nothing of artifacts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Literal, Protocol, TypeVar

import pyarrow as pa
import ray.data

from mint_ray.artifacts import Artifact, PartResult
from mint_ray.config.loader import UserError
from mint_ray.records import from_table, schema_of, to_table
from mint_ray.runtime import goodput
from mint_ray.runtime.session import WARN_AFTER_SECONDS, connect, warn_about_missing_resources
from mint_ray.telemetry import record_metric

Result = TypeVar("Result", bound=PartResult)

REPORTS = "_reports"
"""Column that each worker adds to its block: in the first row, a JSON list of `WorkerReport`."""
TASKS = "tasks"
"""Name under which the tasks of a pool are accounted together, as if they were one worker."""
MAX_BLOCKS_PER_ACTOR = 100
"""Maximum number of blocks per actor into which parts are grouped: the driver's memory grows with their number, and the
other actors wait for the last one."""

Pool = Literal["work", "preprocess"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of a table: the input of one task."""

    path: str
    """Part that is written, relative to the artifact; unique among the parts of a stage."""
    uri: str = ""
    """Part that is read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """Workers that process blocks or parts: `worker(*arguments)` is created once per actor, or once per task."""

    worker: type[Any]
    arguments: tuple[Any, ...] = ()
    actors: tuple[int, int] | None = None
    """Minimum and maximum size of the actor pool, which grows as Ray has room; None for one task per block."""
    cpus: float = 1.0
    """CPUs per actor or task."""
    gpus: float = 0.0
    """GPUs per actor or task."""


class ActorResources(Protocol):
    """Section of a config that sizes a pool of actors."""

    @property
    def actors(self) -> int:
        """Number of actors."""

    @property
    def cpus_per_actor(self) -> float:
        """CPUs per actor."""

    @property
    def gpus_per_actor(self) -> float:
        """GPUs per actor."""


def actor_pool(worker: type[Any], arguments: tuple[Any, ...], resources: ActorResources) -> Workers:
    """Return a pool of a fixed number of actors.

    A pool that grows would wait for actors that start slowly while others take the CPUs.
    """
    return Workers(
        worker=worker,
        arguments=arguments,
        actors=(resources.actors, resources.actors),
        cpus=resources.cpus_per_actor,
        gpus=resources.gpus_per_actor,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Tasks that preprocess each part before an actor gets it, so that the two overlap.

    `worker(*arguments).work(part)` returns a table of one row with the columns `worker.columns`, and the `work` of the
    actor gets that table as its second argument. Finished rows wait in Ray's object store. If they fill the share of it
    that Ray Data grants to one operator, no more tasks are started until the actors have caught up.
    """

    worker: Any
    arguments: tuple[Any, ...] = ()
    cpus: float
    """CPUs per task, in addition to those of the actors."""
    memory: int
    """Bytes per task."""
    max_tasks: int
    """Maximum number of tasks at a time. Without a maximum, tasks would take the CPUs that actors are waiting for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """Seconds that a worker has spent since its last report, or the error that ended its work."""

    pool: Pool
    process: str
    """Name of the process, unique in the cluster."""
    process_started_at: float
    is_task: bool
    started_at: float
    """Time at which the worker started."""
    at: float
    """Time of the report, on the worker's clock."""
    startup: float
    productive: float
    error: str | None = None
    """Message of the `UserError` that the worker raised."""


def map_blocks(
    blocks: list[pa.Table],
    workers: Workers,
    *,
    preprocessing: Preprocessing | None = None,
    is_durable: bool = False,
) -> Iterator[pa.Table]:
    """Yield `workers.worker(*arguments)(block)` for each block, in order. A block whose worker dies is repeated.

    Args:
        blocks: The blocks; each is one unit of work.
        workers: The workers.
        preprocessing: Tasks through which each block goes first.
        is_durable: Whether completed work is kept if the run is interrupted, for the resource accounting.

    Raises:
        UserError: A worker raised it; the message is the same.
    """
    connect()
    if workers.actors is None:
        function: Any = _run_task
        options: dict[str, Any] = {"fn_args": (workers.worker, workers.arguments, "work")}
    else:
        function = _ReportingWorker
        pool = ray.data.ActorPoolStrategy(min_size=workers.actors[0], max_size=workers.actors[1])
        options = {"fn_constructor_args": (workers.worker, workers.arguments, "work"), "compute": pool}
    # blocks are cut here: tasks that repartition would wait for ever for the CPUs that the actors have
    dataset = ray.data.from_arrow(blocks)
    if preprocessing is not None:
        # memory= also keeps Ray Data from fusing the two operators, which would decode on the actors' time
        dataset = dataset.map_batches(
            _run_task,
            batch_size=None,
            batch_format="pyarrow",
            fn_args=(preprocessing.worker, preprocessing.arguments, "preprocess"),
            num_cpus=preprocessing.cpus,
            memory=preprocessing.memory,
            compute=ray.data.TaskPoolStrategy(size=min(preprocessing.max_tasks, len(blocks))),
        )
    mapped = dataset.map_batches(
        function, batch_size=None, batch_format="pyarrow", num_cpus=workers.cpus, num_gpus=workers.gpus, **options
    )
    timer = threading.Timer(WARN_AFTER_SECONDS, warn_about_missing_resources, (_required(workers, preprocessing),))
    timer.daemon = True
    with ExitStack() as stack:
        account = _Account(stack, workers, preprocessing, is_durable)
        stack.callback(timer.cancel)
        timer.start()
        for batch in mapped.iter_batches(batch_size=None, batch_format="pyarrow"):
            timer.cancel()
            block, reports = _split_reports(batch)
            for report in reports:
                if report.error is not None:
                    raise UserError(report.error)
                account.add(report)
            yield block


def map_parts(
    artifact: Artifact,
    parts: Sequence[Part],
    result: type[Result],
    workers: Workers,
    *,
    preprocessing: Preprocessing | None = None,
) -> Iterator[Result]:
    """Yield `workers.worker(*arguments).work(part)` for each part, in order.

    `work` writes files into `artifact` and returns a `result` that lists them. A part that has a completion record in
    the artifact is neither preprocessed nor processed again, so that an interrupted run repeats only the parts that
    were in progress.

    Raises:
        UserError: A worker raised it; the message is the same.
    """
    part = type(parts[0])
    if workers.actors is not None:
        min_actors, max_actors = (min(number, len(parts)) for number in workers.actors)
        workers = dataclasses.replace(workers, actors=(min_actors, max_actors))
    block_size = 1
    if preprocessing is not None:
        arguments = (artifact, part, result, preprocessing.worker, preprocessing.arguments)
        preprocessing = dataclasses.replace(preprocessing, worker=_PartPreprocessor, arguments=arguments)
    elif workers.actors is not None:
        # blocks of several parts are safe: if a worker dies, the finished parts of its block have their records
        block_size = parts_per_block(len(parts), workers.actors[1])
    blocks = [to_table(list(parts[start : start + block_size]), part) for start in range(0, len(parts), block_size)]
    arguments = (artifact, part, result, workers.worker, workers.arguments)
    part_workers = dataclasses.replace(workers, worker=PartWorker, arguments=arguments)
    for block in map_blocks(blocks, part_workers, preprocessing=preprocessing, is_durable=True):
        yield from from_table(result, block.cast(schema_of(result)))


def parts_per_block(num_parts: int, num_actors: int) -> int:
    """Return the number of parts that form one block."""
    return math.ceil(num_parts / (MAX_BLOCKS_PER_ACTOR * num_actors))


class PartWorker:
    """Worker of `map_blocks` that processes parts. It creates the stage's worker at its first unfinished part."""

    def __init__(
        self, artifact: Artifact, part: type[Part], result: type[PartResult], worker: type[Any], arguments: Any
    ) -> None:
        self.artifact, self.part, self.result = artifact, part, result
        self.loading_seconds = 0.0
        """Time that it took to create the stage's worker."""
        self.worker = functools.cache(lambda: self._load(worker, arguments))

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return the results of the parts of a block."""
        parts, preprocessed = _split_parts(block, self.part)
        return to_table([self._process(part, preprocessed) for part in parts], self.result)

    def _load(self, worker: type[Any], arguments: tuple[Any, ...]) -> Any:
        started = time.time()
        try:
            return worker(*arguments)
        finally:
            self.loading_seconds += time.time() - started

    def _process(self, part: Part, preprocessed: pa.Table | None) -> PartResult:
        finished = self.artifact.finished_part(part.path, self.result)
        if finished is not None:
            return finished
        worker = self.worker()
        result: PartResult = worker.work(part) if preprocessed is None else worker.work(part, preprocessed)
        # after its files: a completion record says that they are there
        self.artifact.finish_part(part.path, result)
        num_bytes = sum(file.bytes for file in result.files)
        record_metric("bytes_written", num_bytes, stage=self.artifact.stage, run=self.artifact.name)
        return result


class _PartPreprocessor:
    """Worker of `map_blocks` that adds to a part the columns of its preprocessing; nulls if the part is finished."""

    def __init__(
        self, artifact: Artifact, part: type[Part], result: type[PartResult], worker: Any, arguments: Any
    ) -> None:
        self.artifact, self.part, self.result = artifact, part, result
        self.worker = functools.cache(lambda: worker(*arguments))
        self.columns: pa.Schema = worker.columns

    def __call__(self, block: pa.Table) -> pa.Table:
        (part,), _ = _split_parts(block, self.part)
        if self.artifact.finished_part(part.path, self.result) is not None:
            nulls = [pa.nulls(1, column_type) for column_type in self.columns.types]
            preprocessed = pa.Table.from_arrays(nulls, schema=self.columns)
        else:
            preprocessed = self.worker().work(part)
        for field in self.columns:
            block = block.append_column(field, preprocessed[field.name])
        return block


class _ReportingWorker:
    """Wrapper of a worker that adds a `WorkerReport` to each block that it returns.

    A UserError becomes a report as well: Ray would wrap it and add its own advice to the message. The first error is
    reported for every further block.
    """

    is_task = False

    def __init__(self, worker: type[Any], arguments: tuple[Any, ...], pool: Pool) -> None:
        self.pool = pool
        self.started_at = time.time()
        self.process_started_at = goodput.process_started_at()
        self.worker: Any = None
        self.error: str | None = None
        try:
            self.worker = worker(*arguments)
        except UserError as error:
            self.error = str(error)
        self.startup, self.productive = time.time() - self.started_at, 0.0
        self.reports: list[WorkerReport] = []
        """Reports that wait for a block with a row to carry them."""

    def __call__(self, block: pa.Table) -> pa.Table:
        block, reports = _split_reports(block)
        self.reports += reports
        result = None
        if all(report.error is None for report in reports):
            result = self._run(block)
            self.reports.append(self._report())
        if result is not None and not len(result):
            return result
        reports, self.reports = self.reports, []
        return _with_reports(result, reports)

    def _run(self, block: pa.Table) -> pa.Table | None:
        """Return the worker's result; None if it raised a UserError, now or earlier."""
        if self.error is not None:
            return None
        began, loading = time.time(), self._loading_seconds()
        try:
            result = self.worker(block)
        except UserError as error:
            self.error = str(error)
            return None
        loaded = self._loading_seconds() - loading
        self.startup += loaded
        self.productive += time.time() - began - loaded
        return result

    def _loading_seconds(self) -> float:
        return float(getattr(self.worker, "loading_seconds", 0.0))

    def _report(self) -> WorkerReport:
        report = WorkerReport(
            pool=self.pool,
            process=f"{socket.gethostname()}-{os.getpid()}-{self.process_started_at:.2f}",
            process_started_at=self.process_started_at,
            is_task=self.is_task,
            started_at=self.started_at,
            at=time.time(),
            startup=self.startup,
            productive=self.productive,
            error=self.error,
        )
        self.startup = self.productive = 0.0
        return report


class _ReportingTask(_ReportingWorker):
    is_task = True


def _run_task(block: pa.Table, worker: type[Any], arguments: tuple[Any, ...], pool: Pool) -> pa.Table:
    return _ReportingTask(worker, arguments, pool)(block)


class _Account:
    """Resource accounting of one `map_blocks`, from the reports of its workers."""

    def __init__(
        self, stack: ExitStack, workers: Workers, preprocessing: Preprocessing | None, is_durable: bool
    ) -> None:
        self.processes: set[str] = set()
        """Processes that have reported."""
        max_workers = workers.actors and workers.actors[1]
        record = functools.partial(goodput.record_pool, is_durable=is_durable)
        self.pools = {"work": stack.enter_context(record(workers.cpus, workers.gpus, max_workers=max_workers))}
        if preprocessing is not None:
            self.pools["preprocess"] = stack.enter_context(record(preprocessing.cpus, 0, max_workers=None))

    def add(self, report: WorkerReport) -> None:
        """Add a report. A process that was started for this pool has its resources since its start."""
        pool = self.pools[report.pool]
        started_at, startup = report.started_at, report.startup
        if report.process not in self.processes and report.process_started_at > pool.requested_at:
            started_at, startup = report.process_started_at, startup + report.started_at - report.process_started_at
        self.processes.add(report.process)
        pool.report(
            TASKS if report.is_task else report.process,
            started_at=started_at,
            at=report.at,
            startup=startup,
            productive=report.productive,
        )


def _required(workers: Workers, preprocessing: Preprocessing | None) -> dict[str, float]:
    """Return the resources without which nothing can start."""
    num_workers = workers.actors[0] if workers.actors and preprocessing else 1
    cpus = num_workers * workers.cpus + (preprocessing.cpus if preprocessing else 0)
    return {"CPU": cpus, "GPU": num_workers * workers.gpus}


def _split_parts(block: pa.Table, part: type[Part]) -> tuple[list[Part], pa.Table | None]:
    """Return the parts of a block, and the columns that preprocessing added; None without any."""
    schema = schema_of(part)
    preprocessed = block.drop_columns(schema.names)
    parts = from_table(part, block.select(schema.names).cast(schema))
    return parts, preprocessed if preprocessed.column_names else None


def _with_reports(block: pa.Table | None, reports: Sequence[WorkerReport]) -> pa.Table:
    """Return the block with its column of reports; a block of that column alone for None."""
    text = json.dumps([dataclasses.asdict(report) for report in reports])
    if block is None:
        return pa.table({REPORTS: pa.array([text], pa.string())})
    return block.append_column(REPORTS, pa.array([text] + [None] * (len(block) - 1), pa.string()))


def _split_reports(block: pa.Table) -> tuple[pa.Table, list[WorkerReport]]:
    """Return a block without its column of reports, and the reports."""
    if REPORTS not in block.column_names:
        return block, []
    reports = [WorkerReport(**report) for report in json.loads(block[REPORTS][0].as_py())]
    return block.drop_columns([REPORTS]), reports
