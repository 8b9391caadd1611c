"""Stored records are read by index, in an order that needs few parts at a time."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.config.loader import UserError
from mint_ray.layouts import Example
from mint_ray.records import Label, TokenizedRecord
from mint_ray.trainers import examples as module
from mint_ray.trainers.examples import Examples, InMemoryExamples, StoredExamples, to_row

SIZES = [5, 3, 0, 4, 6, 1, 2, 4, 3, 5, 2]
TOTAL = sum(SIZES)


def example(number: int) -> Example:
    return Example(
        record_id=f"r{number}",
        prompt_ids=[number + 1, 7],
        completions=[[3], [4, number]],
        pairs=[(0, 1)],
        reference_logps=[-0.5, -1.0 * number] if number % 2 else None,
    )


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    made = open_artifact(str(tmp_path), "tokenize", {}, {})
    numbers = iter(range(TOTAL))
    with made.write() as draft:
        for part, size in enumerate(SIZES):
            rows = [to_row(example(next(numbers))) for _ in range(size)]
            draft.placed.append(made.write_part(f"train/part-{part:05d}-000.parquet", TokenizedRecord, rows))
        draft.write_rows(TokenizedRecord, "validation", [])
    return made


def stored(artifact: Artifact, parts_per_window: int) -> StoredExamples:
    files = artifact.table_files("train")
    uris = [artifact.file_uri(file.path) for file in files]
    return StoredExamples(uris, [file.rows or 0 for file in files], parts_per_window)


def part_of(index: int) -> int:
    return next(part for part in range(len(SIZES)) if index < sum(SIZES[: part + 1]))


def test_records_are_read_by_index(artifact: Artifact) -> None:
    found = StoredExamples.from_artifact(artifact, "train")
    assert [found[index] for index in range(len(found))] == [example(number) for number in range(TOTAL)]
    assert len(StoredExamples.from_artifact(artifact, "validation")) == 0
    for index in (-1, TOTAL):
        with pytest.raises(IndexError):
            found[index]


@pytest.mark.parametrize("parts_per_window", [1, 3, 100])
def test_an_order_has_every_record_once_and_depends_on_the_seed_alone(
    artifact: Artifact, parts_per_window: int
) -> None:
    one, other = stored(artifact, parts_per_window), stored(artifact, parts_per_window)
    other[3]  # the cache must not matter
    order = one.order(random.Random("0:1"))
    assert sorted(order) == list(range(TOTAL))
    assert order == other.order(random.Random("0:1"))
    assert order != one.order(random.Random("0:2"))


@pytest.mark.parametrize(("step", "max_reads"), [(1, 1.0), (4, 1.34)])
def test_reading_in_order_reads_each_part_about_once_and_caches_one_window_and_a_part(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, step: int, max_reads: float
) -> None:
    read: list[str] = []
    real = module.read_part
    monkeypatch.setattr(module, "read_part", lambda uri: read.append(uri) or real(uri))
    found = stored(artifact, 3)
    order = found.order(random.Random(0))
    for start in range(0, TOTAL, step):
        # the records of a step may be read in any order
        for index in sorted(order[start : start + step]):
            assert found[index] == example(index)
            assert len(found._cache) <= 3 + 1
    filled = [size for size in SIZES if size]
    assert len(set(read)) == len(filled)
    # a part may be read again if a step spans two windows
    assert len(read) <= max_reads * len(filled)


def test_records_are_shuffled_within_a_window_and_windows_differ_between_epochs(artifact: Artifact) -> None:
    found = stored(artifact, 4)
    order = found.order(random.Random(0))
    windows: list[set[int]] = []
    for index in order:
        part = part_of(index)
        if not windows or (part not in windows[-1] and len(windows[-1]) == 4):
            windows.append(set())
        windows[-1].add(part)
    assert max(map(len, windows)) <= 4
    first = [part_of(index) for index in order[: sum(SIZES[part] for part in windows[0])]]
    assert first != sorted(first, key=first.index), "records of a window come part by part"
    assert {part_of(index) for index in found.order(random.Random(1))[:5]} != {part_of(i) for i in order[:5]}


def test_records_of_one_window_are_shuffled_uniformly(artifact: Artifact) -> None:
    # every record is equally likely to come first, whatever the size of its part
    found = stored(artifact, 100)
    draws = 4_000
    firsts = [found.order(random.Random(draw))[0] for draw in range(draws)]
    for index in range(TOTAL):
        assert firsts.count(index) == pytest.approx(draws / TOTAL, rel=0.4)


def test_pickled_examples_contain_no_cached_parts(artifact: Artifact) -> None:
    found = stored(artifact, 3)
    small = len(pickle.dumps(found))
    found[0]
    copy = pickle.loads(pickle.dumps(found))  # noqa: S301
    assert len(pickle.dumps(found)) == small
    assert copy[TOTAL - 1] == example(TOTAL - 1)
    assert copy.order(random.Random(5)) == found.order(random.Random(5))


def test_a_missing_or_unexpected_part_raises_an_error_with_its_uri(artifact: Artifact) -> None:
    folder = Path(artifact.uri) / "train"
    first, second, *_, last = sorted(folder.iterdir())
    os.remove(first)
    pq.write_table(pq.read_table(second).slice(1), second)
    artifact.write_part(f"train/{last.name}", Label, [Label(label_id="a", name="A")] * SIZES[-1])
    found = StoredExamples.from_artifact(artifact, "train")
    with pytest.raises(UserError, match=r"part-00000-000\.parquet: no such file"):
        found[0]
    with pytest.raises(UserError, match=r"part-00001-000\.parquet: has 2 rows, the manifest says 3"):
        found[SIZES[0]]
    with pytest.raises(UserError, match=rf"{last.stem}\.parquet: has the columns label_id, name, synonyms, not those"):
        found[TOTAL - 1]


def test_both_classes_implement_the_protocol() -> None:
    kinds: list[Examples] = [InMemoryExamples([example(0)]), StoredExamples([], [])]
    assert [len(kind) for kind in kinds] == [1, 0]
    assert StoredExamples([], []).order(random.Random(0)) == []
