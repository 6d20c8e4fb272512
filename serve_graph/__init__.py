"""The service: the Ray Serve graph, the job service and the HTTP API around it, and the Wan engine inside it."""
