"""API keys: what the environment says of them, and whose a presented key is. Knows nothing of HTTP.

`WAN_API_KEYS` holds lines, separated by white space or commas, one per key:

    name:hash[:role=monitor][:max_waiting_jobs=N][:requests_per_minute=N]

The hash is the SHA-256 of the key. A key has 256 random bits, so nothing slower is needed against guessing, and the
environment holds nothing that opens the service.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from schemas.jobs import ANONYMOUS

KEY_PREFIX: Final = "wan_"
"""So that scanners for leaked secrets can find a key."""

_KEY_BYTES: Final = 32
_SEPARATORS: Final = re.compile(r"[\s,]+")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_LIMIT: Final = re.compile(r"[1-9][0-9]{0,8}")


class Role(StrEnum):
    """What a key may do."""

    GENERATE = "generate"
    """Everything."""

    MONITOR = "monitor"
    """Read health, metrics and the models; not a job, not a clip."""


@dataclass(frozen=True)
class Principal:
    """Who a request comes from: the owner of what it makes, and the limits that hold for it (None: the service's)."""

    name: str
    role: Role = Role.GENERATE
    max_waiting_jobs: int | None = None
    requests_per_minute: int | None = None


NOBODY: Final = Principal(ANONYMOUS)
"""Where no keys are asked for."""


class InvalidApiKeys(ValueError):
    """`WAN_API_KEYS` can't be read; the message names the line by its place and the mistake, and quotes nothing."""


@dataclass(frozen=True)
class _Line:
    key_hash: bytes = field(repr=False)
    principal: Principal


class ApiKeys:
    """The keys that are accepted. Raises InvalidApiKeys."""

    def __init__(self, lines: str) -> None:
        words = [word for word in _SEPARATORS.split(lines) if word]
        self._lines = [_parse(number, word) for number, word in enumerate(words, start=1)]
        for values in (
            [line.principal.name for line in self._lines],
            [line.key_hash for line in self._lines],
        ):
            if len(set(values)) != len(values):
                raise InvalidApiKeys("two lines share a name or a hash")

    def __bool__(self) -> bool:
        return bool(self._lines)

    def principal_of(self, key: str) -> Principal | None:
        """Whose key it is. Takes the same time for every key that isn't there."""
        presented = _hash(key)
        found = None
        for line in self._lines:
            if hmac.compare_digest(line.key_hash, presented):
                found = line.principal
        return found


def new_key(
    name: str,
    role: Role = Role.GENERATE,
    max_waiting_jobs: int | None = None,
    requests_per_minute: int | None = None,
) -> tuple[str, str]:
    """Make a key. Returns the key and its line for `WAN_API_KEYS`. Raises InvalidApiKeys for the name."""
    key = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    parts = [name, _hash(key).hex()]
    if role is not Role.GENERATE:
        parts.append(f"role={role}")
    limits = {"max_waiting_jobs": max_waiting_jobs, "requests_per_minute": requests_per_minute}
    parts += [f"{limit}={value}" for limit, value in limits.items() if value is not None]
    line = ":".join(parts)
    ApiKeys(line)
    return key, line


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogatepass")).digest()


def _parse(number: int, word: str) -> _Line:
    where = f"line {number} of WAN_API_KEYS"
    name, *rest = word.split(":")
    if not _NAME.fullmatch(name) or name == ANONYMOUS:
        raise InvalidApiKeys(f"{where}: a name is 1 to 64 of a-z 0-9 . _ - and not {ANONYMOUS!r}")
    if not rest or not _HASH.fullmatch(rest[0]):
        raise InvalidApiKeys(f"{where}: after the name comes a SHA-256 in 64 hex digits; `wan-serve key new` prints it")
    return _Line(bytes.fromhex(rest[0]), _principal(where, name, rest[1:]))


def _principal(where: str, name: str, options: Sequence[str]) -> Principal:
    given = dict(option.partition("=")[::2] for option in options)
    if len(given) != len(options) or not given.keys() <= {"role", "max_waiting_jobs", "requests_per_minute"}:
        raise InvalidApiKeys(f"{where}: the options are role, max_waiting_jobs and requests_per_minute, each once")
    role = given.pop("role", Role.GENERATE)
    if role not in list(Role):
        raise InvalidApiKeys(f"{where}: a role is one of {', '.join(Role)}")
    for limit, value in given.items():
        if not _LIMIT.fullmatch(value):
            raise InvalidApiKeys(f"{where}: {limit} is a whole number from 1")
    return Principal(name, Role(role), **{limit: int(value) for limit, value in given.items()})
