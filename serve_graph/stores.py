"""Opens the store that the settings name, with its presigner, in the process that uses it."""

from dataclasses import dataclass

from serve_graph.settings import Secrets, Settings
from storage.local import LocalStore
from storage.secret import derive, load_secret
from storage.signing import LocalPresigner


@dataclass(frozen=True)
class OpenStore:
    """The store, what signs its URLs, and the key for prompt hashes."""

    store: LocalStore
    presigner: LocalPresigner
    hash_secret: bytes


def open_store(settings: Settings) -> OpenStore:
    """Open the local folder. The secret comes from this process's environment, or from beside the data.

    Raises StoreUnavailable, and ValueError for a secret that is too short.
    """
    store = LocalStore(settings.storage.folder)
    secret = load_secret(Secrets().signing_secret, settings.storage.folder)
    return OpenStore(
        store=store,
        presigner=LocalPresigner(settings.require_public_url(), derive(secret, "url-signing")),
        hash_secret=derive(secret, "prompt-hash"),
    )
