"""Simulated patients with annotated findings of real diseases, for the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.ontology import PHENOTYPIC_ABNORMALITY, load_ontology, read_annotations
from mint_ray.records import SPLITS, Label, Phenotype, Record, Split

FINDINGS = 5
"""Coded findings per record."""


def write_records(root: str, count: int, labels: int, rows_per_part: int, splits: Sequence[Split] = SPLITS) -> Artifact:
    """Write `count` records of `labels` diseases; `splits` are assigned in a cycle."""
    ontology = load_ontology()
    diseases: dict[str, list[str]] = {}
    for annotation in read_annotations():
        term = ontology.resolve(annotation.term_id)
        if term and ontology.is_a(term, PHENOTYPIC_ABNORMALITY) and annotation.disease_id.startswith("OMIM"):
            diseases.setdefault(annotation.disease_id, []).append(term)
    chosen = sorted(disease for disease, terms in diseases.items() if len(terms) >= 2 * FINDINGS)[:labels]

    def record(number: int) -> Record:
        disease = chosen[number % len(chosen)]
        terms = [diseases[disease][(number // 7 + place) % len(diseases[disease])] for place in range(FINDINGS)]
        return Record(
            record_id=f"r{number:08d}", group_id=f"g{number}", label_id=disease, split=splits[number % len(splits)],
            phenotypes=[Phenotype(id=term, label=ontology.names[term]) for term in terms],
        )  # fmt: skip

    artifact = open_artifact(root, "prepare", {"records": count, "labels": labels, "rows_per_part": rows_per_part}, {})
    with artifact.write() as draft:
        draft.write_rows(Record, "records", map(record, range(count)), rows_per_part=rows_per_part)
        draft.write_rows(Label, "labels", [Label(label_id=disease, name=disease) for disease in chosen])
    return artifact
