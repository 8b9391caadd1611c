"""What the boards show, in plain words and PromQL; `dashboards.build` makes Grafana's JSON of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mint_ray.telemetry import MEASURES

NOTHING_YET = " or on() vector(0)"
"""Behind an expression whose series are not there before something happens: a zero, and only then."""
SCORE, PAIR, FAILED, VALIDATION = 'stage="score"', 'stage="pair"', 'state="fail"', 'split="validation"'


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One panel: what it asks Prometheus, and what a reader is told of it."""

    title: str
    description: str
    unit: str
    """Grafana's name: `s`, `percentunit`, `short`, `bytes`, `rowsps`."""
    ask: Sequence[tuple[str, str]]
    """Expressions and the legends of their series."""
    form: Literal["lines", "stack", "number", "bars", "states"] = "lines"
    most: float | None = None
    width: int = 8


def series(name: str, where: str = "", suffix: str = "") -> str:
    """A measure's series of the chosen runs; `where` are further matchers. Raises KeyError for no measure of ours."""
    row = MEASURES[name]
    full = row.series[0].removesuffix("_bucket") + suffix if suffix else row.series[0]
    matchers = [matcher for matcher in ('run=~"$run"' if "run" in row.tags else "", where) if matcher]
    return f"{full}{{{', '.join(matchers)}}}" if matchers else full


def total(name: str, by: str, where: str = "") -> str:
    return f"sum by ({by}) ({series(name, where)})"


def rate(name: str, by: str, where: str = "") -> str:
    return f"sum by ({by}) (rate({series(name, where)}[$__rate_interval]))"


def spread(name: str) -> list[tuple[str, str]]:
    """Median and 95th percentile of a histogram over each run so far."""
    buckets = f"sum by (le, run) ({series(name)})"
    return [
        (f"histogram_quantile({share}, {buckets}){NOTHING_YET}", f"{{{{run}}}} {word}")
        for share, word in ((0.5, "median"), (0.95, "95 of 100"))
    ]


def both_splits(name: str) -> list[tuple[str, str]]:
    return [(f"max by (run, split) ({series(name)})", "{{run}} {{split}}")]


GPUS = Plan(
    title="Work of the GPUs",
    description="How busy each GPU is. Low while a stage works: its processors do not feed it. Zero without GPUs.",
    unit="percent",
    most=100,
    ask=[
        (
            "avg by (instance, GpuIndex) (ray_node_gpus_utilization)" + NOTHING_YET,
            "{{instance}} GPU {{GpuIndex}}",
        )
    ],
)
STAGES = Plan(
    title="Stages at work",
    description="Which stages some driver is at now. A stage that was finished before is passed in a moment.",
    unit="short",
    form="states",
    width=24,
    ask=[(f"max by (stage) ({series('stage_running')})", "{{stage}}")],
)

