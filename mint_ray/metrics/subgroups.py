"""Parts of the records on which methods are measured apart: rare and frequent labels, sex, age."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping

from mint_ray.records import Record

AGE_BANDS = (
    (1, "under 1 year"),
    (6, "1 to 5 years"),
    (12, "6 to 11 years"),
    (18, "12 to 17 years"),
    (40, "18 to 39 years"),
    (float("inf"), "40 years and over"),
)
"""End of each band, in years, and what it is called."""

SEXES = {"FEMALE": "female", "F": "female", "MALE": "male", "M": "male"}
UNITS = (1.0, 1 / 12, 7 / 365.25, 1 / 365.25)
"""Years, months, weeks and days, in years."""


def strata(records: Iterable[Record], trained: Mapping[str, int]) -> dict[str, set[str]]:
    """Record ids by part, in the order in which they are shown; parts that hold nobody are left out.

    A label is rare if at most as many records were there to train on as for the median of the labels, frequent if
    more; where that puts all labels on one side there are no such parts. `trained` maps label_id to that count.
    """
    held = list(records)
    parts: dict[str, set[str]] = {}
    middle = statistics.median(trained.values()) if trained else 0
    rarity = [("rare labels", 0.0, middle), ("frequent labels", middle, float("inf"))]
    found = {
        part: {record.record_id for record in held if least < trained.get(record.label_id or "", 0) <= most}
        for part, least, most in rarity
    }
    # what was never trained on is rare too
    found["rare labels"] |= {record.record_id for record in held if not trained.get(record.label_id or "")}
    if all(found.values()):
        parts |= found
    bands = ["female", "male", "sex unknown", *(band for _, band in AGE_BANDS), "age unknown"]
    for part in bands:
        parts[part] = set()
    for record in held:
        parts[SEXES.get(record.fields.get("sex", "").strip().upper(), "sex unknown")].add(record.record_id)
        years = age_in_years(record.fields.get("age", ""))
        parts["age unknown" if years is None else next(band for end, band in AGE_BANDS if years < end)].add(
            record.record_id
        )
    return {part: members for part, members in parts.items() if members}


def age_in_years(age: str) -> float | None:
    """Years of an ISO 8601 duration such as `P3Y6M`, or of a plain number of years; None of anything else."""
    text = age.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    match = re.fullmatch(r"P(?:(\d+)Y)?(?:(\d+)M)?(?:(\d+)W)?(?:(\d+)D)?(?:T.*)?", text)
    if match is None or text == "P":
        return None
    return sum(int(number) * unit for number, unit in zip(match.groups(), UNITS, strict=True) if number)
