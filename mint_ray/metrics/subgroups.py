"""Subgroups of the records that methods are measured on separately: rare and frequent labels, sex, age."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping

from mint_ray.records import Record, duration_in_years

AGE_BANDS = (
    (1, "under 1 year"),
    (6, "1 to 5 years"),
    (12, "6 to 11 years"),
    (18, "12 to 17 years"),
    (40, "18 to 39 years"),
    (float("inf"), "40 years and over"),
)
"""Exclusive upper end of each age band in years, and its name."""

SEXES = {"FEMALE": "female", "F": "female", "MALE": "male", "M": "male"}
"""Values of the coded field `sex`, in capitals, and the subgroup of each."""


def find_subgroups(records: Iterable[Record], training_records: Mapping[str, int]) -> dict[str, set[str]]:
    """Return the record ids of each subgroup, in the order in which reports show them, without empty subgroups.

    `training_records` maps label_id to its number of training records. A label is rare if it has at most the median of
    these numbers, frequent if it has more. If one of the two subgroups would be empty, both are left out.
    """
    members = list(records)
    subgroups: dict[str, set[str]] = {}
    median = statistics.median(training_records.values()) if training_records else 0
    rare = {record.record_id for record in members if training_records.get(record.label_id or "", 0) <= median}
    frequent = {record.record_id for record in members} - rare
    if rare and frequent:
        subgroups |= {"rare labels": rare, "frequent labels": frequent}
    for name in ("female", "male", "sex unknown", *(band for _, band in AGE_BANDS), "age unknown"):
        subgroups[name] = set()
    for record in members:
        sex = SEXES.get(record.fields.get("sex", "").strip().upper(), "sex unknown")
        years = age_in_years(record.fields.get("age", ""))
        age = "age unknown" if years is None else next(band for end, band in AGE_BANDS if years < end)
        subgroups[sex].add(record.record_id)
        subgroups[age].add(record.record_id)
    return {name: record_ids for name, record_ids in subgroups.items() if record_ids}


def age_in_years(age: str) -> float | None:
    """Return the years of an ISO 8601 duration such as `P3Y6M` or of a plain number of years; None for other texts."""
    text = age.strip()
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else duration_in_years(text)
