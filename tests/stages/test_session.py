"""Blocks go through actors or tasks in order, and what the user can mend comes back in one line."""

from __future__ import annotations

import pyarrow as pa
import pytest

from mint_ray.loading import UserError
from mint_ray.stages.session import map_blocks

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

BLOCKS = [pa.table({"number": [2 * block, 2 * block + 1]}) for block in range(4)]
POOLS = pytest.mark.parametrize("actors", [None, (1, 1), (3, 3), (1, 9)], ids=["tasks", "one", "too many", "growing"])


class Doubles:
    """Doubles numbers, but for the one that it was told to refuse; -1 is itself."""

    def __init__(self, refused: int) -> None:
        if refused == -1:
            raise UserError("student: no weights")
        self.refused = refused

    def __call__(self, batch: pa.Table) -> pa.Table:
        numbers = batch["number"].to_pylist()
        if self.refused in numbers:
            raise UserError(f"record {self.refused}: is refused")
        return pa.table({"doubled": [2 * number for number in numbers]})


@POOLS
def test_blocks_come_back_in_order_however_many_processors_there_are(actors: tuple[int, int] | None) -> None:
    # two processors, and each actor takes both
    mapped = map_blocks(BLOCKS, Doubles, (99,), actors=actors, cpus=2, gpus=0)
    assert [block["doubled"].to_pylist() for block in mapped] == [[0, 2], [4, 6], [8, 10], [12, 14]]


@pytest.mark.parametrize(("refused", "message"), [(5, "record 5: is refused"), (-1, "student: no weights")])
@pytest.mark.parametrize("actors", [None, (1, 2)], ids=["tasks", "actors"])
def test_a_user_error_on_a_worker_is_the_same_here(actors: tuple[int, int] | None, refused: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        list(map_blocks(BLOCKS, Doubles, (refused,), actors=actors, cpus=1, gpus=0))
    assert type(caught.value) is UserError
    assert str(caught.value) == message
