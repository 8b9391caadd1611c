"""Give images that have no text the nearest text of another source, as CLIP-IT does (arXiv 2504.16181)."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoConfig

from mint_ray.artifacts import Artifact, File, open_artifact, read_part
from mint_ray.config.loader import UserError, dump
from mint_ray.config.stages import PairTexts, Prepare
from mint_ray.images import Frame, ImageError
from mint_ray.models.pretrained import identity_of
from mint_ray.records import SPLITS, Label, Record, Split, from_table
from mint_ray.runtime.images import COLUMNS, decode_images, memory_to_decode, seen_images
from mint_ray.runtime.map_parts import Ahead, map_parts
from mint_ray.sources import build_source
from mint_ray.stages.embed_texts import (
    SIMILARITY,
    TEXT_ID,
    MadePart,
    Part,
    Text,
    embed_texts,
    gather_texts,
    needs_text,
    parts_of,
)
from mint_ray.tasks import build_task
from mint_ray.tasks.config import AnyTask
from mint_ray.teachers.config import TwoTowers
from mint_ray.teachers.linear_probe import Array
from mint_ray.teachers.two_tower import TwoTowerEncoder
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")

BELOW = "below_least_similarity"
DECODE_TASKS_PER_ACTOR = 4
IMAGES_PER_PRODUCT = 64
"""Images compared with all texts at a time: their cosines are held as one dense block."""
DIGITS = 6
"""Decimals of the cosines that are compared. Behind them equal texts differ by how the processor orders its sums."""


def check_texts(config: PairTexts) -> None:
    """Raise UserError if the texts' files or the encoder are missing, or it has no two towers; embeds nothing."""
    try:
        build_source(config.source).inputs()
        identity_of(config.encoder.model_id, config.encoder.revision)
        if Path(config.encoder.model_id).expanduser().is_dir():
            _check_family(config.encoder)
    except UserError as error:
        raise UserError(f"prepare.pair_texts: {error}") from error


def pair_texts(root: str, config: Prepare, task: AnyTask, records: Artifact) -> Artifact:
    """Tables `records` and `labels` as in `records`, where images without a text have the nearest one of their split.

    `fields` then say which (`text_id`) and how near (`text_similarity`, a cosine). A record whose image cannot be read,
    or to which no text is near enough, stays as it was and is counted; one whose new text names its own label in what
    the student reads is left out, as `prepare` does. Of texts as near as each other the first by id is taken. Without
    the setting it is `records`. Raises UserError if there is no text for a split that needs some, or a split is left
    without a record.
    """
    pairing = config.pair_texts
    if pairing is None:
        return records
    check_texts(pairing)
    texts = gather_texts(root, config, records)
    embedded = embed_texts(root, config, texts)
    inputs = {**records.inputs, **_identity(pairing), "records": records.name, "embedded": embedded.name}
    artifact = open_artifact(root, "prepare", {"prepare": dump(config), "task": dump(task)}, inputs)
    if artifact.is_complete:
        return artifact
    labels = records.rows(Label, "labels")
    with artifact.write() as draft:
        draft.write_rows(Label, "labels", labels)
        draft.dropped.update(records.manifest.dropped)
        draft.dropped.update({f"texts: {reason}": count for reason, count in texts.manifest.dropped.items()})
        progress = Progress("pair texts", sum(file.rows or 0 for file in records.table_files("records")), "records")
        given = 0
        for part in _pair(artifact, pairing, task, labels, records, texts, embedded):
            progress.advance(part.read)
            draft.placed += part.files
            draft.dropped.update(part.dropped)
            given += part.given
        splits, groups, used, cosines = _survey(artifact, draft.placed)
        for split in SPLITS:
            if records.manifest.counts[f"records_{split}"] and not splits[split]:
                raise UserError(f"prepare.pair_texts: every record of the {split} split was given a text that names it")
        draft.counts.update({f"records_{split}": splits[split] for split in SPLITS})
        draft.counts.update({"labels": len(labels), "groups": groups})
        draft.counts.update({"texts": texts.manifest.counts["texts"], "texts_given": used, "records_given_text": given})
        if cosines:
            draft.metrics["text_similarity"] = {
                "mean": round(float(np.mean(cosines)), 4),
                "least": min(cosines),
                "most": max(cosines),
            }
    logger.info("pair texts: %s", ", ".join(f"{name} {count:,}" for name, count in artifact.manifest.counts.items()))
    return artifact


def find_nearest(images_ND: Array, texts_MD: Array) -> tuple[list[int], list[float]]:
    """For each image the place of the text of the highest cosine, the first of several, and that cosine.

    All vectors are of norm 1.
    """
    places: list[int] = []
    cosines: list[float] = []
    for start in range(0, len(images_ND), IMAGES_PER_PRODUCT):
        cosines_NM = np.round(images_ND[start : start + IMAGES_PER_PRODUCT] @ texts_MD.T, DIGITS)
        nearest_N = cosines_NM.argmax(axis=1)
        places += nearest_N.tolist()
        cosines += cosines_NM[np.arange(len(nearest_N)), nearest_N].tolist()
    return places, cosines


