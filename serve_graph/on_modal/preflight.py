"""What `make deploy` looks at before `modal deploy`: options, memory, Secrets and weights. One line per mistake."""

import sys

import modal
from modal.exception import Error as ModalError
from modal.exception import NotFoundError

from schemas.errors import ModelNotReady
from serve_graph.on_modal.options import check_settings, fetched_weights, profile_of, read_options
from serve_graph.on_modal.weights import INVENTORY, read_inventory
from serve_graph.service_plan import check_start
from serve_graph.settings import ConfigError


def check() -> None:
    """Raises ConfigError, ModelNotReady."""
    options = read_options()
    check_start(check_settings(options), f"WAN_GPU={options.gpu}", options.card.memory_bytes)
    for name, keys in options.secrets.items():
        try:
            modal.Secret.from_name(name, required_keys=keys).hydrate()
        except ModalError as error:
            raise ConfigError(f"the Secret {name} needs {', '.join(keys)}: {error}") from error
    profile = profile_of(options)
    if fetched_weights(options) is None:
        return
    again = "run `modal run -m serve_graph.modal_app::download_weights`"
    volume = modal.Volume.from_name("wan-weights")
    try:
        inventory = read_inventory(b"".join(volume.read_file(f"{profile.name}/{INVENTORY}")))
        there = {entry.path: entry.size for entry in volume.listdir(profile.name, recursive=True)}
    except (NotFoundError, FileNotFoundError) as error:
        raise ModelNotReady(f"the Volume wan-weights holds no whole {profile.name}: {again}") from error
    for file in inventory.files:
        if there.get(f"{profile.name}/{file.path}") != file.size_bytes:
            raise ModelNotReady(f"{file.path} of {profile.name} in the Volume wan-weights is not whole: {again}")


def main() -> None:
    """Exits with 1 where something is wrong."""
    try:
        check()
    except (ConfigError, ModelNotReady, ModalError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
