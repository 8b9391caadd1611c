"""Dashboards as data: title, description and PromQL of each panel; `dashboards.build` writes them as Grafana's JSON.

Tested by tests/dashboards/test_build.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mint_ray.telemetry import METRICS

OR_ZERO = " or on() vector(0)"
"""Suffix of an expression whose series may not exist yet: it then gives zero."""
SCORE, PAIR, FAILED, VALIDATION = 'stage="score"', 'stage="pair"', 'state="fail"', 'split="validation"'


@dataclass(frozen=True, kw_only=True)
class PanelSpec:
    """One panel of a dashboard."""

    title: str
    description: str
    unit: str
    """Grafana's unit id: `s`, `percentunit`, `short`, `bytes`, `rowsps`."""
    queries: Sequence[tuple[str, str]]
    """PromQL expressions with the legend of their series."""
    kind: Literal["lines", "stacked", "stat", "bars", "states"] = "lines"
    max_value: float | None = None
    """Upper end of the axis; None: Grafana chooses it."""
    width: int = 8
    """Width in Grafana's grid of 24 columns."""


@dataclass(frozen=True)
class DashboardSpec:
    """One dashboard."""

    title: str
    description: str
    panels: Sequence[PanelSpec]


def series(name: str, where: str = "", suffix: str = "") -> str:
    """Return the selector of a metric for the selected runs.

    Args:
        name: Name in `mint_ray.telemetry.METRICS`.
        where: Further label matchers.
        suffix: Suffix of a histogram's series, such as `_count` (default: `_bucket`).

    Raises:
        KeyError: There is no such metric.
    """
    metric = METRICS[name]
    full_name = metric.series[0].removesuffix("_bucket") + suffix if suffix else metric.series[0]
    matchers = [matcher for matcher in ('run=~"$run"' if "run" in metric.tags else "", where) if matcher]
    return f"{full_name}{{{', '.join(matchers)}}}" if matchers else full_name


def total(name: str, by: str, where: str = "") -> str:
    """Return the sum of a metric by label."""
    return f"sum by ({by}) ({series(name, where)})"


def rate(name: str, by: str, where: str = "") -> str:
    """Return the rate per second of a counter by label."""
    return f"sum by ({by}) (rate({series(name, where)}[$__rate_interval]))"


def quantiles(name: str) -> list[tuple[str, str]]:
    """Return the queries for median and 95th percentile of a histogram, over each run so far."""
    buckets = f"sum by (le, run) ({series(name)})"
    return [
        (f"histogram_quantile({share}, {buckets}){OR_ZERO}", f"{{{{run}}}} {word}")
        for share, word in ((0.5, "median"), (0.95, "95th percentile"))
    ]


def both_splits(name: str) -> list[tuple[str, str]]:
    """Return the query for a gauge on the training and on the validation split."""
    return [(f"max by (run, split) ({series(name)})", "{{run}} {{split}}")]


GPU_UTILIZATION = PanelSpec(
    title="GPU utilization",
    description="Utilization per GPU. Low while a stage runs: its CPUs cannot keep up. Zero without GPUs.",
    unit="percent",
    max_value=100,
    queries=[
        (
            "avg by (instance, GpuIndex) (ray_node_gpus_utilization)" + OR_ZERO,
            "{{instance}} GPU {{GpuIndex}}",
        )
    ],
)
RUNNING_STAGES = PanelSpec(
    title="Running stages",
    description="Stages that a driver is running now. A stage that is already complete takes only a moment.",
    unit="short",
    kind="states",
    width=24,
    queries=[(f"max by (stage) ({series('stage_running')})", "{{stage}}")],
)

