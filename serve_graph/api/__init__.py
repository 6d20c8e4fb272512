"""The HTTP API: a FastAPI application over the job service. Knows nothing of Ray, torch or the model."""
