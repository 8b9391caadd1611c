"""Exchange the images between records: the negative control for students that are shown images."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Sequence

from mint_ray import lineage
from mint_ray.artifacts import Artifact, read_part
from mint_ray.records import Label, Record, from_table


def shuffle_images(root: str, records: Artifact) -> Artifact:
    """Write tables `records` and `labels` as in `records`, with the image of another record of the split.

    The student is trained and evaluated on them; the teacher scores the original records.
    """
    artifact = lineage.shuffle_images(root, records)
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
        draft.counts["images_exchanged"] = len(uris)
    return artifact


def permute_images(records: Sequence[Record]) -> dict[str, str]:
    """Return the new image URI of each record that has an image, by record id.

    The images of a split move along one cycle in a seeded order of the record ids, so that no record keeps its own
    unless it is the only one.
    """
    splits: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.image_uri is not None:
            splits[record.split].append(record)
    image_of: dict[str, str] = {}
    for rows in splits.values():
        cycle = sorted(rows, key=lambda row: random.Random(f"shuffled:{row.record_id}").random())
        for row, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            image_of[row.record_id] = other.image_uri or ""
    return image_of
