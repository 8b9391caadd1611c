"""Settings of parallel runs."""

from __future__ import annotations

import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.config.parallel import ParallelResources


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"max_concurrent": 0}, "max_concurrent must be positive, got 0"),
        ({"concurrent": 2}, r"concurrent: unknown key \(got 2\); did you mean 'max_concurrent'\?"),
    ],
)
def test_invalid_resources_are_an_error(data: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_data(ParallelResources, data)
