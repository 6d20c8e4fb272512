"""A typed client for the HTTP API. Loads neither Ray nor a model library."""

from serve_graph.client.errors import ApiProblem, ClientError, ClipDamaged, ServiceUnreachable, UnexpectedAnswer
from serve_graph.client.wan_client import WanClient

__all__ = ["ApiProblem", "ClientError", "ClipDamaged", "ServiceUnreachable", "UnexpectedAnswer", "WanClient"]
