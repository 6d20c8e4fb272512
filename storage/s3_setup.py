"""What happens to a bucket when the service starts: it is made, probed, and told how long clips are kept."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from minio.credentials.providers import Provider

from schemas.errors import StoreUnavailable
from storage.s3_client import S3Client
from storage.s3_errors import BucketMissing
from storage.s3_lifecycle import ensure_rule
from storage.s3_options import S3Options
from storage.s3_probe import UnfitStore, probe
from storage.store import PreconditionFailed


@dataclass(frozen=True)
class PreparedBucket:
    """A bucket that the service can use.

    options: the given ones, completed by what the probe found out; open `S3Store` with these.
    warnings: sentences for the operator; nothing in them keeps the service from running.
    """

    options: S3Options
    warnings: tuple[str, ...]


def prepare_bucket(
    options: S3Options, credentials: Provider, *, create: bool = False, clip_retention: timedelta | None = None
) -> PreparedBucket:
    """Make the bucket ready; any number of processes may do so at once, again at each start.

    Args:
        options: where the bucket is.
        credentials: those that the service runs with.
        create: make the bucket when it is missing.
        clip_retention: after which the server deletes clips, in whole days; None leaves its rules alone.

    Raises:
        UnfitStore: the service can't run here; the message says why and what to do.
        StoreUnavailable, StoreFull: not now.
    """
    client = S3Client(options, credentials)
    _find_bucket(client, options, create)
    ready, warnings = probe(options, credentials)
    if clip_retention is not None:
        warnings += _retention_warnings(client, options, clip_retention)
    return PreparedBucket(ready, warnings)


def _find_bucket(client: S3Client, options: S3Options, create: bool) -> None:
    try:
        client.send("HEAD")
    except BucketMissing as missing:
        if not create:
            raise UnfitStore(
                "the bucket does not exist: make it, correct its name, or let the service make it"
            ) from missing
        with suppress(PreconditionFailed):  # another process was faster
            client.call(lambda sdk: sdk.make_bucket(options.bucket))


def _retention_warnings(client: S3Client, options: S3Options, retention: timedelta) -> tuple[str, ...]:
    try:
        ensure_rule(client, options, retention)
    except StoreUnavailable as error:
        return (
            f"clips are kept for ever: the bucket's lifecycle rule could not be set ({error.detail}); set one that "
            "expires what lies below `clips/` and aborts incomplete multipart uploads, or allow the service to "
            "(s3:GetLifecycleConfiguration, s3:PutLifecycleConfiguration)",
        )
    return ()
