"""Give images without a text the nearest text of another source, as CLIP-IT does (arXiv 2504.16181)."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import AutoConfig

from mint_ray import lineage
from mint_ray.artifacts import Artifact, File, PartResult, read_part
from mint_ray.config.loader import UserError
from mint_ray.config.stages import MatchTexts, Prepare
from mint_ray.images import Frame, ImageError
from mint_ray.lineage import matching_of
from mint_ray.models.pretrained import model_identity
from mint_ray.records import (
    SPLITS,
    TEXT_ID,
    TEXT_SIMILARITY,
    CandidateText,
    Label,
    Record,
    Split,
    from_table,
)
from mint_ray.runtime.images import COLUMNS, decode_images, decoded_images, decoding_memory
from mint_ray.runtime.map_parts import Part, Preprocessing, actor_pool, map_parts
from mint_ray.sources import build_source
from mint_ray.tasks import build_task
from mint_ray.tasks.config import AnyTask
from mint_ray.teachers.calibration import Floats
from mint_ray.teachers.config import TwoTower
from mint_ray.teachers.two_tower import TwoTowerEncoder
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")

BELOW_MINIMUM = "below_min_similarity"
IMAGES_PER_PRODUCT = 64
"""Images compared with all texts at a time: their cosines are one dense matrix."""
DIGITS = 6
"""Decimals of the cosines that are compared; equal texts differ beyond them by the order of floating-point sums."""


def check_texts(config: MatchTexts) -> None:
    """Raise UserError if the texts' files or the encoder are missing, or it is no two-tower model; embeds nothing."""
    try:
        build_source(config.source).inputs()
        model_identity(config.encoder, "other")
        if Path(config.encoder.model_id).expanduser().is_dir():
            _check_family(config.encoder)
    except UserError as error:
        raise UserError(f"prepare.match_texts: {error}") from error


def match_texts(root: str, config: Prepare, task: AnyTask, records: Artifact, texts: Artifact) -> Artifact:
    """Write tables `records` and `labels` as in `records`, with the nearest text of the split for images without one.

    The fields `text_id` and `text_similarity` (a cosine) of a record name its text. A record whose image cannot be
    read, or whose nearest text is below `min_similarity`, stays as it is and is counted; a record whose new text names
    its label is dropped, as in `prepare`. Of equally near texts the first by id is taken. Raises UserError if a split
    is left without records.
    """
    artifact = lineage.match_texts(root, config, task, records, texts)
    if artifact.is_complete:
        return artifact
    labels = records.rows(Label, "labels")
    with artifact.write() as draft:
        draft.write_rows(Label, "labels", labels)
        draft.dropped.update(records.manifest.dropped)
        draft.dropped.update({f"texts: {reason}": count for reason, count in texts.manifest.dropped.items()})
        progress = Progress("match_texts", sum(file.rows or 0 for file in records.table_files("records")), "records")
        for part in _match_parts(artifact, matching_of(config), task, labels, records, texts):
            progress.advance(part.rows)
            draft.add_part(part)
        found = _survey(artifact, draft.placed)
        for split in SPLITS:
            if records.manifest.counts[f"records_{split}"] and not found.splits[split]:
                raise UserError(
                    f"prepare.match_texts: every record of the {split} split got a text that names its label"
                )
        draft.counts.update({f"records_{split}": found.splits[split] for split in SPLITS})
        draft.counts.update({"labels": len(labels), "groups": found.groups, "texts": texts.manifest.counts["texts"]})
        draft.counts["texts_used"] = found.texts_used
        if found.cosines:
            draft.metrics["text_similarity"] = {
                "mean": round(float(np.mean(found.cosines)), 4),
                "min": min(found.cosines),
                "max": max(found.cosines),
            }
    logger.info("match_texts: %s", ", ".join(f"{name} {count:,}" for name, count in artifact.manifest.counts.items()))
    return artifact


def find_nearest(images_ND: Floats, texts_MD: Floats) -> tuple[list[int], list[float]]:
    """Return for each image the index of the text with the highest cosine (the first of several), and that cosine.

    Args:
        images_ND: Embeddings of N images, of norm 1.
        texts_MD: Embeddings of M texts, of norm 1.
    """
    indices: list[int] = []
    cosines: list[float] = []
    for start in range(0, len(images_ND), IMAGES_PER_PRODUCT):
        cosines_NM = np.round(images_ND[start : start + IMAGES_PER_PRODUCT] @ texts_MD.T, DIGITS)
        nearest_N = cosines_NM.argmax(axis=1)
        indices += nearest_N.tolist()
        cosines += cosines_NM[np.arange(len(nearest_N)), nearest_N].tolist()
    return indices, cosines


