"""Settings of the tasks: invalid values and old keys."""

from __future__ import annotations

from typing import Any

import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.tasks.config import RareDisease, TissueType


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": {"min_groups": 0}}, "labels: min_groups must be positive, got 0"),
        ({"labels": {"max_labels": 0}}, "labels: max_labels must be positive, got 0"),
        ({"max_findings": 0}, "max_findings must be positive and max_absent not negative, got 0 and 10"),
        ({"labels": {"most": 5}}, "labels.most: unknown key (got 5); did you mean 'max_labels'?"),
    ],
)
def test_settings_of_rare_diseases_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_data(RareDisease, settings)
    assert message in str(caught.value)


A, B = {"label_id": "a", "name": "x"}, {"label_id": "b", "name": "y"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": []}, "names must list two or more labels, got 0"),
        ({"names": [A, {"label_id": "a", "name": "y"}]}, "names must list two or more labels, got 1"),
        ({"names": [A, B, B]}, "names: label 'b' is listed twice"),
        ({"names": [A, {"label_id": "b", "name": "?"}]}, "label 'b': a name needs a letter or a digit, got '?'"),
        ({"labels": {"ids": ["liver"]}}, "labels.ids: 'liver' has no name; names has Adrenal_gland, Bile-duct"),
        ({"header": "MOST LIKELY"}, "header must be words followed by a colon, got 'MOST LIKELY'"),
        ({"show_image": False}, "show_image is false, so visible_fields must name a field"),
        ({"shows_image": False}, "shows_image: unknown key (got False); did you mean 'show_image'?"),
        ({"told": ["age"]}, "told: unknown key (got ['age']); did you mean 'visible_fields'?"),
    ],
)
def test_settings_of_image_tasks_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_data(TissueType, settings)
    assert message in str(caught.value)
