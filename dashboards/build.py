"""Make the Grafana boards of `dashboards.plans`: `python -m dashboards.build` writes them beside itself."""

from __future__ import annotations

from pathlib import Path

from dashboards.plans import BOARDS, Plan
from grafana_foundation_sdk.builders import bargauge, stat, statetimeline, timeseries
from grafana_foundation_sdk.builders.common import ReduceDataOptions, StackingConfig, VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, DashboardLink, DatasourceVariable, QueryVariable
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    ValueMap,
    ValueMappingResult,
    VariableRefresh,
)

FOLDER = Path(__file__).parent
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RAY_BOARDS = {"Ray: cluster": "rayDefaultDashboard", "Ray: data": "rayDataDashboard", "Ray: train": "rayTrainDashboard"}
"""Boards that Ray writes itself, by their uid."""

Panel = timeseries.Panel | stat.Panel | bargauge.Panel | statetimeline.Panel


def build(name: str) -> str:
    """The JSON of one board."""
    title, description, plans = BOARDS[name]
    board = (
        Dashboard(title)
        .uid(f"mint-ray-{name}")
        .description(description)
        .tags(["mint_ray"])
        .time("now-3h", "now")
        .refresh("15s")
        .timezone("browser")
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .link(DashboardLink("mint_ray").type(DashboardLinkType.DASHBOARDS).tags(["mint_ray"]).keep_time(True))
    )
    if any("$run" in expression for plan in plans for expression, _ in plan.ask):
        board.with_variable(
            QueryVariable("run")
            .label("Artifact or study")
            .query('label_values({__name__=~"ray_mint_.+"}, run)')
            .datasource(SOURCE)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            .all_value(".*")
            .multi(True)
            .current({"selected": True, "text": "All", "value": "$__all"})
        )
    for link, uid in RAY_BOARDS.items():
        board.link(DashboardLink(link).type(DashboardLinkType.LINK).url(f"/d/{uid}").keep_time(True))
    for number, plan in enumerate(plans, 1):
        board.with_panel(_panel(plan, number))
    return JSONEncoder(sort_keys=True, indent=1).encode(board.build()) + "\n"


def _panel(plan: Plan, number: int) -> Panel:
    panel = _form(plan)
    panel.id(number).title(plan.title).description(plan.description).unit(plan.unit)
    panel.datasource(SOURCE).span(plan.width).height(8).min(0 if plan.unit != "none" else None)
    if plan.most is not None:
        panel.max(plan.most)
    for letter, (expression, legend) in zip("ABCD", plan.ask, strict=False):
        panel.with_target(Dataquery().ref_id(letter).expr(expression).legend_format(legend))
    return panel


def _form(plan: Plan) -> Panel:
    last = ReduceDataOptions().calcs(["lastNotNull"])
    match plan.form:
        case "number":
            return stat.Panel().reduce_options(last)
        case "bars":
            return bargauge.Panel().reduce_options(last).orientation("horizontal")
        case "states":
            words = {"0": ValueMappingResult(text="done", index=0), "1": ValueMappingResult(text="at work", index=1)}
            return statetimeline.Panel().mappings([ValueMap(options=words)])
        case _:
            legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
            panel = timeseries.Panel().legend(legend.show_legend(True)).span_nulls(60_000)
            if plan.form == "stack":
                panel.stacking(StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(40)
            return panel


if __name__ == "__main__":
    for name in BOARDS:
        (FOLDER / f"{name}.json").write_text(build(name), encoding="utf-8")
