"""The body of `POST /batches`, JSON or JSON Lines, as requests. Parses a little at a time: the loop is others', too."""

import asyncio
import codecs
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from pydantic import ValidationError

from schemas.batches import MAX_BATCH_REQUESTS
from schemas.errors import FieldError, InvalidRequest
from schemas.model_profile import ModelProfile
from schemas.requests import GenerateRequest
from serve_graph.api.problems import field_errors
from serve_graph.jobs.batch_intake import Breath, Sent, too_many

NDJSON: Final = "application/x-ndjson"
MAX_REQUEST_BYTES: Final = 64 * 1024
"""Of one request of a batch, as a single one's body has by default."""

SILENCE_S: Final = 30.0
"""A client that sends nothing for so long is not waited for."""

_EITHER: Final = (
    (frozenset({"duration"}), frozenset({"num_frames"})),
    (frozenset({"resolution", "aspect_ratio"}), frozenset({"width", "height"})),
)
"""Ways to say the same thing: what a request says in one way, the defaults don't say in the other."""

_BLANK: Final = re.compile(r"[ \t\n\r]*")
_WINDOWS: Final = (2 * 1024, MAX_REQUEST_BYTES)
_NOT_JSON: Final = "is not valid JSON"


@dataclass(frozen=True)
class BatchBody:
    """What was sent: the requests one by one, and what holds for all of them."""

    requests: AsyncIterator[Sent]
    webhook_url: str | None = None


async def batch_body(stream: AsyncIterator[bytes], media_type: str, profile: ModelProfile) -> BatchBody:
    """Read a body. Raises InvalidRequest for what is wrong with the whole of it; `requests` may raise it, too."""
    awake = _awake(stream)
    if media_type == NDJSON:
        return BatchBody(_sent(_raw_lines(awake), {}, profile))
    if media_type not in ("", "application/json"):
        _refuse_all(f"must be sent with Content-Type: application/json or {NDJSON}")
    return await _json_body(awake, profile)


