"""Phenopackets written by hand, and the shared collection of published ones if it is available."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mint_ray.config.loader import UserError
from mint_ray.records import Phenotype, Record
from mint_ray.sources import BadRow, build_source
from mint_ray.sources.config import Phenopackets

SHARED = Path("shared/data/phenopackets/phenopackets.jsonl.gz")


def feature(term_id: str, label: str, **more: Any) -> dict[str, Any]:
    return {"type": {"id": term_id, "label": label}} | more


def packet(name: str = "case-1", **changes: Any) -> dict[str, Any]:
    whole = {
        "id": name,
        "subject": {"id": "S1", "sex": "FEMALE", "timeAtLastEncounter": {"age": {"iso8601duration": "P4Y"}}},
        "phenotypicFeatures": [
            feature("HP:0001250", "Seizure"),
            feature("HP:0000365", "Hearing impairment", excluded=True),
        ],
        "interpretations": [
            {
                "id": "i",
                "progressStatus": "SOLVED",
                "diagnosis": {
                    "disease": {"id": "OMIM:1", "label": "Invented syndrome 1"},
                    "genomicInterpretations": [
                        {
                            "subjectOrBiosampleId": "S1",
                            "interpretationStatus": "CAUSATIVE",
                            "variantInterpretation": {
                                "variationDescriptor": {"id": "v", "geneContext": {"valueId": "H:1", "symbol": "ABC1"}}
                            },
                        }
                    ],
                },
            }
        ],
        "metaData": {"externalReferences": [{"id": "DOI:9"}, {"id": "PMID:7"}, {"id": "PMID:8"}]},
    }
    return {key: value for key, value in (whole | changes).items() if value is not None}


def read(path: Path) -> list[Record | BadRow]:
    return list(build_source(Phenopackets(uri=str(path))).read())


def read_one(tmp_path: Path, content: Any) -> Record | BadRow:
    path = tmp_path / "one.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    [row] = read(path)
    return row


def test_a_phenopacket_becomes_a_record(tmp_path: Path) -> None:
    assert read_one(tmp_path, packet()) == Record(
        record_id="case-1",
        group_id="PMID:7",
        label_id="OMIM:1",
        phenotypes=[
            Phenotype(id="HP:0001250", label="Seizure"),
            Phenotype(id="HP:0000365", label="Hearing impairment", excluded=True),
        ],
        fields={"age": "P4Y", "sex": "FEMALE", "gene": "ABC1"},
        citations=["PMID:7", "PMID:8"],
    )


def test_obsolete_terms_become_current_and_unknown_ones_stay(tmp_path: Path) -> None:
    features = [feature("HP:0000624", "Epicanthal fold"), feature("HP:9999999", "Odd finding")]
    record = read_one(tmp_path, packet(phenotypicFeatures=features))
    assert isinstance(record, Record)
    assert record.phenotypes == [
        Phenotype(id="HP:0000286", label="Epicanthus"),
        Phenotype(id="HP:9999999", label="Odd finding"),
    ]


def test_a_finding_seen_at_any_time_counts_as_observed_once(tmp_path: Path) -> None:
    features = [feature("HP:0001250", "Seizure", excluded=True), *[feature("HP:0001250", "Seizure")] * 2]
    record = read_one(tmp_path, packet(phenotypicFeatures=features))
    assert isinstance(record, Record)
    assert record.phenotypes == [Phenotype(id="HP:0001250", label="Seizure")]


def test_without_a_publication_the_patient_is_the_group(tmp_path: Path) -> None:
    record = read_one(tmp_path, packet(metaData=None, subject={"id": "S1", "sex": "UNKNOWN_SEX"}))
    assert isinstance(record, Record)
    assert (record.group_id, record.citations, record.fields) == ("subject:S1", [], {"gene": "ABC1"})


def test_diseases_are_read_without_interpretations(tmp_path: Path) -> None:
    diseases = [{"term": {"id": "OMIM:2", "label": "B"}}, {"term": {"id": "OMIM:3", "label": "C"}, "excluded": True}]
    record = read_one(tmp_path, packet(interpretations=None, diseases=diseases))
    assert isinstance(record, Record)
    assert record.label_id == "OMIM:2"


@pytest.mark.parametrize(
    ("content", "reason", "message"),
    [
        ("{", "not_json", "not JSON"),
        ("[1]", "not_a_phenopacket", "list"),
        (packet() | {"colour": "red"}, "not_a_phenopacket", "colour"),
        (packet(subject={"sex": "BOTH"}), "not_a_phenopacket", "BOTH"),
        (packet(id=""), "not_a_phenopacket", "id"),
        (packet(interpretations=None), "no_diagnosis", "case-1"),
        (
            packet(interpretations=None, diseases=[{"term": {"id": "OMIM:2"}}, {"term": {"id": "OMIM:3"}}]),
            "several_diagnoses",
            "OMIM:2, OMIM:3",
        ),
        (packet(phenotypicFeatures=[feature("HP:0001250", "Seizure", excluded=True)]), "no_phenotypes", "case-1"),
    ],
)
def test_an_invalid_phenopacket_is_a_bad_row_with_its_reason(
    tmp_path: Path, content: Any, reason: str, message: str
) -> None:
    row = read_one(tmp_path, content)
    assert isinstance(row, BadRow)
    assert row.reason == reason
    assert row.message.startswith(f"{tmp_path}/one.json: ")
    assert message in row.message
    assert "\n" not in row.message


def test_every_container_gives_the_same_records(tmp_path: Path) -> None:
    packets = [packet("a"), packet("b")]
    lines = "".join(json.dumps(item) + "\n" for item in packets)
    (tmp_path / "x.jsonl").write_text(lines)
    wrapped = "".join(json.dumps({"path": "p", "phenopacket": item}) + "\n\n" for item in packets)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(wrapped.encode()))
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "README.md").write_text("not data")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("LICENSE", "none")
        for item in packets:
            archive.writestr(f"{item['id']}.json", json.dumps(item))
            (tmp_path / "folder" / "deep" / f"{item['id']}.json").write_text(json.dumps(item))
    expected = read(tmp_path / "x.jsonl")
    assert [row.record_id for row in expected if isinstance(row, Record)] == ["a", "b"]
    for name in ("x.jsonl.gz", "x.zip", "folder"):
        assert read(tmp_path / name) == expected, name


def test_a_repeated_id_is_a_bad_row_that_names_the_first_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(packet())}\n{json.dumps(packet())}\n")
    first, second = read(path)
    assert isinstance(first, Record)
    assert isinstance(second, BadRow)
    assert second.reason == "duplicate_record_id"
    assert second.location == f"{path}:2"
    assert f"{path}:1" in second.message


def test_labels_have_their_most_frequent_name_first(tmp_path: Path) -> None:
    def named(case: str, label: str) -> dict[str, Any]:
        return packet(case, interpretations=None, diseases=[{"term": {"id": "OMIM:1", "label": label}}])

    lines = [named("a", "Rare spelling"), named("b", "Usual spelling"), named("c", "Usual spelling")]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert build_source(Phenopackets(uri=str(path))).labels() == {"OMIM:1": ["Usual spelling", "Rare spelling"]}


def test_inputs_change_with_the_content_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(packet("a")))
    (tmp_path / "b.json").write_text(json.dumps(packet("b")))
    config = Phenopackets(uri=str(tmp_path))
    before = build_source(config).inputs()
    assert build_source(config).inputs() == before
    (tmp_path / "b.json").write_text(json.dumps(packet("c")))
    assert build_source(config).inputs() != before


def test_a_missing_empty_or_broken_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json"):
        build_source(Phenopackets(uri=str(tmp_path / "nowhere.json")))
    with pytest.raises(UserError, match="no file ending in"):
        build_source(Phenopackets(uri=str(tmp_path)))
    for name in ("x.jsonl.gz", "x.zip"):
        (tmp_path / name).write_bytes(b"neither gzip nor zip")
        with pytest.raises(UserError, match="cannot be read"):
            read(tmp_path / name)


def test_the_shared_cases_are_read_and_counted() -> None:
    root = Path(__file__).parents[2]
    path = next((folder / SHARED for folder in (root, root.parent) if (folder / SHARED).exists()), None)
    if path is None:
        pytest.skip(f"no {SHARED} in or next to the checkout")
    rows = read(path)
    assert Counter(row.reason if isinstance(row, BadRow) else "ok" for row in rows) == {"ok": 8077, "no_phenotypes": 2}
    records = [row for row in rows if isinstance(row, Record)]
    assert len({record.label_id for record in records}) == 679
    assert all(record.group_id.startswith("PMID:") for record in records)