class PairActor:
    """Holds the encoder and the embeddings of all texts, and finds the nearest for the images of one part."""

    def __init__(
        self,
        artifact: Artifact,
        config: PairTexts,
        task: AnyTask,
        labels: Sequence[Label],
        texts: Artifact,
        embedded: Artifact,
    ) -> None:
        self.artifact, self.config = artifact, config
        self.encoder = TwoTowerEncoder(config.encoder)
        self.task = build_task(task, labels, 1)
        self.texts: dict[Split, list[Text]] = {split: [] for split in SPLITS}
        for text in texts.rows(Text, "texts"):
            self.texts[text.split].append(text)
        self.vectors = _read_vectors(embedded)

    def work(self, part: Part, decoded: pa.Table) -> MadePart:
        records = from_table(Record, read_part(part.uri))
        images = seen_images(decoded) or []
        dropped: Counter[str] = Counter()
        for image in images:
            if isinstance(image, ImageError):
                dropped[f"without text: {image.reason}"] += 1
        places = [place for place, image in enumerate(images) if isinstance(image, np.ndarray)]
        vectors = dict(zip(places, self.encoder.look(images), strict=True))
        for split in SPLITS:
            here = [place for place in places if records[place].split == split]
            if not here:
                continue
            nearest, cosines = find_nearest(np.stack([vectors[place] for place in here]), self.vectors[split])
            for place, which, cosine in zip(here, nearest, cosines, strict=True):
                if self.config.least_similarity is not None and cosine < self.config.least_similarity:
                    dropped[f"without text: {BELOW}"] += 1
                else:
                    records[place] = give_text(records[place], self.texts[split][which], cosine)
        rows = []
        for record in records:
            # the others were looked at when the records were prepared
            if TEXT_ID in record.fields and self.task.leak(record) is not None:
                dropped["note_names_diagnosis"] += 1
            else:
                rows.append(record)
        file, rows = self.artifact.write_part_once(part.path, Record, rows)
        given = sum(TEXT_ID in record.fields for record in rows)
        return MadePart(path=part.path, read=len(records), files=[file], given=given, dropped=dict(dropped))


class ImageDecoder:
    """Decodes the images of one part that want a text, for a `PairActor`."""

    columns = COLUMNS

    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    def work(self, part: Part) -> pa.Table:
        records = from_table(Record, read_part(part.uri))
        return decode_images([record.image_uri if needs_text(record) else None for record in records], self.frame)


def give_text(record: Record, text: Text, cosine: float) -> Record:
    """The record with a text, and how it came to it."""
    how = {TEXT_ID: text.text_id, SIMILARITY: f"{cosine:.4f}"}
    return dataclasses.replace(record, text=text.text, fields=record.fields | how)


def _pair(
    artifact: Artifact,
    config: PairTexts,
    task: AnyTask,
    labels: Sequence[Label],
    records: Artifact,
    texts: Artifact,
    embedded: Artifact,
) -> Any:
    files, resources = records.table_files("records"), config.resources
    frame = TwoTowerEncoder(config.encoder).frame
    parts = parts_of(records, "records", "records")
    actors = min(resources.actors, len(parts))
    return map_parts(
        artifact,
        parts,
        MadePart,
        PairActor,
        (artifact, config, task, labels, texts, embedded),
        actors=(actors, actors),
        cpus=resources.cpus_per_actor,
        gpus=resources.gpus_per_actor,
        ahead=Ahead(
            worker=ImageDecoder,
            arguments=(frame,),
            cpus=resources.decode_cpus,
            memory=memory_to_decode(max(file.rows or 0 for file in files), frame),
            tasks=resources.decode_tasks or DECODE_TASKS_PER_ACTOR * resources.actors,
        ),
    )


def _read_vectors(embedded: Artifact) -> dict[Split, Array]:
    """The embeddings by split, in the order of their texts; never as Python's numbers, of which there are millions."""
    found: dict[Split, list[Array]] = {split: [] for split in SPLITS}
    for file in embedded.table_files("embeddings"):
        table = read_part(embedded.file_uri(file.path), columns=["split", "vector"])
        vectors_MD = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        splits_M = np.array(table["split"].to_pylist())
        for split, vectors in found.items():
            vectors.append(vectors_MD[splits_M == split])
    return {split: np.concatenate(vectors) for split, vectors in found.items()}


def _survey(artifact: Artifact, files: Sequence[File]) -> tuple[Counter[str], int, int, list[float]]:
    """Of what was written: records by split, how many groups, how many texts were given, and the cosines."""
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
                cosines.append(float(fields[SIMILARITY]))
    return splits, len(groups), len(used), cosines


def _identity(config: PairTexts) -> dict[str, str]:
    """What the texts and the encoder are, by which the records are known too."""
    encoder = identity_of(config.encoder.model_id, config.encoder.revision)
    return {**build_source(config.source).inputs(), "encoder": encoder}


def _check_family(config: TwoTowers) -> None:
    try:
        found = AutoConfig.from_pretrained(config.model_id, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model_id: {config.model_id}: {str(error).strip().splitlines()[0]}") from error
    for tower in ("vision_config", "text_config"):
        if not hasattr(found, tower):
            raise UserError(
                f"model_id: {config.model_id}: {found.model_type} is no model of the CLIP family: no {tower}"
            )
