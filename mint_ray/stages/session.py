"""The connection to Ray, made once by the first stage that has work for it, and how rows go through its actors."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.data

from mint_ray.artifacts import Artifact
from mint_ray.loading import UserError
from mint_ray.records import from_table, schema_of, to_table

Made = TypeVar("Made")

logger = logging.getLogger("mint_ray")

COMPLAINT = "what the user can mend"
"""Column of a block that stands for an error."""


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine with nothing open to others."""
    if not ray.is_initialized():
        _start()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def map_blocks(
    blocks: list[pa.Table],
    actor: type[Any],
    arguments: tuple[Any, ...],
    *,
    actors: tuple[int, int] | None,
    cpus: float,
    gpus: float,
) -> Iterator[pa.Table]:
    """Each block through one of a pool of `actor(*arguments)`, which grows from least to most `actors` as Ray has room;
    None makes one for each block, in a task. A block whose worker dies is given to another.

    Raises the UserError that an actor raised.
    """
    connect()
    if actors is None:
        work: Any = _in_task
        how: dict[str, Any] = {"fn_args": (actor, arguments)}
    else:
        work = _Outspoken
        pool = ray.data.ActorPoolStrategy(min_size=actors[0], max_size=actors[1])
        how = {"fn_constructor_args": (actor, arguments), "compute": pool}
    # blocks come cut: the tasks of a repartition would wait for ever for the processors that the actors hold
    mapped = ray.data.from_arrow(blocks).map_batches(
        work, batch_size=None, batch_format="pyarrow", num_cpus=cpus, num_gpus=gpus, **how
    )
    for batch in mapped.iter_batches(batch_size=None, batch_format="pyarrow"):
        if batch.column_names == [COMPLAINT]:
            raise UserError(batch[COMPLAINT][0].as_py())
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
) -> Iterator[Made]:
    """What `actor(*arguments).work(part)` made of each part, a row of class `made`, in the order of the parts.

    A part is a row with a `path` of its own; `work` writes the files that `made.files` tells of into `artifact`. A part
    that has a completion record there is not worked on again: only what was in flight when a run was cut off is.
    """
    blocks = [to_table([part], type(part)) for part in parts]
    worker = (artifact, type(parts[0]), made, actor, arguments)
    for batch in map_blocks(blocks, PartActor, worker, actors=actors, cpus=cpus, gpus=gpus):
        yield from from_table(made, batch.cast(schema_of(made)))


class PartActor:
    """Holds an actor that works on parts, made when the first part is met that is not finished."""

    def __init__(
        self, artifact: Artifact, part: type[Any], made: type[Any], actor: type[Any], arguments: tuple[Any, ...]
    ) -> None:
        self.artifact, self.part, self.made = artifact, part, made
        self.make = functools.cache(lambda: actor(*arguments))

    def __call__(self, batch: pa.Table) -> pa.Table:
        return to_table(
            [self._make(part) for part in from_table(self.part, batch.cast(schema_of(self.part)))], self.made
        )

    def _make(self, part: Any) -> Any:
        found = self.artifact.finished_part(part.path, self.made)
        if found is not None:
            return found
        made = self.make().work(part)
        # after its files: a record says that they are there
        self.artifact.finish_part(part.path, made)
        return made


class _Outspoken:
    """An actor whose UserErrors come back as blocks: what Ray carries over, it wraps and adds words of its own to."""

    def __init__(self, actor: type[Any], arguments: tuple[Any, ...]) -> None:
        self.actor: Any = None
        self.complaint = ""
        try:
            self.actor = actor(*arguments)
        except UserError as error:
            self.complaint = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self.actor is not None:
            try:
                return self.actor(batch)
            except UserError as error:
                self.complaint = str(error)
        return pa.table({COMPLAINT: [self.complaint]})


def _start() -> None:
    # progress is told by the stages in lines that a log file can hold; what workers say stays in Ray's own logs
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray.init(
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
        runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}},
    )
    logger.info("ray: connected, %s", ", ".join(f"{k} {v:g}" for k, v in sorted(_resources().items())))


def _in_task(batch: pa.Table, actor: type[Any], arguments: tuple[Any, ...]) -> pa.Table:
    return _Outspoken(actor, arguments)(batch)


def _resources() -> dict[str, float]:
    return {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU")}
