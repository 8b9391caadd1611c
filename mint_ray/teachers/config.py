"""Settings of the teachers."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from mint_ray.loading import settings


@settings
class Table:
    """Scores that someone else made: one row per record and label."""

    kind: Literal["table"] = "table"
    uri: str
    """Parquet, CSV or JSONL with the columns `record_id`, `label_id`, `score` (larger is better)."""


@settings
class Ontology:
    """Ranks labels by the semantic similarity of a patient's coded phenotypes to the annotated disease profiles."""

    kind: Literal["ontology"] = "ontology"
    absent_weight: float = 0.1
    """Weight of findings that were looked for and are absent although the disease would show them."""
    unknown_frequency: float = 0.5
    """Share of patients assumed where an annotation gives no frequency."""

    def __post_init__(self) -> None:
        if self.absent_weight < 0:
            raise ValueError(f"absent_weight must not be negative, got {self.absent_weight}")
        if not 0 < self.unknown_frequency <= 1:
            raise ValueError(f"unknown_frequency must lie in 0 to 1, got {self.unknown_frequency}")


PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
"""What the prompt of a generative teacher has its gaps written as."""


@settings
class Generative:
    """A language model that is asked how likely each label's name is as the answer to a prompt. It sees no image."""

    kind: Literal["generative"] = "generative"
    model_id: str
    """Folder of a causal language model in safetensors with its tokenizer, or its id on the Hugging Face Hub."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits, so that what was asked stays known; none for a folder."""
    prompt: str = (
        "{text}\nFindings: {findings}.\nAbsent: {absent}.\n\nWhich disease is most likely? Answer with its name."
    )
    """What is asked. `{text}`, `{findings}` and `{absent}` (names of the coded findings) and `{fields.age}` (or any
    other coded field) stand for what the record has, or for nothing; what is not named here, the model does not see."""
    normalise: Literal["mean", "sum"] = "mean"
    """The score is the log-probability of the name and the end behind it: its mean by token, or its sum, which
    favours short names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in."""

    def __post_init__(self) -> None:
        for name in PLACEHOLDER.findall(self.prompt):
            if name not in ("text", "findings", "absent") and not re.fullmatch(r"fields\.\w+", name):
                raise ValueError(f"prompt: {{{name}}} is no part of a record; known: text, findings, absent, fields.*")
        if not PLACEHOLDER.search(self.prompt):
            raise ValueError("prompt: holds nothing of the record; known: {text}, {findings}, {absent}, {fields.*}")
        if self.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision must be a commit of 40 hexadecimal digits, got {self.revision!r}")


@settings
class Imported:
    """A teacher from a module of yours. Its code runs in every process that fits or asks it."""

    kind: Literal["import"] = "import"
    path: str
    """`package.module:Class`; the module must be installed or on PYTHONPATH, on every machine of the cluster. The class
    has the methods of `mint_ray.teachers.Teacher`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the class; what is secret belongs in the environment, for every manifest repeats them."""

    def __post_init__(self) -> None:
        module, colon, name = self.path.partition(":")
        if not colon or not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
            raise ValueError(f"path must be package.module:Class, got {self.path!r}")


@settings
class Member:
    """One teacher of an ensemble."""

    teacher: AnyTeacher
    """Its own settings."""
    weight: float | None = None
    """Its weight beside the others'; null: 1, and with learned weights there is nothing else."""
    temperature: float = 1.0
    """Its scores are divided by this ahead of the softmax: below 1 sharpens, above 1 flattens."""
    labels: tuple[str, ...] = ()
    """Ids of the task's labels that it is asked for; empty: all."""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be positive and finite, got {self.weight}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")


@settings
class Ensemble:
    """Several teachers as one: the weighted mean of their softmax-normalised scores."""

    kind: Literal["ensemble"] = "ensemble"
    members: tuple[Member, ...]
    """At least two."""
    weights: Literal["given", "learned"] = "given"
    """`learned`: those under which the true labels of the validation split are most likely."""

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise ValueError(f"members must be two or more, got {len(self.members)}")
        if self.weights == "learned" and any(member.weight is not None for member in self.members):
            raise ValueError("weights are to be learned, yet a member is given one")


AnyTeacher = Annotated[Table | Ontology | Generative | Imported | Ensemble, Field(discriminator="kind")]
