"""Read records from a source, choose the labels of the task, and split the records by group."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from mint_ray import lineage
from mint_ray.artifacts import Artifact, Draft
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Prepare, Splits
from mint_ray.images import ImageError
from mint_ray.records import SPLITS, Label, Record, Split
from mint_ray.sources import BadRow, ImageSource, build_source
from mint_ray.sources.config import IMAGE
from mint_ray.tasks import build_task, make_labels
from mint_ray.tasks.config import AnyTask, LabelSelection
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")

IMAGES = "images"
"""Table of images, for sources whose images are not files of their own."""
IMAGES_PER_ROW_GROUP = 32
"""Images in memory at a time, while they are written and while one of them is read."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Records with their splits, and the labels of the task."""

    records: list[Record]
    labels: list[Label]
    dropped: Counter[str]
    """Rows of the source that were left out, by reason."""


def prepare_records(root: str, config: Prepare, task: AnyTask) -> Artifact:
    """Write tables `records` and `labels`, and `images` for a source whose images are not files of their own.

    `config.match_texts` is ignored. Raises UserError for invalid input; the message names the first bad row.
    """
    source = build_source(config.source)
    artifact = lineage.prepare(root, config, task)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        prepared = select_records(config, task)
        records = prepared.records
        if isinstance(source, ImageSource):
            records = _write_images(artifact, draft, config, source, records)
        draft.write_rows(Record, "records", records, rows_per_part=config.rows_per_part)
        draft.write_rows(Label, "labels", prepared.labels)
        draft.counts.update({f"records_{split}": 0 for split in SPLITS})
        draft.counts.update(f"records_{record.split}" for record in records)
        draft.counts["labels"] = len(prepared.labels)
        draft.counts["groups"] = len({record.group_id for record in records})
        draft.dropped.update(prepared.dropped)
    logger.info("prepare: %s", ", ".join(f"{name} {count:,}" for name, count in draft.counts.items()))
    return artifact


def _write_images(
    artifact: Artifact, draft: Draft, config: Prepare, source: ImageSource, records: list[Record]
) -> list[Record]:
    """Write the images of the records as Parquet parts; return the records with the URIs of their images' cells.

    A record whose image cannot be read is left out and counted. Raises UserError if there are too many.
    """
    schema = pa.schema([("record_id", pa.string()), (IMAGE, pa.binary())])
    kept: list[Record] = []
    first_bad: str | None = None
    (draft.folder / IMAGES).mkdir()
    progress = Progress("prepare", len(records), "images")
    for number, part in enumerate(_batches(records, config.rows_per_part)):
        path = f"{IMAGES}/part-{number:05d}.parquet"
        row = 0
        with pq.ParquetWriter(draft.folder / path, schema) as writer:
            for batch in _batches(part, IMAGES_PER_ROW_GROUP):
                cells: list[dict[str, str | bytes]] = []
                for record in batch:
                    progress.advance()
                    try:
                        cells.append({"record_id": record.record_id, IMAGE: source.image_bytes(record)})
                    except ImageError as error:
                        draft.dropped[error.reason] += 1
                        first_bad = first_bad or str(error)
                        continue
                    uri = f"{artifact.file_uri(path)}#column={IMAGE}&row={row}"
                    kept.append(dataclasses.replace(record, image_uri=uri))
                    row += 1
                writer.write_table(pa.Table.from_pylist(cells, schema))
    num_bad = len(records) - len(kept)
    if num_bad > config.max_bad_share * len(records):
        raise UserError(
            f"{first_bad} ({num_bad} of {len(records)} images are bad, more than max_bad_share "
            f"{config.max_bad_share:g})"
        )
    return kept


def _batches(records: list[Record], size: int) -> list[list[Record]]:
    return [records[start : start + size] for start in range(0, len(records), size)]


def select_records(config: Prepare, task: AnyTask) -> Prepared:
    """Return the records, splits and labels that `prepare_records` writes, without writing them.

    Raises UserError for invalid input; the message names the first bad row.
    """
    source = build_source(config.source)
    records, dropped, first_bad = _read(source.read())
    total = len(records) + sum(dropped.values())
    if total == 0:
        raise UserError(f"{_name(config)}: has no records")
    kept, reasons = _select_labels(records, task.labels)
    if task.labels.ids:
        # a record without one of the labels that the spec lists is bad; without one of the most frequent it is not
        bad = next((record for record in records if record.label_id not in task.labels.ids), None)
        dropped["label_not_in_task"] = reasons.pop("label_not_in_task", 0)
        if bad is not None and first_bad is None:
            first_bad = (
                f"{_name(config)} record {bad.record_id!r}: label_id: {bad.label_id!r} is not one of the task's "
                f"{len(task.labels.ids)} labels"
            )
    if sum(dropped.values()) > config.max_bad_share * total:
        raise UserError(
            f"{first_bad} ({sum(dropped.values())} of {total} rows are bad, more than max_bad_share "
            f"{config.max_bad_share:g}: {', '.join(f'{reason} {count}' for reason, count in sorted(dropped.items()))})"
        )
    dropped += reasons
    names = source.labels()
    label_ids = sorted({record.label_id for record in kept if record.label_id is not None})
    labels = make_labels({label_id: names.get(label_id, [label_id]) for label_id in label_ids}, task)
    leak_checker = build_task(task, labels, 1)
    clean: list[Record] = []
    for record in kept:
        if leak_checker.find_label_leak(record) is not None:
            dropped["note_names_diagnosis"] += 1
        else:
            clean.append(record)
    assigned = assign_splits(clean, config.splits)
    for name, share in (("train", 1.0), ("validation", config.splits.validation), ("test", config.splits.test)):
        if share > 0 and not any(record.split == name for record in assigned):
            raise UserError(
                f"{_name(config)}: the {name} split is empty: {len(clean)} records in "
                f"{len({record.group_id for record in clean})} groups"
            )
    return Prepared(assigned, labels, +dropped)


