"""Join a vision encoder and a language model to a student that sees, in one task on a worker."""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from ray.util.queue import Queue

from mint_ray.artifacts import Artifact, File, open_artifact
from mint_ray.config.loader import UserError, dump
from mint_ray.config.stages import Join, Published
from mint_ray.images import ImageError, Pixels, read_image
from mint_ray.models.pretrained import Place, identity_of, place_of
from mint_ray.models.vision_processor import FRAME
from mint_ray.records import Label, Record, Split
from mint_ray.runtime.map_parts import map_parts
from mint_ray.runtime.session import connect
from mint_ray.runtime.train_workers import listen
from mint_ray.students import check_student, student_place, student_revision
from mint_ray.students.build_vlm import Caption, Captions, join_models, save_joined, steps_of, train_projector
from mint_ray.students.config import Student
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")

STUDENT = "student"
"""The folder in the artifact, as `from_pretrained` reads it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WholePart:
    """All of the work: one task does it."""

    path: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JoinedPart:
    """What the task made, and how well the projector tells the names."""

    path: str
    files: list[File]
    counts: dict[str, int]
    dropped: dict[str, int]
    losses: dict[str, float]


def join_student(root: str, config: Join, records: Artifact) -> Artifact:
    """Folder `student`: safetensors, processor and tokenizer of the joined model.

    Its manifest says what a name costs (mean negative log-likelihood of a token) on captions of the training and the
    validation split, before and after the projector was trained. Raises UserError for parts that do not go together,
    and if no training image can be read.
    """
    inputs = {
        "records": records.name,
        "vision": identity_of(config.vision.model_id, config.vision.revision, "vision"),
        "language": student_revision(_as_student(config.language)),
    }
    artifact = open_artifact(root, "join", {"join": dump(config)}, inputs)
    if artifact.is_complete:
        return artifact
    resources = config.resources
    connect()
    with artifact.write() as draft, listen(_hear()) as queue:
        [made] = map_parts(
            artifact,
            [WholePart(path=STUDENT)],
            JoinedPart,
            JoinActor,
            (artifact, config, records, queue),
            actors=None,
            cpus=resources.cpus,
            gpus=resources.gpus,
        )
        draft.placed += made.files
        draft.counts.update(made.counts)
        draft.dropped.update(made.dropped)
        draft.metrics.update(made.losses)
    logger.info("join: %s", ", ".join(f"{name} {loss:.3f}" for name, loss in made.losses.items()))
    return artifact


def _hear() -> Callable[[int, int], None]:
    progress = functools.cache(lambda captions: Progress("join", captions, "captions"))
    return lambda done, captions: progress(captions).update(done)


def check_parts(config: Join) -> None:
    """Raise UserError if a part is missing or its commit is not named; loads no weights."""
    try:
        identity_of(config.vision.model_id, config.vision.revision, "vision")
    except UserError as error:
        raise UserError(f"join.vision.{error}") from error
    try:
        check_student(_as_student(config.language))
    except UserError as error:
        raise UserError(f"join.language.{error}") from error


class JoinActor:
    """Joins the parts, trains the projector and writes the student to where the artifact belongs."""

    def __init__(self, artifact: Artifact, config: Join, records: Artifact, queue: Queue | None = None) -> None:
        """`queue` gets (captions read, captions to be read in all)."""
        torch.set_num_threads(max(1, int(config.resources.cpus)))
        self.artifact, self.config, self.records, self.queue = artifact, config, records, queue
        self.done = 0

    def work(self, part: WholePart) -> JoinedPart:
        config = self.config
        vision = Place(
            model_id=config.vision.model_id,
            path=place_of(config.vision.model_id, "vision"),
            revision=config.vision.revision,
        )
        language = student_place(_as_student(config.language))
        model, processor = join_models(vision, language, config.seed)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        images = Images()
        train, validation = (images.readable(self._captions(split)) for split in ("train", "validation"))
        if not train:
            told = ", ".join(f"{reason} {count}" for reason, count in sorted(images.unread.items()))
            raise UserError(f"join: no training image can be read ({told or 'no record has one'})")
        captions = Captions(model, processor, config.question, images.read)
        batch_size = config.train_batch_size
        shown = {"train": train[:: max(1, len(train) // max(1, len(validation)))], "validation": validation}
        steps = steps_of(config.num_train_epochs, len(train), batch_size)
        tell = functools.partial(self._tell, steps * batch_size + 2 * sum(map(len, shown.values())))
        losses = {f"{split}_before": captions.measure(some, batch_size, tell) for split, some in shown.items() if some}
        train_projector(
            captions,
            train,
            learning_rate=config.learning_rate,
            epochs=config.num_train_epochs,
            batch_size=batch_size,
            seed=config.seed,
            tell=tell,
        )
        losses |= {f"{split}_after": captions.measure(some, batch_size, tell) for split, some in shown.items() if some}
        with tempfile.TemporaryDirectory() as folder:
            save_joined(model.cpu(), processor, Path(folder))
            files = self.artifact.write_folder(STUDENT, Path(folder))
        counts = {"captions_train": len(train), "captions_validation": len(validation), "steps": steps}
        return JoinedPart(path=part.path, files=files, counts=counts, dropped=dict(images.unread), losses=losses)

    def _tell(self, captions: int, count: int) -> None:
        self.done += count
        if self.queue is not None:
            self.queue.put((self.done, captions))

    def _captions(self, split: Split) -> list[Caption]:
        names = {label.label_id: label.name for label in self.records.rows(Label, "labels")}
        return [
            Caption(image_uri=record.image_uri, name=names[record.label_id])
            for record in self.records.rows(Record, "records")
            if record.split == split and record.image_uri is not None and record.label_id in names
        ]


class Images:
    """Reads images one at a time, and counts those that cannot be."""

    def __init__(self) -> None:
        self.unread: Counter[str] = Counter()

    def read(self, uri: str) -> Pixels:
        return read_image(uri, FRAME)

    def readable(self, captions: Sequence[Caption]) -> list[Caption]:
        """Those whose images are fit to be read."""
        found = []
        for caption in captions:
            try:
                self.read(caption.image_uri)
            except ImageError as error:
                self.unread[error.reason] += 1
            else:
                found.append(caption)
        return found


def _as_student(language: Published) -> Student:
    return Student(model_id=language.model_id, revision=language.revision)