OVERVIEW = DashboardSpec(
    "mint_ray: overview",
    "Progress, cost and dropped rows of runs.",
    [
        RUNNING_STAGES,
        PanelSpec(
            title="Stage progress",
            description="Completed share of records, pairs or steps, as in the progress lines.",
            unit="percentunit",
            kind="bars",
            max_value=1,
            queries=[(f"max by (stage) ({series('stage_progress')})", "{{stage}}")],
        ),
        PanelSpec(
            title="Time per stage",
            description="Driver time in each stage, including failed attempts.",
            unit="s",
            kind="bars",
            queries=[(total("stage_seconds", "stage"), "{{stage}}")],
        ),
        PanelSpec(
            title="Productive share of allocated time",
            description="Share of allocated worker time that ended in an artifact. Zero until a stage ends.",
            unit="percentunit",
            kind="stat",
            max_value=1,
            queries=[
                (f"sum({series('productive_seconds')}) / sum({series('allocated_seconds')}){OR_ZERO}", "productive")
            ],
        ),
        PanelSpec(
            title="Rows per second",
            description="Rows completed per second. Zero for a long time: see StageStalled.",
            unit="rowsps",
            queries=[(rate("rows_done", "stage"), "{{stage}}")],
        ),
        PanelSpec(
            title="Dropped rows",
            description="Rows dropped or without a result, by stage and reason. The manifests record them too.",
            unit="short",
            kind="bars",
            queries=[(total("rows_failed", "stage, reason") + OR_ZERO, "{{stage}}: {{reason}}")],
        ),
        PanelSpec(
            title="Bytes written",
            description="Bytes of the table parts that stages have written.",
            unit="bytes",
            kind="bars",
            queries=[(total("bytes_written", "stage"), "{{stage}}")],
        ),
        PanelSpec(
            title="CPUs in use",
            description="CPUs that Ray has allocated, and all CPUs of the cluster.",
            unit="short",
            queries=[
                ('sum(ray_resources{Name="CPU", State="USED"})', "in use"),
                ('sum(ray_resources{Name="CPU"})', "total"),
            ],
        ),
        PanelSpec(
            title="GPUs in use",
            description="GPUs that Ray has allocated, and all GPUs of the cluster. Idle GPUs cost the same.",
            unit="short",
            queries=[
                ('sum(ray_resources{Name="GPU", State="USED"})' + OR_ZERO, "in use"),
                ('sum(ray_resources{Name="GPU"})' + OR_ZERO, "total"),
            ],
        ),
        PanelSpec(
            title="Nodes",
            description="Nodes that report, and nodes that stopped reporting within the last 15 minutes.",
            unit="short",
            queries=[
                ("count(count by (instance) (ray_node_cpu_count))", "up"),
                (
                    "count(count by (instance) (max_over_time(ray_node_cpu_count[15m])) "
                    "unless on (instance) count by (instance) (max_over_time(ray_node_cpu_count[2m])))" + OR_ZERO,
                    "lost",
                ),
            ],
        ),
        GPU_UTILIZATION,
        PanelSpec(
            title="Object store memory",
            description="Bytes in Ray's object store, in memory and spilled to disk.",
            unit="bytes",
            queries=[("sum by (Location) (ray_object_store_memory)" + OR_ZERO, "{{Location}}")],
        ),
        PanelSpec(
            title="Node memory",
            description="Share of each node's memory in use. Ray kills workers on a full node and repeats their parts.",
            unit="percentunit",
            max_value=1,
            queries=[
                (
                    "max by (instance) (ray_node_mem_used_host) / max by (instance) (ray_node_mem_total_host)",
                    "{{instance}}",
                )
            ],
        ),
    ],
)

GENERATION = DashboardSpec(
    "mint_ray: generation",
    "Records, teacher scores and preference pairs.",
    [
        PanelSpec(
            title="Records scored",
            description="Records passed to the teacher, including those with an ablated modality.",
            unit="short",
            kind="stat",
            queries=[(total("records_scored", "run"), "{{run}}")],
        ),
        PanelSpec(
            title="Records scored per second",
            description="Throughput of the teacher over all its workers.",
            unit="rowsps",
            width=16,
            queries=[(rate("records_scored", "run"), "{{run}}")],
        ),
        PanelSpec(
            title="Batch time",
            description="Time the teacher takes per batch, over the whole run so far.",
            unit="s",
            queries=quantiles("teacher_batch_seconds"),
        ),
        PanelSpec(
            title="Share of records without a ranking",
            description="Share of the records passed to the teacher. More than a few: see RowsFailing.",
            unit="percentunit",
            max_value=1,
            queries=[
                (
                    f"{total('rows_failed', 'run', SCORE)} / {total('records_scored', 'run')}{OR_ZERO}",
                    "{{run}}",
                )
            ],
        ),
        PanelSpec(
            title="Records without a ranking by reason",
            description="Unreadable images, and errors that the teacher raised.",
            unit="short",
            kind="bars",
            queries=[(total("rows_failed", "reason", SCORE) + OR_ZERO, "{{reason}}")],
        ),
        PanelSpec(
            title="Pairs written",
            description="Preference pairs of the training and validation splits.",
            unit="short",
            kind="stat",
            queries=[(total("pairs_written", "run"), "{{run}}")],
        ),
        PanelSpec(
            title="Pairs written per second",
            description="Throughput of the tasks that sample pairs.",
            unit="rowsps",
            width=16,
            queries=[(rate("pairs_written", "run"), "{{run}}")],
        ),
        PanelSpec(
            title="Records without pairs by reason",
            description="The teacher failed on the record, or ranked too few labels to reject any.",
            unit="short",
            kind="bars",
            queries=[(total("rows_failed", "reason", PAIR) + OR_ZERO, "{{reason}}")],
        ),
        PanelSpec(
            title="Bytes written per second",
            description="Table parts written to storage.",
            unit="Bps",
            queries=[(rate("bytes_written", "stage"), "{{stage}}")],
        ),
        GPU_UTILIZATION,
        PanelSpec(
            title="Spilled objects",
            description="Bytes that Ray's object store spilled to disk: parts are too large, or too many are queued.",
            unit="bytes",
            queries=[('sum(ray_object_store_memory{Location="SPILLED"})' + OR_ZERO, "on disk")],
        ),
    ],
)

