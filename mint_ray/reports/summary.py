"""Everything that the report of one run shows, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mint_ray.metrics import Estimate, Transitions
from mint_ray.records import Method
from mint_ray.runtime.goodput import Goodput


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodResult:
    """Estimates of one method."""

    method: Method
    estimates: dict[str, Estimate]
    """Metric to estimate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelHits:
    """Number of records of one true label that were right before and after alignment."""

    name: str
    n: int
    """Records with this true label."""
    base: int
    """Records whose true label the base student names among the first k."""
    aligned: int
    """The same for the aligned student."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One record's prompt, and the answers to it before and after alignment."""

    record_id: str
    prompt: str
    truth: str
    base: str
    aligned: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Everything that the report of one run shows; `dump` and `from_data` convert it to JSON and back."""

    title: str
    methods: list[MethodResult]
    """Results in the order in which they are shown."""
    confidence: float = 0.95
    """Level of the intervals in `methods`."""
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """Stage to its counts, such as records per split."""
    dropped: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """Stage to reason to the number of dropped rows."""
    log_history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Log rows of the Hugging Face Trainer: `step` with `loss`, `log_odds_ratio`, `eval_loss` and so on."""
    per_label: list[LabelHits] = dataclasses.field(default_factory=list)
    transitions: Transitions | None = None
    """Numbers of records by whether they were right before and after alignment."""
    examples: list[Example] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    """Remarks that a reader needs to interpret the numbers."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Stage to wall-clock seconds."""
    goodput: dict[str, Goodput] = dataclasses.field(default_factory=dict)
    """Stage to the resources that its workers used."""
    artifacts: dict[str, str] = dataclasses.field(default_factory=dict)
    """Stage to the URI of its artifact."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Resolved spec of the run."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def estimates(self) -> dict[str, Mapping[str, Estimate]]:
        """Title of each method to its estimates."""
        return {result.method.title: result.estimates for result in self.methods}
