"""Show the student another record's image: the control that tells whether it learns from what it sees."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Sequence

from mint_ray.artifacts import Artifact, open_artifact, read_part
from mint_ray.records import Label, Record, from_table


def shuffle_images(root: str, records: Artifact) -> Artifact:
    """Tables `records` and `labels` as in `records`, part by part; each image is that of another record of its split.

    For whoever teaches the student, and for whoever asks it; the teacher is asked about the records as they are.
    """
    artifact = open_artifact(root, "shuffle", {}, {"records": records.name})
    if artifact.is_complete:
        return artifact
    uris = permute_images(records.rows(Record, "records"))
    with artifact.write() as draft:
        for file in records.table_files("records"):
            rows = from_table(Record, read_part(records.file_uri(file.path)))
            shown = [dataclasses.replace(row, image_uri=uris.get(row.record_id)) for row in rows]
            draft.placed.append(artifact.write_part(file.path, Record, shown))
        draft.write_rows(Label, "labels", records.rows(Label, "labels"))
        draft.counts.update(records.manifest.counts)
        draft.counts["images_moved"] = len(uris)
    return artifact


def permute_images(records: Sequence[Record]) -> dict[str, str]:
    """The image of each record that has one, by its id: along one ring through those of its split, drawn by their ids,
    so that none keeps its own unless it is alone."""
    splits: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.image_uri is not None:
            splits[record.split].append(record)
    moved: dict[str, str] = {}
    for rows in splits.values():
        ring = sorted(rows, key=lambda row: random.Random(f"shuffled:{row.record_id}").random())
        for row, other in zip(ring, [*ring[1:], ring[0]], strict=True):
            moved[row.record_id] = other.image_uri or ""
    return moved
