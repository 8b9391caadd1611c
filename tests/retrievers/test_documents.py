"""Documents of annotations and of small tables."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mint_ray.config.loader import UserError
from mint_ray.ontology import load_ontology, read_annotations
from mint_ray.records import Label, Record, Split
from mint_ray.retrievers import Document
from mint_ray.retrievers.bm25 import Bm25Retriever
from mint_ray.retrievers.config import Bm25, Profiles, Table
from mint_ray.retrievers.documents import Corpus, document_inputs, read_documents
from mint_ray.sources.config import Hpo
from mint_ray.sources.hpo import HpoSource
from mint_ray.tasks import make_labels
from mint_ray.tasks.config import RareDisease
from mint_ray.tasks.rare_disease import RareDiseaseTask

MARFAN = Label(label_id="OMIM:154700", name="Marfan syndrome")


def profiles(labels: list[Label], citations: list[str] = [], split: Split = "test") -> Corpus:  # noqa: B006
    return read_documents(
        Profiles(), labels, [Record(record_id="x", group_id="x", split=split, citations=list(citations))]
    )


def findings(document: Document) -> list[str]:
    head, _, listed = document.text.partition(": ")
    assert head == "Findings, most frequent first"
    return listed.rstrip(".").split("; ")


def test_a_profile_lists_the_annotated_findings_most_frequent_first() -> None:
    ontology = load_ontology()
    frequency: dict[str, float] = {}
    for row in read_annotations():
        if row.disease_id == MARFAN.label_id and row.aspect == "P" and not row.excluded and row.frequency != 0:
            name = ontology.names[str(ontology.resolve(row.term_id))]
            frequency[name] = max(frequency.get(name, 0.0), 0.5 if row.frequency is None else row.frequency)
    (document,) = profiles([MARFAN]).documents
    named = findings(document)
    assert (document.document_id, document.label_id, document.title) == (MARFAN.label_id, MARFAN.label_id, MARFAN.name)
    assert sorted(named) == sorted(frequency)
    assert [frequency[name] for name in named] == sorted(frequency.values(), reverse=True)
    assert "Ectopia lentis" in named


def test_annotations_that_cite_a_held_out_publication_are_dropped_and_counted() -> None:
    rows = [row for row in read_annotations() if row.disease_id == MARFAN.label_id and row.aspect == "P"]
    cited = next(reference for row in rows for reference in row.references if reference.startswith("PMID"))
    ontology = load_ontology()
    citing = {str(ontology.resolve(row.term_id)) for row in rows if cited in row.references}
    others = {str(ontology.resolve(row.term_id)) for row in rows if cited not in row.references}
    removed = {ontology.names[term] for term in citing - others}
    known, without = profiles([MARFAN], [cited], "train"), profiles([MARFAN], [cited], "test")
    assert removed
    assert removed <= set(findings(known.documents[0]))
    assert removed.isdisjoint(findings(without.documents[0]))
    assert known.dropped["annotation_cites_held_out_publication"] == 0
    assert without.dropped["annotation_cites_held_out_publication"] >= len(citing)
    assert profiles([MARFAN], [cited], "validation") == without


def test_a_label_without_findings_has_no_document_and_is_counted() -> None:
    corpus = profiles([MARFAN, Label(label_id="OMIM:1", name="Nowhere disease")])
    assert [document.title for document in corpus.documents] == ["Marfan syndrome"]
    assert corpus.dropped["label_without_profile"] == 1
    with pytest.raises(UserError, match="no label has an annotated finding"):
        profiles([Label(label_id="OMIM:1", name="Nowhere disease")])


def test_the_note_of_a_simulated_patient_finds_the_true_profile() -> None:
    source = HpoSource(Hpo(num_diseases=12, patients_per_disease=4))
    labels = make_labels(source.labels(), RareDisease())
    records = [record for record in source.read() if isinstance(record, Record)]
    task = RareDiseaseTask(RareDisease(), labels, 1)
    retriever = Bm25Retriever(Bm25())
    retriever.index(profiles(labels).documents)
    found = retriever.search([task.note(record) for record in records], 3)
    right = sum(
        record.label_id in [hit.document_id for hit in hits] for record, hits in zip(records, found, strict=True)
    )
    # three random ones of twelve contain it in a quarter of cases
    assert right / len(records) > 0.8


def write(tmp_path: Path, name: str, text: str) -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    rows = [
        {"document_id": "7", "title": "One", "text": "First line\nand a second, quoted", "label_id": "A"},
        {"document_id": "8", "title": None, "text": "No title", "label_id": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    csv = 'document_id,title,text,label_id,more\n7,One,"First line\nand a second, quoted",A,1\n8,,No title,,2\n'
    jsonl = (
        '{"document_id": "7", "title": "One", "text": "First line\\nand a second, quoted", "label_id": "A"}\n'
        '{"document_id": "8", "text": "No title"}\n'
    )
    expected = [
        Document(document_id="7", title="One", text="First line\nand a second, quoted", label_id="A"),
        Document(document_id="8", title="", text="No title"),
    ]
    for uri in (str(tmp_path / "d.parquet"), write(tmp_path, "d.csv", csv), write(tmp_path, "d.jsonl", jsonl)):
        assert read_documents(Table(uri=uri), [], []).documents == expected
        assert len(document_inputs(Table(uri=uri))["documents"]) == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("document_id,title\na,b\n", "no column 'text'; found document_id, title"),
        ("document_id,text\na,some\nb,  \n", "row 2: text: expected a text, got '  '"),
        ("document_id,text\n,some\n", "row 1: document_id: expected a text, got ''"),
        ("document_id,text\na,some\nb,more\na,other\n", "row 3: document_id: 'a' was already used in row 1"),
        ("document_id,text\n", "contains no document"),
        ("document_id,text\na,b,c\n", "cannot be read"),
    ],
)
def test_a_bad_table_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    uri = write(tmp_path, "documents.csv", text)
    with pytest.raises(UserError) as caught:
        read_documents(Table(uri=uri), [], [])
    assert str(caught.value).startswith(uri)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_suffix_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        document_inputs(Table(uri=str(tmp_path / "none.csv")))
    with pytest.raises(UserError, match=r"a\.txt: expected a name ending in \.parquet"):
        document_inputs(Table(uri=write(tmp_path, "a.txt", "")))
