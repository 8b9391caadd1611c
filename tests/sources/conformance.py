"""Checks that every source must pass; `test_conformance.py` runs them on each."""

from __future__ import annotations

from collections.abc import Callable

from mint_ray.images import decode_full_size
from mint_ray.records import SPLITS, Record
from mint_ray.sources import BadRow, ImageSource, Source


def check_source(make: Callable[[], Source]) -> None:
    """Assert the interface of a source that `make` builds anew from an input with a good and a bad row or more."""
    source = make()
    rows = list(source.read())
    assert rows == list(source.read()) == list(make().read()), "the same input gives the same rows"
    records = [row for row in rows if isinstance(row, Record)]
    assert records
    assert len({record.record_id for record in records}) == len(records)
    assert all(record.record_id and record.group_id and record.split in SPLITS for record in records)
    for row in rows:
        if isinstance(row, BadRow):
            assert row.reason.isidentifier()
            assert row.reason == row.reason.lower()
            assert row.message.startswith(row.location)
            assert "\n" not in row.message
    assert source.labels() == make().labels(), "labels do not depend on reading first"
    assert {record.label_id for record in records} - {None} <= source.labels().keys()
    assert all(names and all(names) for names in source.labels().values())
    assert source.inputs() == make().inputs()
    assert all(identity for identity in source.inputs().values())
    if isinstance(source, ImageSource):
        for record in records:
            assert decode_full_size(source.image_bytes(record), record.record_id, 10**7, 10**7).ndim == 3
