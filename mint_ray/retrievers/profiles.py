"""Documents of the disease annotations of the Human Phenotype Ontology: one profile per label.

Tested by tests/retrievers/test_documents.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from mint_ray.config.loader import UserError
from mint_ray.ontology import load_ontology, read_annotations
from mint_ray.records import Label, Record
from mint_ray.retrievers import Document
from mint_ray.retrievers.documents import Corpus

UNKNOWN_FREQUENCY = 0.5
"""Share of patients assumed for an annotation without a frequency, as in the ontology teacher."""


def read_profiles(labels: Sequence[Label], records: Sequence[Record]) -> Corpus:
    """Return the profile of each label, without annotations that cite a publication of a held-out record.

    A label without annotated findings has no document. Raises UserError if no label has one.
    """
    ontology = load_ontology()
    held_out = {citation for record in records if record.split != "train" for citation in record.citations}
    findings: dict[str, dict[str, float]] = {label.label_id: {} for label in labels}
    num_held_out = 0
    for annotation in read_annotations():
        if annotation.disease_id not in findings or annotation.aspect != "P" or annotation.excluded:
            continue
        term = ontology.resolve(annotation.term_id)
        frequency = UNKNOWN_FREQUENCY if annotation.frequency is None else annotation.frequency
        if term is None or frequency == 0:
            continue
        if held_out.intersection(annotation.references):
            num_held_out += 1
            continue
        profile = findings[annotation.disease_id]
        profile[term] = max(profile.get(term, 0.0), frequency)
    documents = []
    for label in labels:
        profile = findings[label.label_id]
        names = [ontology.names[term] for term in sorted(profile, key=lambda term: (-profile[term], term))]
        if names:
            text = f"Findings, most frequent first: {'; '.join(names)}."
            documents.append(Document(document_id=label.label_id, title=label.name, text=text, label_id=label.label_id))
    if not documents:
        raise UserError("documents: profiles: no label has an annotated finding; use documents of a table")
    return Corpus(
        documents=documents,
        dropped={
            "annotation_cites_held_out_publication": num_held_out,
            "label_without_profile": len(labels) - len(documents),
        },
    )
