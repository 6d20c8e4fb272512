"""Opens the store that the settings name, with its presigner, in the process that uses it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from minio.credentials.providers import Provider

from schemas.errors import StoreUnavailable
from serve_graph.logs import log_event, log_failure
from serve_graph.settings import ConfigError, Secrets, Settings, StorageSettings
from storage.local import LocalStore
from storage.s3 import S3Store
from storage.s3_credentials import found_credentials, static_credentials
from storage.s3_options import S3Options
from storage.s3_presigner import S3Presigner
from storage.s3_setup import prepare_bucket
from storage.secret import derive, load_secret
from storage.signing import LocalPresigner
from storage.store import ObjectStore, Presigner


@dataclass(frozen=True)
class LocalFiles:
    """The local store with its presigner, whose URLs this service answers itself."""

    store: LocalStore
    presigner: LocalPresigner


@dataclass(frozen=True)
class SignedStore:
    """The store, what signs its URLs, and the key for prompt hashes. local: None for a bucket."""

    store: ObjectStore
    presigner: Presigner
    hash_secret: bytes
    local: LocalFiles | None


def open_store(settings: Settings) -> ObjectStore:
    """Open the store alone. A bucket's keys come from this process's environment. Raises StoreUnavailable."""
    if settings.storage.kind == "s3":
        return S3Store(_bucket(settings.storage), s3_credentials(Secrets()))
    return LocalStore(settings.storage.folder)


def open_signed_store(settings: Settings) -> SignedStore:
    """Open the store and what signs its URLs. The signing secret is the environment's, or lies in the local folder.

    Raises StoreUnavailable, and ValueError for a secret that is too short.
    """
    secrets = Secrets()
    folder: Path = settings.storage.folder
    secret = load_secret(secrets.signing_secret, folder)
    hash_secret = derive(secret, "prompt-hash")
    if settings.storage.kind == "s3":
        options, credentials = _bucket(settings.storage), s3_credentials(secrets)
        return SignedStore(S3Store(options, credentials), S3Presigner(options, credentials), hash_secret, local=None)
    local = LocalFiles(LocalStore(folder), LocalPresigner(settings.require_public_url(), derive(secret, "url-signing")))
    return SignedStore(local.store, local.presigner, hash_secret, local)


def prepare_store(settings: Settings) -> tuple[Settings, tuple[str, ...]]:
    """Make the bucket ready, once per start. Returns the settings with what was found out about it, and warnings.

    A local folder needs nothing. Raises UnfitStore, StoreUnavailable, StoreFull.
    """
    storage = settings.storage
    if storage.kind != "s3":
        return settings, ()
    prepared = prepare_bucket(
        _bucket(storage),
        s3_credentials(Secrets()),
        create=storage.create_bucket,
        clip_retention=storage.bucket_retention,
    )
    ready = storage.model_copy(update={"s3": prepared.options})
    return settings.model_copy(update={"storage": ready}), prepared.warnings


def prepared(settings: Settings) -> Settings:
    """As `prepare_store`, in a process that starts whatever the bucket's state: it may be there for the next request.

    Raises UnfitStore.
    """
    try:
        ready, warnings = prepare_store(settings)
    except StoreUnavailable as failure:
        log_failure("store_not_prepared", failure)
        return settings
    for warning in warnings:
        log_event("store_warning", level=logging.WARNING, message=warning)
    return ready


def s3_credentials(secrets: Secrets) -> Provider:
    """The configured keys, else what the SDK's chain finds (environment, files, role). Raises ConfigError for one."""
    if secrets.s3_access_key is None and secrets.s3_secret_key is None:
        return found_credentials()
    if secrets.s3_access_key is None or secrets.s3_secret_key is None:
        raise ConfigError("WAN_S3_ACCESS_KEY and WAN_S3_SECRET_KEY go together")
    return static_credentials(secrets.s3_access_key, secrets.s3_secret_key, secrets.s3_session_token)


def _bucket(storage: StorageSettings) -> S3Options:
    if storage.s3 is None:
        raise ConfigError("storage.s3 is not set")
    return storage.s3
