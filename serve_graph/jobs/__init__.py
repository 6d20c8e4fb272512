"""The job service: admission, the record's life, ownership, progress, cancellation. Knows no Ray, HTTP or models."""

from serve_graph.jobs.limits import Patiences, QueueLimits
from serve_graph.jobs.service import JobService
from serve_graph.jobs.worker import Worker

__all__ = ["JobService", "Patiences", "QueueLimits", "Worker"]