def assign_splits(records: list[Record], config: Splits) -> list[Record]:
    """Assign every group to one split; if any record has a split other than train, keep the splits of all.

    Groups are assigned one at a time, the largest first, those of equal size in a seeded order, to the split with the
    largest deficit in the group's labels relative to its share. Each label is thus in each split as far as its groups
    allow. Raises UserError if the records have splits and a group is in two of them.
    """
    if any(record.split != "train" for record in records):
        _check_groups(records)
        return records
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.group_id].append(record)
    shares = {"train": 1 - config.validation - config.test, "validation": config.validation, "test": config.test}
    total = Counter(record.label_id for record in records)
    assigned: Counter[tuple[str | None, str]] = Counter()
    split_of: dict[str, Split] = {}
    draws = {group_id: random.Random(f"{config.seed}:{group_id}").random() for group_id in groups}
    for group_id in sorted(groups, key=lambda group_id: (-len(groups[group_id]), draws[group_id])):
        count = Counter(record.label_id for record in groups[group_id])
        deficit = {
            split: sum(
                n * (shares[split] * total[label] - assigned[label, split]) / total[label] for label, n in count.items()
            )
            for split in SPLITS
            if shares[split] > 0
        }
        best: Split = max(deficit, key=lambda split: (deficit[split], shares[split]))
        split_of[group_id] = best
        for label, n in count.items():
            assigned[label, best] += n
    return [dataclasses.replace(record, split=split_of[record.group_id]) for record in records]


def _read(rows: Iterable[Record | BadRow]) -> tuple[list[Record], Counter[str], str | None]:
    """Return the labelled records, the number of other rows by reason, and the message of the first bad row."""
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    first_bad: str | None = None
    seen: set[str] = set()
    progress = Progress("prepare", None, "rows")
    for row in rows:
        progress.advance()
        if isinstance(row, BadRow):
            dropped[row.reason] += 1
            first_bad = first_bad or row.message
        elif row.record_id in seen:
            dropped["duplicate_record_id"] += 1
            first_bad = first_bad or f"record_id: {row.record_id!r} occurs more than once"
        elif row.label_id is None:
            dropped["no_label"] += 1
        else:
            seen.add(row.record_id)
            records.append(row)
    return records, dropped, first_bad


def _select_labels(records: list[Record], config: LabelSelection) -> tuple[list[Record], Counter[str]]:
    """Return the records of the selected labels, sorted by id, and the number of other records by reason."""
    reasons: Counter[str] = Counter()
    counts = Counter(record.label_id for record in records)
    groups: dict[str | None, set[str]] = defaultdict(set)
    for record in records:
        groups[record.label_id].add(record.group_id)
    if config.ids:
        selected, reason = set(config.ids), "label_not_in_task"
        missing = [label_id for label_id in config.ids if label_id not in counts]
        if missing:
            raise UserError(f"task.labels.ids: no record has the label {missing[0]!r}")
    else:
        enough = [x for x in counts if counts[x] >= config.min_records and len(groups[x]) >= config.min_groups]
        ordered = sorted((x for x in enough if x), key=lambda x: (-min(len(groups[x]), counts[x]), -counts[x], x))
        selected, reason = set(ordered[: config.max_labels]), "label_not_selected"
    kept: list[Record] = []
    per_label: Counter[str | None] = Counter()
    order = sorted(records, key=lambda record: random.Random(f"order:{record.record_id}").random())
    for record in order if config.max_records_per_label else records:
        if record.label_id not in selected:
            reasons[reason] += 1
        elif config.max_records_per_label and per_label[record.label_id] >= config.max_records_per_label:
            reasons["over_max_records_per_label"] += 1
        else:
            per_label[record.label_id] += 1
            kept.append(record)
    return sorted(kept, key=lambda record: record.record_id), reasons


def _check_groups(records: list[Record]) -> None:
    split_of: dict[str, str] = {}
    for record in records:
        if split_of.setdefault(record.group_id, record.split) != record.split:
            raise UserError(
                f"record {record.record_id!r}: split: group {record.group_id!r} is in "
                f"{split_of[record.group_id]} and in {record.split}"
            )


def _name(config: Prepare) -> str:
    return str(getattr(config.source, "uri", config.source.kind))
