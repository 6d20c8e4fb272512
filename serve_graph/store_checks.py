"""`wan-serve doctor` on the store and its clock. Tries conditional writes on objects of its own; keeps none of them."""

import tempfile
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

from schemas.errors import WanError
from serve_graph.findings import Check, Mark
from serve_graph.server import ServeConfig
from serve_graph.settings import ConfigError, Secrets, Settings
from serve_graph.stores import s3_credentials
from storage.local import LocalStore
from storage.s3_client import S3Client
from storage.s3_errors import BucketMissing
from storage.s3_options import S3Options
from storage.s3_probe import UnfitStore, probe
from storage.store import PreconditionFailed, StoreError

MAX_SKEW_S: Final = 60.0
"""S3 refuses signatures that are 15 minutes off; a signed URL's last minutes suffer before."""

_EARLIEST: Final = 1_763_769_600.0
"""2025-11-22: a clock behind this is not set."""


def store_checks(config: ServeConfig) -> Iterator[Check]:
    """Whether the store can hold the service's jobs."""
    settings = config.settings
    try:
        if settings.storage.s3 is not None and settings.storage.kind == "s3":
            yield from _bucket(settings, settings.storage.s3)
        else:
            yield from _folder(settings.storage.folder)
    except ConfigError as error:
        yield Check("store", Mark.FAIL, str(error), "correct the environment")
    except UnfitStore as error:
        yield Check("store", Mark.FAIL, str(error))
    except (StoreError, WanError) as error:
        yield Check("store", Mark.FAIL, str(error), "see that it runs, and that the endpoint and the keys are right")


def _folder(folder: Path) -> Iterator[Check]:
    """Tries a store of its own on the same file system."""
    try:
        with tempfile.TemporaryDirectory(prefix=".wan-doctor-", dir=existing(folder)) as trial:
            skew_s = time.time() - Path(trial).stat().st_mtime
            store = LocalStore(Path(trial) / "store")
            first = store.put("jobs/probe.json", b"1", if_none_match=True).etag
            store.put("jobs/probe.json", b"2", if_match=first)
            for condition in ({"if_none_match": True}, {"if_match": first}):
                try:
                    store.put("jobs/probe.json", b"3", **condition)
                except PreconditionFailed:
                    continue
                yield Check("store", Mark.FAIL, "the file system breaks conditional writes", "use a local disk")
                return
    except OSError as error:
        advice = "let this user write there, or set storage.folder"
        yield Check("store", Mark.FAIL, f"{folder} can't be written to ({error.strerror})", advice)
        return
    yield Check("store", Mark.OK, f"{folder}, with conditional writes")
    yield clock_check("the file system's", skew_s)


def _bucket(settings: Settings, options: S3Options) -> Iterator[Check]:
    credentials = s3_credentials(Secrets())
    client = S3Client(options, credentials)
    try:
        answer = client.send("HEAD")
    except BucketMissing:
        if settings.storage.create_bucket:
            yield Check("store", Mark.WARN, f"there is no bucket {options.bucket} yet", "the first start makes it")
        else:
            advice = "make it, correct its name, or set storage.create_bucket"
            yield Check("store", Mark.FAIL, f"there is no bucket {options.bucket}", advice)
        return
    _, warnings = probe(options, credentials)
    yield Check("store", Mark.OK, f"bucket {options.bucket} at {options.endpoint}, with conditional writes")
    for warning in warnings:
        found, _, advice = warning.partition("; ")
        yield Check("store", Mark.WARN, found, advice)
    date = answer.headers.get("date")
    if date is not None:
        yield clock_check("the store's", time.time() - parsedate_to_datetime(date).timestamp())


def clock_check(whose: str, skew_s: float) -> Check:
    """Whether this machine's clock agrees with another. skew_s: how far ahead it is."""
    if time.time() < _EARLIEST:
        return Check("clock", Mark.FAIL, "it is not set", "set it: signed URLs expire by it")
    if abs(skew_s) > MAX_SKEW_S:
        return Check("clock", Mark.FAIL, f"{abs(skew_s):.0f} s off {whose}", "synchronise both (NTP)")
    return Check("clock", Mark.OK, f"within {max(1, round(abs(skew_s)))} s of {whose}")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())
