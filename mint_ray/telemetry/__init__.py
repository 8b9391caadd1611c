"""Log file, progress lines and Prometheus metrics of a run."""

from mint_ray.telemetry.metrics import METRICS, Metric, heartbeat, record_failed_rows, record_metric
from mint_ray.telemetry.progress import Progress, configure_logging

__all__ = ["METRICS", "Metric", "Progress", "configure_logging", "heartbeat", "record_failed_rows", "record_metric"]