class MatchActor:
    """Actor that finds the nearest texts for the images of one part of the records at a time."""

    def __init__(
        self, artifact: Artifact, config: MatchTexts, task: AnyTask, labels: Sequence[Label], texts: Artifact
    ) -> None:
        self.artifact, self.config = artifact, config
        self.encoder = TwoTowerEncoder(config.encoder)
        self.task = build_task(task, labels, 1)
        self.texts: dict[Split, list[CandidateText]] = {split: [] for split in SPLITS}
        for text in texts.rows(CandidateText, "texts"):
            self.texts[text.split].append(text)
        self.vectors = _read_vectors(texts)

    def work(self, part: Part, decoded: pa.Table) -> PartResult:
        """Match and write one part; `decoded` has its images (`ImageDecoder`)."""
        records = from_table(Record, read_part(part.uri))
        images = decoded_images(decoded) or []
        dropped: Counter[str] = Counter()
        for image in images:
            if isinstance(image, ImageError):
                dropped[f"without text: {image.reason}"] += 1
        readable = [index for index, image in enumerate(images) if isinstance(image, np.ndarray)]
        vectors = dict(zip(readable, self.encoder.encode_images(images), strict=True))
        for split in SPLITS:
            indices = [index for index in readable if records[index].split == split]
            if not indices:
                continue
            nearest, cosines = find_nearest(np.stack([vectors[index] for index in indices]), self.vectors[split])
            for index, text_index, cosine in zip(indices, nearest, cosines, strict=True):
                if self.config.min_similarity is not None and cosine < self.config.min_similarity:
                    dropped[f"without text: {BELOW_MINIMUM}"] += 1
                else:
                    records[index] = with_text(records[index], self.texts[split][text_index], cosine)
        rows = []
        for record in records:
            # the notes of the other records were checked in `prepare`
            if TEXT_ID in record.fields and self.task.find_label_leak(record) is not None:
                dropped["note_names_diagnosis"] += 1
            else:
                rows.append(record)
        file, rows = self.artifact.write_part_once(part.path, Record, rows)
        counts = {"records_matched": sum(TEXT_ID in record.fields for record in rows)}
        return PartResult(path=part.path, rows=len(records), files=[file], counts=counts, dropped=dict(dropped))


class ImageDecoder:
    """Task that decodes the images of one part that need a text, for a `MatchActor`."""

    columns = COLUMNS

    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    def work(self, part: Part) -> pa.Table:
        """Decode the images of one part."""
        records = from_table(Record, read_part(part.uri))
        return decode_images([record.image_uri if record.needs_text else None for record in records], self.frame)


def with_text(record: Record, text: CandidateText, cosine: float) -> Record:
    """Return the record with a matched text."""
    fields = {TEXT_ID: text.text_id, TEXT_SIMILARITY: f"{cosine:.4f}"}
    return dataclasses.replace(record, text=text.text, fields=record.fields | fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """Statistics of the matched records."""

    splits: Counter[str]
    """Records per split."""
    groups: int
    texts_used: int
    cosines: list[float]


def _match_parts(
    artifact: Artifact,
    config: MatchTexts,
    task: AnyTask,
    labels: Sequence[Label],
    records: Artifact,
    texts: Artifact,
) -> Iterator[PartResult]:
    files, resources = records.table_files("records"), config.resources
    frame = TwoTowerEncoder(config.encoder).frame
    parts = [Part(path=file.path, uri=records.file_uri(file.path)) for file in files]
    workers = actor_pool(MatchActor, (artifact, config, task, labels, texts), resources)
    decoding = Preprocessing(
        worker=ImageDecoder,
        arguments=(frame,),
        cpus=resources.decode_cpus,
        memory=decoding_memory(max(file.rows or 0 for file in files), frame),
        max_tasks=resources.max_decode_tasks,
    )
    return map_parts(artifact, parts, PartResult, workers, preprocessing=decoding)


def _read_vectors(texts: Artifact) -> dict[Split, Floats]:
    """Return the embeddings by split, in the order of their texts, without a Python object per number."""
    found: dict[Split, list[Floats]] = {split: [] for split in SPLITS}
    for file in texts.table_files("embeddings"):
        table = read_part(texts.file_uri(file.path), columns=["split", "vector"])
        vectors_MD = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        splits_M = np.array(table["split"].to_pylist())
        for split, vectors in found.items():
            vectors.append(vectors_MD[splits_M == split])
    return {split: np.concatenate(vectors) for split, vectors in found.items()}


def _survey(artifact: Artifact, files: Sequence[File]) -> Survey:
    splits: Counter[str] = Counter()
    groups: set[str] = set()
    used: set[str] = set()
    cosines: list[float] = []
    for file in files:
        table = read_part(artifact.file_uri(file.path), columns=["split", "group_id", "fields"])
        splits.update(table["split"].to_pylist())
        groups.update(table["group_id"].to_pylist())
        for fields in map(dict, table["fields"].to_pylist()):
            if TEXT_ID in fields:
                used.add(fields[TEXT_ID])
                cosines.append(float(fields[TEXT_SIMILARITY]))
    return Survey(splits=splits, groups=len(groups), texts_used=len(used), cosines=cosines)


def _check_family(config: TwoTower) -> None:
    try:
        found = AutoConfig.from_pretrained(config.model_id, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model_id: {config.model_id}: {str(error).strip().splitlines()[0]}") from error
    for tower in ("vision_config", "text_config"):
        if not hasattr(found, tower):
            raise UserError(f"model_id: {config.model_id}: {found.model_type} is not a CLIP-like model: no {tower}")
