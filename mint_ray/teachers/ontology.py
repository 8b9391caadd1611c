"""A teacher that ranks labels by semantic similarity between coded phenotypes and annotated disease profiles.

The measure is the symmetric best-match average of Phenomizer (Köhler et al., AJHG 2009) over Resnik's similarity
(IJCAI 1995): the information content of the most informative common ancestor. The disease side is weighted by the
frequency of each phenotype, and excluded phenotypes count against the diseases that show them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mint_ray.ontology import PHENOTYPIC_ABNORMALITY, load_ontology, read_annotations
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport
from mint_ray.teachers.config import Ontology
from mint_ray.teachers.rankings import failed_ranking, rank_labels

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class OntologyTeacher:
    """Teacher that reads the coded phenotypes of a record, observed and excluded, and nothing else."""

    def __init__(self, config: Ontology) -> None:
        self.config = config
        self.ontology = load_ontology()

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Build profiles of `labels` from the annotations that cite no publication of a held-out record.

        The information content of a term is -log of the share of annotated diseases that show it or a descendant.
        """
        held_out = {citation for record in records if record.split != "train" for citation in record.citations}
        profiles: dict[str, dict[str, float]] = {label.label_id: {} for label in labels}
        terms_by_disease: dict[str, set[str]] = {}
        used = excluded = 0
        for annotation in read_annotations():
            term = self.ontology.resolve(annotation.term_id)
            frequency = self.config.default_frequency if annotation.frequency is None else annotation.frequency
            if annotation.aspect != "P" or annotation.excluded or frequency == 0 or term is None:
                continue
            terms_by_disease.setdefault(annotation.disease_id, set()).add(term)
            if annotation.disease_id not in profiles:
                continue
            if held_out.intersection(annotation.references):
                excluded += 1
                continue
            used += 1
            profile = profiles[annotation.disease_id]
            profile[term] = max(profile.get(term, 0.0), frequency)
        self._index_profiles(profiles, self._information_content(list(terms_by_disease.values())))
        return FitReport(
            counts={"annotations": used, "labels_with_profile": sum(bool(profile) for profile in profiles.values())},
            dropped={"annotation_cites_held_out_publication": excluded},
        )

    def save(self, folder: Path) -> None:
        """Write labels, profiles and information content as Parquet."""
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
        """Read what `save` wrote."""
        labels = pq.read_table(folder / "labels.parquet")["label_id"].to_pylist()
        profiles: dict[str, dict[str, float]] = {label: {} for label in labels}
        for row in pq.read_table(folder / "profiles.parquet").to_pylist():
            profiles[row["label_id"]][row["term_id"]] = row["frequency"]
        content = pq.read_table(folder / "information_content.parquet")["information_content"].to_numpy()
        self._index_profiles(profiles, content.astype(np.float32))

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """Return one ranking per record, in order; a record without a known phenotype fails."""
        return [self._score(record) for record in records]

    def _score(self, record: Record) -> TeacherScores:
        observed = phenotype_terms(record, excluded=False)
        if not observed:
            return failed_ranking(record, self.config.kind, "no_known_phenotype")
        resnik_UV = np.stack([self._resnik(term) for term in observed])  # U terms of the patient, V of the profiles
        to_disease_L = np.stack([self._best_in_profile(row_V) for row_V in resnik_UV]).mean(axis=0)
        best_V = resnik_UV.max(axis=0)
        to_patient_L = (self.frequency @ best_V) / np.maximum(self.frequency.sum(axis=1), 1e-9)
        conflict_L = np.zeros(len(self.labels), dtype=np.float32)
        for term in phenotype_terms(record, excluded=True):
            if term in self.column:  # a term above no profile conflicts with none
                at_or_below_V = self.ancestors_VA[:, self.column[term]]
                conflict_L += (self.frequency * at_or_below_V).max(axis=1) * self.content[self.ontology.index[term]]
        score_L = (to_disease_L + to_patient_L) / 2 - self.config.absent_weight * conflict_L / len(observed)
        return rank_labels(record, self.config.kind, self.labels, score_L)

    def _index_profiles(self, profiles: dict[str, dict[str, float]], content: Array) -> None:
        """Convert profiles to arrays: L labels, V terms of the profiles, A terms that are these or their ancestors."""
        self.labels, self.content = list(profiles), content
        self.terms = sorted({term for profile in profiles.values() for term in profile})
        index = {term: i for i, term in enumerate(self.terms)}
        self.frequency = np.zeros((len(self.labels), len(self.terms)), dtype=np.float32)
        for i, profile in enumerate(profiles.values()):
            for term, frequency in profile.items():
                self.frequency[i, index[term]] = frequency
        ancestors = sorted({ancestor for term in self.terms for ancestor in self.ontology.ancestors(term)})
        self.column = {term: i for i, term in enumerate(ancestors)}
        self.ancestors_VA = np.zeros((len(self.terms), len(ancestors)), dtype=np.float32)
        for term, i in index.items():
            self.ancestors_VA[i, [self.column[ancestor] for ancestor in self.ontology.ancestors(term)]] = 1
        self.in_profile = self.frequency > 0
        self._resnik_cache: dict[str, Array] = {}

    def _resnik(self, term: str) -> Array:
        """Return the similarity of `term` to each of the V profile terms."""
        if term not in self._resnik_cache:
            shared = [ancestor for ancestor in self.ontology.ancestors(term) if ancestor in self.column]
            content = self.content[[self.ontology.index[ancestor] for ancestor in shared]]
            columns = [self.column[ancestor] for ancestor in shared]
            self._resnik_cache[term] = (self.ancestors_VA[:, columns] * content).max(axis=1, initial=0.0)
        return self._resnik_cache[term]

    def _best_in_profile(self, similarity_V: Array) -> Array:
        best: Array = (self.in_profile * similarity_V).max(axis=1, initial=0.0)
        return best

    def _information_content(self, terms_by_disease: list[set[str]]) -> Array:
        counts = np.ones(len(self.ontology.ids), dtype=np.float32)  # add-one smoothing: no count is zero
        for terms in terms_by_disease:
            closure = set().union(*(self.ontology.ancestors(term) for term in terms))
            counts[[self.ontology.index[term] for term in closure]] += 1
        content: Array = -np.log(counts / (len(terms_by_disease) + 1))
        return content


def phenotype_terms(record: Record, *, excluded: bool) -> list[str]:
    """Return the current ids of a record's observed or excluded phenotypes, each once, sorted.

    Unknown ids and terms that are no phenotypic abnormality, such as inheritance, are left out.
    """
    ontology = load_ontology()
    resolved = {ontology.resolve(item.id) for item in record.phenotypes if item.excluded == excluded}
    return sorted(term for term in resolved if term and ontology.is_a(term, PHENOTYPIC_ABNORMALITY))
