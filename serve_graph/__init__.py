"""The service: the Ray Serve graph, the job service and the HTTP API around it, and the Wan engine inside it."""

__version__ = "0.1.0"
