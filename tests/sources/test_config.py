"""Settings of the sources: invalid values and old keys. The members' tests have those of single sources."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from mint_ray.config.loader import UserError, from_data, json_schema
from mint_ray.config.stages import Prepare
from mint_ray.sources.config import AnySource, Hpo


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_diseases": 0}, "num_diseases and patients_per_disease must be positive, got 0 and 20"),
        ({"omission_rate": 1.0}, "omission_rate must be at least 0 and below 1, got 1.0"),
        ({"noise_rate": -0.5}, "noise_rate must be at least 0 and below 1, got -0.5"),
        ({"max_absent": -1}, "max_absent must not be negative, got -1"),
    ],
)
def test_settings_of_simulated_patients_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_data(Hpo, settings)
    assert message in str(caught.value)


TABLE = {"kind": "table", "uri": "x.csv"}


@pytest.mark.parametrize(
    ("source", "old", "new"),
    [
        ({"kind": "hpo"}, "diseases", "num_diseases"),
        ({"kind": "hpo"}, "left_out", "omission_rate"),
        ({"kind": "hpo"}, "noise", "noise_rate"),
        ({"kind": "hpo"}, "imprecise", "generalization_rate"),
        ({"kind": "hpo"}, "absent", "max_absent"),
        (TABLE, "group", "group_pattern"),
        ({"kind": "image_folder", "uri": "x"}, "group", "group_pattern"),
        ({"kind": "pannuke", "uri": "x"}, "nuclei", "measure_nuclei"),
        ({"kind": "tiles", "images": TABLE}, "pictures", "images"),
        ({"kind": "tiles", "images": TABLE}, "cut", "tiling"),
        ({"kind": "tiles", "images": TABLE}, "size", "tile_size"),
        ({"kind": "tiles", "images": TABLE}, "most", "max_tiles_per_image"),
    ],
)
def test_an_old_key_gets_an_error_that_names_the_new_one(source: dict[str, Any], old: str, new: str) -> None:
    with pytest.raises(UserError, match=rf"^config: source\.{old}: unknown key \(got 1\); did you mean '{new}'\?$"):
        from_data(Prepare, {"source": source | {old: 1}})


def test_every_source_takes_a_license_and_a_citation() -> None:
    sections = json_schema(Prepare)["$defs"]
    for source in get_args(get_args(AnySource)[0]):
        member = sections[source.__name__]
        assert {"license", "citation"} <= member["properties"].keys()
        assert all("description" in field for name, field in member["properties"].items() if name != "kind")