async def _awake(stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    while True:
        try:
            async with asyncio.timeout(SILENCE_S):
                chunk = await anext(stream, None)
        except TimeoutError:
            _refuse_all(f"stopped coming in for {SILENCE_S:g} s")
        if chunk is None:
            return
        yield chunk


async def _raw_lines(stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes | None, None]:
    """The lines that are not blank; None for one that is too long."""
    pending, overlong = bytearray(), False
    async for chunk in stream:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            pending += end
            if overlong or len(pending) > MAX_REQUEST_BYTES:
                yield None
            elif pending.strip():
                yield bytes(pending)
            pending, overlong = bytearray(), False
        pending += rest
        if len(pending) > MAX_REQUEST_BYTES:
            pending, overlong = bytearray(), True
    if overlong:
        yield None
    elif pending.strip():
        yield bytes(pending)


async def _json_body(stream: AsyncIterator[bytes], profile: ModelProfile) -> BatchBody:
    text = await _text(stream)
    breath, scanner = Breath(), _Scanner(text)
    fields: dict[str, Any] = {}
    raw: list[Any] | None = None
    for name in scanner.members():
        if name == "requests":
            raw = []
            for value in scanner.elements():
                raw.append(value)
                if len(raw) > MAX_BATCH_REQUESTS:
                    raise too_many()
                await breath.take()
        else:
            fields[name] = scanner.value()
    scanner.end()
    if raw is None:
        raise InvalidRequest([FieldError(field="requests", message="is missing")])
    defaults = fields.pop("defaults", {})
    webhook_url = fields.pop("webhook_url", None)
    unknown = [FieldError(field=name[:64], message="is not a field of this request") for name in list(fields)[:32]]
    errors = [*unknown, *_errors_of_defaults(defaults, profile), *_errors_of_webhook(webhook_url, profile)]
    if errors:
        raise InvalidRequest(errors)
    return BatchBody(_sent(_each(raw), defaults, profile), webhook_url)


async def _text(stream: AsyncIterator[bytes]) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        parts = [decoder.decode(chunk) async for chunk in stream]
        return "".join((*parts, decoder.decode(b"", final=True)))
    except UnicodeDecodeError:
        _refuse_all(_NOT_JSON)


async def _each(raw: list[Any]) -> AsyncGenerator[Any, None]:
    for value in raw:
        yield value


async def _sent(
    raw: AsyncIterator[Any], defaults: Mapping[str, Any], profile: ModelProfile
) -> AsyncGenerator[Sent, None]:
    """Requests, or what is wrong with them. raw: parsed values, or lines of JSON."""
    async for value in raw:
        yield _request(value, defaults, profile)


def _request(value: Any, defaults: Mapping[str, Any], profile: ModelProfile) -> Sent:
    if value is None:
        return [FieldError(field="body", message=f"holds more than {MAX_REQUEST_BYTES} bytes, or null")]
    if isinstance(value, bytes):
        try:
            value = _DECODER.decode(value.decode())
        except (ValueError, RecursionError):
            return [FieldError(field="body", message=_NOT_JSON)]
    if not isinstance(value, dict):
        return [FieldError(field="body", message="must be a JSON object")]
    try:
        return GenerateRequest.model_validate(_over(defaults, value))
    except ValidationError as error:
        return field_errors(error.errors(include_url=False, include_input=False), profile)


def _over(defaults: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """A request with the defaults under it."""
    if not defaults:
        return dict(request)
    hidden: set[str] = set()
    for one, other in _EITHER:
        hidden |= other if one & request.keys() else set()
        hidden |= one if other & request.keys() else set()
    return {**{name: value for name, value in defaults.items() if name not in hidden}, **request}


def _errors_of_defaults(defaults: Any, profile: ModelProfile) -> list[FieldError]:
    if not isinstance(defaults, dict):
        return [FieldError(field="defaults", message="must be a JSON object")]
    if "prompt" in defaults:
        return [FieldError(field="defaults.prompt", message="belongs into each request")]
    found = _request({"prompt": "a red circle", **defaults}, {}, profile)
    if isinstance(found, GenerateRequest):
        return []
    return [error.model_copy(update={"field": f"defaults.{error.field}".removesuffix(".body")}) for error in found]


def _errors_of_webhook(webhook_url: Any, profile: ModelProfile) -> list[FieldError]:
    found = _request({"prompt": "a red circle", "webhook_url": webhook_url}, {}, profile)
    return [] if isinstance(found, GenerateRequest) else list(found)


class _Scanner:
    """Walks over a JSON object value by value. Raises InvalidRequest for a text that is none."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def members(self) -> Iterator[str]:
        """The names of the object's members; the caller takes each value."""
        if not self._skip("{"):
            _refuse_all("must be a JSON object")
        if self._skip("}"):
            return
        while True:
            name = self.value()
            if not isinstance(name, str) or not self._skip(":"):
                _refuse_all(_NOT_JSON)
            yield name
            if not self._skip(","):
                break
        if not self._skip("}"):
            _refuse_all(_NOT_JSON)

    def elements(self) -> Iterator[Any]:
        """The values of an array."""
        if not self._skip("["):
            raise InvalidRequest([FieldError(field="requests", message="must be an array")])
        if self._skip("]"):
            return
        while True:
            yield self.value()
            if not self._skip(","):
                break
        if not self._skip("]"):
            _refuse_all(_NOT_JSON)

    def value(self) -> Any:
        """The next value, of at most `MAX_REQUEST_BYTES` characters."""
        self._skip("")
        for window in _WINDOWS:
            try:
                value, used = _DECODER.raw_decode(self._text[self._at : self._at + window])
            except (ValueError, RecursionError):
                continue
            self._at += used
            return value
        cut = len(self._text) - self._at > MAX_REQUEST_BYTES
        _refuse_all(_NOT_JSON + (f", or has a request of more than {MAX_REQUEST_BYTES} characters" if cut else ""))

    def end(self) -> None:
        """Nothing may follow."""
        self._skip("")
        if self._at != len(self._text):
            _refuse_all(_NOT_JSON)

    def _skip(self, character: str) -> bool:
        """Skip white space, and the character where it is the next one."""
        blank = _BLANK.match(self._text, self._at)
        self._at = self._at if blank is None else blank.end()
        found = self._text.startswith(character, self._at)
        self._at += len(character) if found else 0
        return found


def _refuse_all(message: str) -> NoReturn:
    raise InvalidRequest([FieldError(field="body", message=message)])


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)
