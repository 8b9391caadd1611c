"""What a run tells of itself while it works: its log file, its progress lines, and numbers for Prometheus."""

from mint_ray.telemetry.measures import MEASURES, Measure, measure, measure_failed, running
from mint_ray.telemetry.progress import Progress, log_to

__all__ = ["MEASURES", "Measure", "Progress", "log_to", "measure", "measure_failed", "running"]
