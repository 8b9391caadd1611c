"""Resource accounting of a run, as a table and as one sentence."""

from __future__ import annotations

from collections.abc import Mapping

from mint_ray.reports.formatting import format_seconds
from mint_ray.reports.tables import Table, make_table
from mint_ray.runtime.goodput import Goodput, ResourceSeconds

HEADINGS = ("stage", "attempts", "wall clock", "waiting", "allocated", "start-up", "productive", "lost", "idle")
NOTE = (
    "CPU or GPU seconds that workers had allocated, over all attempts at the artifacts of this run, by any run. "
    "Productive: ended in an artifact. Lost: recomputed after a worker, node or driver failure. Waiting: wall clock "
    "during which no requested resources were available. The driver and unallocated nodes are not counted."
)


def goodput_table(goodput: Mapping[str, Goodput]) -> Table | None:
    """Return a table with a row for each stage that allocated resources, and the total; None if no stage did."""
    spent = {stage: each for stage, each in goodput.items() if each.allocated != ResourceSeconds()}
    if len(spent) > 1:
        spent["total"] = sum(spent.values(), Goodput())
    rows = []
    for stage, each in spent.items():
        amounts = [each.allocated, each.startup, each.productive, each.lost, each.idle]
        times = [format_seconds(each.wall_seconds), format_seconds(each.waiting_seconds)]
        rows.append([stage, f"{each.attempts:,}", *times, *(f"{amount.cpu_seconds:,.0f}" for amount in amounts)])
        if each.allocated.gpu_seconds:
            rows.append([f"{stage}, GPUs", "", "", "", *(f"{amount.gpu_seconds:,.0f}" for amount in amounts)])
    return make_table(HEADINGS, rows, title="Resources", note=NOTE) if rows else None


def goodput_sentence(goodput: Mapping[str, Goodput]) -> str:
    """Return the shares of the allocated seconds; an empty string if nothing was allocated."""
    total = sum(goodput.values(), Goodput())
    parts = []
    for unit, name in (("cpu_seconds", "CPU"), ("gpu_seconds", "GPU")):
        allocated = getattr(total.allocated, unit)
        if allocated:
            shares = [
                f"{getattr(amount, unit) / allocated:.0%} {use}"
                for use, amount in (
                    ("productive", total.productive),
                    ("start-up", total.startup),
                    ("lost", total.lost),
                    ("idle", total.idle),
                )
            ]
            parts.append(f"{allocated:,.0f} {name} seconds, {', '.join(shares)}")
    return "; ".join([*parts, f"{format_seconds(total.waiting_seconds)} waiting for resources"]) if parts else ""
