"""Build the Grafana dashboards of `dashboards.panels`: `python -m dashboards.build` writes their JSON here."""

from __future__ import annotations

from pathlib import Path

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

from dashboards.panels import DASHBOARDS, PanelSpec

FOLDER = Path(__file__).parent
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RAY_DASHBOARDS = {
    "Ray: cluster": "rayDefaultDashboard",
    "Ray: data": "rayDataDashboard",
    "Ray: train": "rayTrainDashboard",
}
"""Uids of dashboards that Ray writes itself, by the title of our link to them."""

Panel = timeseries.Panel | stat.Panel | bargauge.Panel | statetimeline.Panel


def build(name: str) -> str:
    """Return the JSON of one dashboard."""
    spec = DASHBOARDS[name]
    dashboard = (
        Dashboard(spec.title)
        .uid(f"mint-ray-{name}")
        .description(spec.description)
        .tags(["mint_ray"])
        .time("now-3h", "now")
        .refresh("15s")
        .timezone("browser")
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .link(DashboardLink("mint_ray").type(DashboardLinkType.DASHBOARDS).tags(["mint_ray"]).keep_time(True))
    )
    if any("$run" in expression for panel in spec.panels for expression, _ in panel.queries):
        dashboard.with_variable(
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
    for title, uid in RAY_DASHBOARDS.items():
        dashboard.link(DashboardLink(title).type(DashboardLinkType.LINK).url(f"/d/{uid}").keep_time(True))
    for number, panel in enumerate(spec.panels, 1):
        dashboard.with_panel(_build_panel(panel, number))
    return JSONEncoder(sort_keys=True, indent=1).encode(dashboard.build()) + "\n"


def _build_panel(spec: PanelSpec, number: int) -> Panel:
    panel = _empty_panel(spec)
    panel.id(number).title(spec.title).description(spec.description).unit(spec.unit)
    panel.datasource(SOURCE).span(spec.width).height(8).min(0 if spec.unit != "none" else None)
    if spec.max_value is not None:
        panel.max(spec.max_value)
    for letter, (expression, legend) in zip("ABCD", spec.queries, strict=False):
        panel.with_target(Dataquery().ref_id(letter).expr(expression).legend_format(legend))
    return panel


def _empty_panel(spec: PanelSpec) -> Panel:
    last = ReduceDataOptions().calcs(["lastNotNull"])
    match spec.kind:
        case "stat":
            return stat.Panel().reduce_options(last)
        case "bars":
            return bargauge.Panel().reduce_options(last).orientation("horizontal")
        case "states":
            texts = {"0": ValueMappingResult(text="ended", index=0), "1": ValueMappingResult(text="running", index=1)}
            return statetimeline.Panel().mappings([ValueMap(options=texts)])
        case _:
            legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
            panel = timeseries.Panel().legend(legend.show_legend(True)).span_nulls(60_000)
            if spec.kind == "stacked":
                panel.stacking(StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(40)
            return panel


if __name__ == "__main__":
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(build(name), encoding="utf-8")