BOARDS: dict[str, tuple[str, str, list[Plan]]] = {
    "overview": (
        "mint_ray: overview",
        "Where a run is, what it has cost, and what it leaves out.",
        [
            STAGES,
            Plan(
                title="How far each stage is",
                description="Share of the records, pairs or steps that are done, as in the progress lines.",
                unit="percentunit",
                form="bars",
                most=1,
                ask=[(f"max by (stage) ({series('stage_share')})", "{{stage}}")],
            ),
            Plan(
                title="Time at each stage",
                description="Seconds that drivers were at each stage, those of attempts that failed among them.",
                unit="s",
                form="bars",
                ask=[(total("stage_seconds", "stage"), "{{stage}}")],
            ),
            Plan(
                title="Useful share of the rented time",
                description="Of the time workers were held, how much ended in an artifact. Zero until a run has told.",
                unit="percentunit",
                form="number",
                most=1,
                ask=[(f"sum({series('useful_seconds')}) / sum({series('rented_seconds')}){NOTHING_YET}", "useful")],
            ),
            Plan(
                title="Progress",
                description="Rows that get done in a second. Flat at zero for long: see StageStalled.",
                unit="rowsps",
                ask=[(rate("rows_done", "stage"), "{{stage}}")],
            ),
            Plan(
                title="Rows left out",
                description="Rows without a result or dropped, by stage and reason. The manifest has them for good.",
                unit="short",
                form="bars",
                ask=[(total("rows_failed", "stage, reason") + NOTHING_YET, "{{stage}}: {{reason}}")],
            ),
            Plan(
                title="Bytes written",
                description="Parts of tables that stages have written.",
                unit="bytes",
                form="bars",
                ask=[(total("bytes_written", "stage"), "{{stage}}")],
            ),
            Plan(
                title="Processors in use",
                description="What Ray has handed out, and what there is.",
                unit="short",
                ask=[
                    ('sum(ray_resources{Name="CPU", State="USED"})', "in use"),
                    ('sum(ray_resources{Name="CPU"})', "there"),
                ],
            ),
            Plan(
                title="GPUs in use",
                description="What Ray has handed out, and what there is. Idle ones are rented too.",
                unit="short",
                ask=[
                    ('sum(ray_resources{Name="GPU", State="USED"})' + NOTHING_YET, "in use"),
                    ('sum(ray_resources{Name="GPU"})' + NOTHING_YET, "there"),
                ],
            ),
            Plan(
                title="Machines",
                description="Machines that report, and those that did within a quarter of an hour and do no more.",
                unit="short",
                ask=[
                    ("count(count by (instance) (ray_node_cpu_count))", "there"),
                    (
                        "count(count by (instance) (max_over_time(ray_node_cpu_count[15m])) "
                        "unless on (instance) count by (instance) (max_over_time(ray_node_cpu_count[2m])))"
                        + NOTHING_YET,
                        "gone",
                    ),
                ],
            ),
            GPUS,
            Plan(
                title="Memory for objects",
                description="What lies in Ray's object store and what it had to put on disk.",
                unit="bytes",
                ask=[("sum by (Location) (ray_object_store_memory)" + NOTHING_YET, "{{Location}}")],
            ),
            Plan(
                title="Memory of the machines",
                description="A worker that fills it is killed, and its part is done again.",
                unit="percentunit",
                most=1,
                ask=[
                    (
                        "max by (instance) (ray_node_mem_used_host) / max by (instance) (ray_node_mem_total_host)",
                        "{{instance}}",
                    )
                ],
            ),
        ],
    ),
    "generation": (
        "mint_ray: generation",
        "The teacher's side: records, scores, preference pairs.",
        [
            Plan(
                title="Records scored",
                description="Records the teacher was asked about, those without a modality among them.",
                unit="short",
                form="number",
                ask=[(total("records_scored", "run"), "{{run}}")],
            ),
            Plan(
                title="Records scored in a second",
                description="Throughput of the teacher over all its workers.",
                unit="rowsps",
                width=16,
                ask=[(rate("records_scored", "run"), "{{run}}")],
            ),
            Plan(
                title="Time of a batch",
                description="What the teacher takes over one batch, over the whole run so far.",
                unit="s",
                ask=spread("teacher_batch_seconds"),
            ),
            Plan(
                title="Share of records without a ranking",
                description="Of the records asked about. More than a few: see RowsFailing.",
                unit="percentunit",
                most=1,
                ask=[
                    (
                        f"{total('rows_failed', 'run', SCORE)} / {total('records_scored', 'run')}{NOTHING_YET}",
                        "{{run}}",
                    )
                ],
            ),
            Plan(
                title="Why records have no ranking",
                description="By reason: images that cannot be read, what the teacher raised.",
                unit="short",
                form="bars",
                ask=[(total("rows_failed", "reason", SCORE) + NOTHING_YET, "{{reason}}")],
            ),
            Plan(
                title="Pairs written",
                description="Preference pairs of training and validation.",
                unit="short",
                form="number",
                ask=[(total("pairs_written", "run"), "{{run}}")],
            ),
            Plan(
                title="Pairs written in a second",
                description="Throughput of the tasks that draw pairs.",
                unit="rowsps",
                width=16,
                ask=[(rate("pairs_written", "run"), "{{run}}")],
            ),
            Plan(
                title="Why records have no pairs",
                description="By reason: the teacher failed on them, or ranks too few labels to reject any.",
                unit="short",
                form="bars",
                ask=[(total("rows_failed", "reason", PAIR) + NOTHING_YET, "{{reason}}")],
            ),
            Plan(
                title="Bytes written in a second",
                description="Parts of tables on their way to storage.",
                unit="Bps",
                ask=[(rate("bytes_written", "stage"), "{{stage}}")],
            ),
            GPUS,
            Plan(
                title="Objects put on disk",
                description="Ray's object store overflows: parts are too large, or too many wait for the teacher.",
                unit="bytes",
                ask=[('sum(ray_object_store_memory{Location="SPILLED"})' + NOTHING_YET, "on disk")],
            ),
        ],
    ),
    "training": (
        "mint_ray: training",
        "The student's side: losses, speed, checkpoints.",
        [
            Plan(
                title="Loss",
                description="What is minimised; of ORPO the likelihood of the chosen answer and beta times the odds.",
                unit="none",
                ask=both_splits("loss"),
            ),
            Plan(
                title="Loss on the chosen answers",
                description="Negative log-likelihood of a token. It can be compared across values of beta.",
                unit="none",
                ask=both_splits("nll_loss"),
            ),
            Plan(
                title="Log odds ratio",
                description="Log-sigmoid of the log odds of chosen against rejected, as TRL logs it. Near zero: "
                "nothing is left to learn from these pairs.",
                unit="none",
                ask=both_splits("log_odds_ratio"),
            ),
            Plan(
                title="Reward accuracy",
                description="Share of pairs whose chosen answer is likelier than the rejected one. At one within an "
                "epoch: the rejected answers are too easy.",
                unit="percentunit",
                most=1,
                ask=both_splits("rewards_accuracies"),
            ),
            Plan(
                title="Losses that are no number",
                description="How often the log had none. Anything above zero: see LossNotFinite.",
                unit="short",
                form="number",
                ask=[(total("losses_not_finite", "run, split") + NOTHING_YET, "{{run}} {{split}}")],
            ),
            Plan(
                title="Norm of the gradient",
                description="Before it is clipped. Peaks come ahead of a loss that diverges.",
                unit="none",
                ask=[(f"max by (run) ({series('grad_norm')})", "{{run}}")],
            ),
            Plan(
                title="Tokens in a second",
                description="Tokens in forward passes, padding left out, over all workers.",
                unit="short",
                ask=[(rate("tokens_trained", "run"), "{{run}}")],
            ),
            Plan(
                title="Tokens so far",
                description="Tokens in forward passes since this attempt began.",
                unit="short",
                form="number",
                ask=[(total("tokens_trained", "run"), "{{run}}")],
            ),
            Plan(
                title="Time of a step",
                description="One optimiser step with its data, on the first worker, over the whole run so far.",
                unit="s",
                ask=spread("step_seconds"),
            ),
            Plan(
                title="Time of a checkpoint",
                description="How long training stands still for one; the upload goes on behind it.",
                unit="s",
                ask=spread("checkpoint_seconds"),
            ),
            Plan(
                title="Age of the last checkpoint",
                description="What is lost if the first worker is lost now. See CheckpointLate.",
                unit="s",
                ask=[(f"max by (run) ({series('checkpoint_age_seconds')})", "{{run}}")],
            ),
            GPUS,
            Plan(
                title="Memory of the GPUs",
                description="In use. Full: make per_device_train_batch_size or row_tokens smaller.",
                unit="decmbytes",
                ask=[
                    (
                        "sum by (instance, GpuIndex) (ray_node_gram_used)" + NOTHING_YET,
                        "{{instance}} GPU {{GpuIndex}}",
                    )
                ],
            ),
        ],
    ),
    "sweep": (
        "mint_ray: sweep",
        "Trials of a study, what they cost, and where their time goes.",
        [
            Plan(
                title="Trials by state",
                description="As in the study: complete, pruned (given up early), fail, running, waiting.",
                unit="short",
                form="stack",
                width=16,
                ask=[(f"max by (run, state) ({series('sweep_trials')}){NOTHING_YET}", "{{run}} {{state}}")],
            ),
            Plan(
                title="Trials that failed",
                description="A trial that raises is tried twice, then listed with its error in the report.",
                unit="short",
                form="number",
                ask=[(f"max by (run) ({series('sweep_trials', FAILED)}){NOTHING_YET}", "{{run}}")],
            ),
            Plan(
                title="GPU-seconds of a trial",
                description="What trials cost, however they ended; zero for trials on processors alone.",
                unit="s",
                ask=spread("trial_gpu_seconds"),
            ),
            Plan(
                title="Trials that have ended",
                description="Complete, given up or failed.",
                unit="short",
                form="number",
                ask=[
                    (
                        f"sum by (run) ({series('trial_gpu_seconds', suffix='_count')}){NOTHING_YET}",
                        "{{run}}",
                    )
                ],
            ),
            Plan(
                title="Drivers at each stage",
                description="How many trials are at each stage at a time.",
                unit="short",
                form="stack",
                ask=[(rate("stage_seconds", "stage"), "{{stage}}")],
            ),
            Plan(
                title="Validation loss on the chosen answers",
                description="Of every training in the sweep: what trials are given up by.",
                unit="none",
                width=16,
                ask=[(f"max by (run) ({series('nll_loss', VALIDATION)})", "{{run}}")],
            ),
            GPUS,
        ],
    ),
}
