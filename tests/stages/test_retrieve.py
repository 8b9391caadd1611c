"""Documents are found for a record by its note alone, however the records are divided into parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mint_ray.artifacts import Artifact, open_artifact, verify
from mint_ray.config.loader import UserError, from_data
from mint_ray.records import Phenotype
from mint_ray.retrievers import Document
from mint_ray.retrievers.config import Retrieval, Table
from mint_ray.retrievers.passages import Retrieved
from mint_ray.stages import retrieve as module
from mint_ray.stages.retrieve import RetrieverActor, check_retrieval, retrieve_documents
from tests.stages.inputs import map_parts_here
from tests.stages.retrieval import DOCUMENTS, LABELS, RECORDS, TASK, retrieval_config, write_noted_records


def retrieve(root: Path, rows_per_part: int = 100) -> Artifact:
    config = retrieval_config(root / "documents", max_passages=2)
    return retrieve_documents(str(root), config, TASK, write_noted_records(root, rows_per_part))


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "map_parts", map_parts_here)


@pytest.mark.usefixtures("without_ray")
def test_held_out_records_get_the_nearest_documents_best_first(tmp_path: Path) -> None:
    retrieved = retrieve(tmp_path)
    rows = retrieved.rows(Retrieved, "retrieved")
    assert [row.record_id for row in rows] == ["r0", "r1", "r2", "r3"]
    assert [[document.document_id for document in row.documents] for row in rows[1:]] == [["m"], ["n"], []]
    assert len(rows[0].documents) == 2
    assert all(row.scores == sorted(row.scores, reverse=True) for row in rows)
    assert retrieved.rows(Document, "documents") == DOCUMENTS
    assert retrieved.manifest.counts == {"documents": 3, "records": 4, "records_without_documents": 1}
    # r0 is Noonan's and finds it, r1 is Marfan's, r2 is Kabuki's and r3 is Noonan's: these two find none of their own
    assert retrieved.manifest.metrics == {"recall": 0.5, "records": 4}
    assert verify(retrieved.uri) == []


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("rows_per_part", [1, 2])
def test_a_record_gets_the_same_documents_in_parts_of_any_size(tmp_path: Path, rows_per_part: int) -> None:
    rows = retrieve(tmp_path).rows(Retrieved, "retrieved")
    assert retrieve(tmp_path, rows_per_part).rows(Retrieved, "retrieved") == rows


@pytest.mark.ray
def test_workers_write_what_one_process_writes(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieved = retrieve(tmp_path, 2)
    monkeypatch.setattr(module, "map_parts", map_parts_here)
    assert retrieve(tmp_path).rows(Retrieved, "retrieved") == retrieved.rows(Retrieved, "retrieved")


def test_the_note_is_the_whole_query(tmp_path: Path) -> None:
    config = retrieval_config(tmp_path / "documents")
    actor = RetrieverActor(open_artifact(str(tmp_path), "retrieve", {}, {}), config, TASK, LABELS, DOCUMENTS)
    plain = dataclasses.replace(RECORDS[0], text="A boy with seizures.")
    hidden = dataclasses.replace(
        plain, label_id="M", fields={"gene": "FBN1"}, citations=["PMID:1"], image_uri="marfan.png",
        phenotypes=[Phenotype(id="HP:0001166", label="Long fingers")],
    )  # fmt: skip
    first, second = actor.search(["r", "r"], [actor.task.note(record) for record in (plain, hidden)])
    assert first == second
    assert [document.document_id for document in first.documents] == ["k", "m"]


def test_missing_documents_and_encoders_are_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.retrieval: .*none\.csv: no such file"):
        check_retrieval(Retrieval(documents=Table(uri=str(tmp_path / "none.csv"))))
    unknown = from_data(Retrieval, {"retriever": {"kind": "dense", "model_id": "no/where"}})
    with pytest.raises(UserError, match=r"evaluate\.retrieval: model_id: no folder 'no/where'"):
        check_retrieval(unknown)
    check_retrieval(Retrieval())
