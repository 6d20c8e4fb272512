"""The Serve application: the only place where deployments are bound to each other."""

from functools import partial
from typing import Any, Final

from ray import serve
from ray.serve import Application

from serve_graph.generator import Generator, generator_options
from serve_graph.ingress import Ingress, ingress_options
from serve_graph.preprocessor import Preprocessor, preprocessor_options
from serve_graph.settings import check_cluster, read_settings
from serve_graph.stores import prepare_store

STOP_POLL_S: Final = 0.1
"""How often a replica that stops looks whether its last request has ended. Serve's own 2 s is how long a stop takes."""


def build_app(args: dict[str, Any]) -> Application:
    """The application builder that config files name: `import_path: serve_graph.app:build_app`.

    args: see `settings.Settings`. Raises ConfigError, UnfitStore, StoreUnavailable.
    """
    settings = read_settings(args)
    settings.require_public_url()
    check_cluster(settings)
    if not settings.queue.by_call:  # else its deployments open the store when they are woken
        settings, _ = prepare_store(settings)  # `wan-serve serve` has shown the warnings; a cluster's start is its own
    deployment = partial(serve.deployment, graceful_shutdown_wait_loop_s=STOP_POLL_S)
    preprocessor = deployment(**preprocessor_options(settings))(Preprocessor).bind(settings)
    generator = deployment(**generator_options(settings))(Generator).bind(settings)
    return deployment(**ingress_options(settings))(Ingress).bind(settings, preprocessor, generator)