TRAINING = DashboardSpec(
    "mint_ray: training",
    "Losses, throughput and checkpoints of the student's training.",
    [
        PanelSpec(
            title="Loss",
            description="Training objective; for ORPO the NLL of the chosen completion plus beta times the odds-ratio "
            "loss.",
            unit="none",
            queries=both_splits("loss"),
        ),
        PanelSpec(
            title="NLL of the chosen completions",
            description="Negative log-likelihood per token. Comparable across values of beta.",
            unit="none",
            queries=both_splits("nll_loss"),
        ),
        PanelSpec(
            title="Log odds ratio",
            description="Log-sigmoid of the log odds ratio of chosen against rejected completions, as logged by TRL. "
            "Near zero: there is nothing left to learn from these pairs.",
            unit="none",
            queries=both_splits("log_odds_ratio"),
        ),
        PanelSpec(
            title="Reward accuracy",
            description="Share of pairs whose chosen completion is likelier than the rejected one. One within an "
            "epoch: the rejected completions are too easy.",
            unit="percentunit",
            max_value=1,
            queries=both_splits("rewards_accuracies"),
        ),
        PanelSpec(
            title="Non-finite losses",
            description="Logged losses that are NaN or infinite. Above zero: see LossNotFinite.",
            unit="short",
            kind="stat",
            queries=[(total("nonfinite_losses", "run, split") + OR_ZERO, "{{run}} {{split}}")],
        ),
        PanelSpec(
            title="Gradient norm",
            description="Norm before clipping. Peaks precede a diverging loss.",
            unit="none",
            queries=[(f"max by (run) ({series('grad_norm')})", "{{run}}")],
        ),
        PanelSpec(
            title="Tokens per second",
            description="Tokens in forward passes without padding, over all workers.",
            unit="short",
            queries=[(rate("tokens_trained", "run"), "{{run}}")],
        ),
        PanelSpec(
            title="Tokens",
            description="Tokens in forward passes since this attempt started.",
            unit="short",
            kind="stat",
            queries=[(total("tokens_trained", "run"), "{{run}}")],
        ),
        PanelSpec(
            title="Step time",
            description="Time per optimizer step including data loading, on rank 0, over the whole run so far.",
            unit="s",
            queries=quantiles("step_seconds"),
        ),
        PanelSpec(
            title="Checkpoint time",
            description="Time that training is blocked by a checkpoint; the upload runs in the background.",
            unit="s",
            queries=quantiles("checkpoint_seconds"),
        ),
        PanelSpec(
            title="Checkpoint age",
            description="Work that would be lost if rank 0 failed now. See CheckpointLate.",
            unit="s",
            queries=[(f"max by (run) ({series('checkpoint_age_seconds')})", "{{run}}")],
        ),
        GPU_UTILIZATION,
        PanelSpec(
            title="GPU memory",
            description="Memory in use. Full: reduce per_device_train_batch_size or max_tokens_per_row.",
            unit="decmbytes",
            queries=[
                (
                    "sum by (instance, GpuIndex) (ray_node_gram_used)" + OR_ZERO,
                    "{{instance}} GPU {{GpuIndex}}",
                )
            ],
        ),
    ],
)

SWEEP = DashboardSpec(
    "mint_ray: sweep",
    "Trials of a study, their cost and their stages.",
    [
        PanelSpec(
            title="Trials by state",
            description="Optuna's states: complete, pruned, fail, running, waiting.",
            unit="short",
            kind="stacked",
            width=16,
            queries=[(f"max by (run, state) ({series('sweep_trials')}){OR_ZERO}", "{{run}} {{state}}")],
        ),
        PanelSpec(
            title="Failed trials",
            description="A trial that raises is tried twice, then listed with its error in the report.",
            unit="short",
            kind="stat",
            queries=[(f"max by (run) ({series('sweep_trials', FAILED)}){OR_ZERO}", "{{run}}")],
        ),
        PanelSpec(
            title="GPU-seconds per trial",
            description="Cost of a trial, whatever its outcome; zero for trials on CPUs.",
            unit="s",
            queries=quantiles("trial_gpu_seconds"),
        ),
        PanelSpec(
            title="Ended trials",
            description="Trials that are complete, pruned or failed.",
            unit="short",
            kind="stat",
            queries=[
                (
                    f"sum by (run) ({series('trial_gpu_seconds', suffix='_count')}){OR_ZERO}",
                    "{{run}}",
                )
            ],
        ),
        PanelSpec(
            title="Drivers per stage",
            description="Number of trials in each stage over time.",
            unit="short",
            kind="stacked",
            queries=[(rate("stage_seconds", "stage"), "{{stage}}")],
        ),
        PanelSpec(
            title="Validation NLL of the chosen completions",
            description="Metric of every training in the sweep that the pruner compares.",
            unit="none",
            width=16,
            queries=[(f"max by (run) ({series('nll_loss', VALIDATION)})", "{{run}}")],
        ),
        GPU_UTILIZATION,
    ],
)

DASHBOARDS = {"overview": OVERVIEW, "generation": GENERATION, "training": TRAINING, "sweep": SWEEP}
