"""Build a vision-language student from an image encoder and a language model, in one task on a worker."""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from ray.util.queue import Queue

from mint_ray import lineage
from mint_ray.artifacts import Artifact, PartResult
from mint_ray.config.loader import UserError
from mint_ray.config.stages import BuildVlm
from mint_ray.images import ImageError, read_images_ahead
from mint_ray.lineage import STUDENT_FOLDER
from mint_ray.models.pretrained import check_model, model_identity, resolve_model
from mint_ray.models.vision_processor import FRAME
from mint_ray.records import Label, Record, Split
from mint_ray.runtime.map_parts import Part, Workers, map_parts
from mint_ray.runtime.session import connect
from mint_ray.runtime.train_workers import listen
from mint_ray.students.build_vlm import Caption, CaptionLoss, build_llava, num_steps, save_vlm, train_projector
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BuiltPart(PartResult):
    """The student that the task wrote, and its caption losses."""

    losses: dict[str, float]
    """Mean negative log-likelihood per caption token, by split, before and after training."""


def build_vlm(root: str, config: BuildVlm, records: Artifact) -> Artifact:
    """Write folder `student`: safetensors, processor and tokenizer of the built model.

    The metrics of the manifest are the caption losses (mean negative log-likelihood per token) on the training and the
    validation split, before and after the projector was trained. Raises UserError for models that do not fit together,
    and if no training image can be read.
    """
    artifact = lineage.build_vlm(root, config, records)
    if artifact.is_complete:
        return artifact
    resources = config.resources
    connect()
    with artifact.write() as draft, listen(_progress_updater()) as queue:
        workers = Workers(
            worker=BuildVlmTask,
            arguments=(artifact, config, records, queue),
            cpus=resources.cpus,
            gpus=resources.gpus,
        )
        [built] = map_parts(artifact, [Part(path=STUDENT_FOLDER)], BuiltPart, workers)
        draft.add_part(built)
        draft.metrics.update(built.losses)
    logger.info("build_vlm: %s", ", ".join(f"{name} {loss:.3f}" for name, loss in built.losses.items()))
    return artifact


def check_models(config: BuildVlm) -> None:
    """Raise UserError if a model is missing or a Hub model has no pinned commit; loads no weights."""
    try:
        model_identity(config.vision, "vision")
    except UserError as error:
        raise UserError(f"build_vlm.vision.{error}") from error
    try:
        check_model(config.language)
    except UserError as error:
        raise UserError(f"build_vlm.language.{error}") from error


class BuildVlmTask:
    """Task that connects the two models, trains the projector and writes the student into the artifact."""

    def __init__(self, artifact: Artifact, config: BuildVlm, records: Artifact, queue: Queue | None = None) -> None:
        """`queue` gets (captions read so far, captions to read in all)."""
        torch.set_num_threads(max(1, int(config.resources.cpus)))
        self.artifact, self.config, self.records, self.queue = artifact, config, records, queue
        self.num_read = 0

    def work(self, part: Part) -> BuiltPart:
        """Build the student and write it."""
        config, batch_size = self.config, self.config.train_batch_size
        vision, language = resolve_model(config.vision, "vision"), resolve_model(config.language, "student")
        model, processor = build_llava(vision, language, config.seed)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        unread: Counter[str] = Counter()
        train, validation = (readable_captions(self._captions(split), unread) for split in ("train", "validation"))
        if not train:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(unread.items()))
            raise UserError(f"build_vlm: no training image can be read ({reasons or 'no record has one'})")
        objective = CaptionLoss(model, processor, config.question)
        measured = {"train": train[:: max(1, len(train) // max(1, len(validation)))], "validation": validation}
        steps = num_steps(config.num_train_epochs, len(train), batch_size)
        on_batch = functools.partial(self._report, steps * batch_size + 2 * sum(map(len, measured.values())))

        def mean_losses(when: str) -> dict[str, float]:
            return {
                f"{split}_{when}": objective.mean_loss(captions, batch_size, on_batch)
                for split, captions in measured.items()
                if captions
            }

        losses = mean_losses("before")
        train_projector(
            objective,
            train,
            learning_rate=config.learning_rate,
            epochs=config.num_train_epochs,
            batch_size=batch_size,
            seed=config.seed,
            on_batch=on_batch,
        )
        losses |= mean_losses("after")
        with tempfile.TemporaryDirectory() as folder:
            save_vlm(model.cpu(), processor, Path(folder))
            files = self.artifact.write_folder(STUDENT_FOLDER, Path(folder))
        counts = {"captions_train": len(train), "captions_validation": len(validation), "steps": steps}
        return BuiltPart(path=part.path, files=files, counts=counts, dropped=dict(unread), losses=losses)

    def _report(self, total: int, count: int) -> None:
        self.num_read += count
        if self.queue is not None:
            self.queue.put((self.num_read, total))

    def _captions(self, split: Split) -> list[Caption]:
        names = {label.label_id: label.name for label in self.records.rows(Label, "labels")}
        return [
            Caption(image_uri=record.image_uri, text=names[record.label_id])
            for record in self.records.rows(Record, "records")
            if record.split == split and record.image_uri is not None and record.label_id in names
        ]


def readable_captions(captions: Iterable[Caption], unread: Counter[str]) -> list[Caption]:
    """Return the captions whose images can be read; the others are counted in `unread`, by reason."""
    readable = []
    for caption, image in read_images_ahead(captions, FRAME, lambda caption: caption.image_uri):
        if isinstance(image, ImageError):
            unread[image.reason] += 1
        else:
            readable.append(caption)
    return readable


def _progress_updater() -> Callable[[int, int], None]:
    progress = functools.cache(lambda total: Progress("build_vlm", total, "captions"))
    return lambda done, total: progress(total).update(done)
