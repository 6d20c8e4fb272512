"""The spelling of a webhook's URL: what any service could connect to. Whether ours may is for its policy."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, StringConstraints, WithJsonSchema

MAX_WEBHOOK_URL_CHARS: Final = 2_048

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = rf"{_LABEL}(?:\.{_LABEL})*"
_TARGET = r"[/?][A-Za-z0-9._~!$&'()*+,;=:@/?%-]*"
_PATTERN = rf"^(https?)://({_NAME}|\[[0-9A-Fa-f:.]+\])(:[0-9]{{1,5}})?({_TARGET})?$"
"""RFC 3986 without user information and fragment, in ASCII: no parser reads another host in it than the next one."""

_ENDS_IN_NUMBER: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9A-Fa-f]*)")
"""What URL parsers take for an IPv4 address, `2130706433` and `0x7f.1` among it. Source: WHATWG's URL standard, 3.5."""

_MAX_HOST_CHARS: Final = 253

Scheme = Literal["http", "https"]
Address = IPv4Address | IPv6Address


@dataclass(frozen=True)
class WebhookUrlParts:
    """A URL taken apart. host: a name in lower case, or an address; authority: for `Host`; target: path and query."""

    scheme: Scheme
    host: str | Address
    port: int
    authority: str
    target: str


def split_webhook_url(url: str) -> WebhookUrlParts:
    """Take a URL apart. Raises ValueError with what is legal, and without the URL."""
    found = re.fullmatch(_PATTERN, url)
    if found is None:
        raise ValueError(
            "must be an absolute URL such as https://example.com/hook, in ASCII and percent-encoded, with no user name "
            "and no fragment"
        )
    host, port, target = found[2], found[3] or "", found[4] or "/"
    scheme: Scheme = "https" if found[1] == "https" else "http"
    number = int(port[1:] or (443 if scheme == "https" else 80))
    if not 0 < number < 65_536:
        raise ValueError("must have a port between 1 and 65535")
    return WebhookUrlParts(scheme, _host(host), number, host + port, "/" * (target[0] == "?") + target)


def _host(text: str) -> str | Address:
    try:
        if text.startswith("["):
            return IPv6Address(text[1:-1])
        if _ENDS_IN_NUMBER.fullmatch(text):
            return IPv4Address(text)
    except ValueError:
        raise ValueError(
            "must spell an address as four decimal numbers or as an IPv6 address in brackets; a name's last part is no "
            "number"
        ) from None
    if len(text) > _MAX_HOST_CHARS:
        raise ValueError(f"must have a host of at most {_MAX_HOST_CHARS} characters")
    return text.lower()


def _checked(url: str) -> str:
    split_webhook_url(url)
    return url


WebhookUrl = Annotated[
    str,
    Field(strict=True, max_length=MAX_WEBHOOK_URL_CHARS),
    StringConstraints(strip_whitespace=False),
    AfterValidator(_checked),
    WithJsonSchema({"type": "string", "maxLength": MAX_WEBHOOK_URL_CHARS, "pattern": _PATTERN}),
]
"""White space around it is refused and not trimmed, so the document's pattern says exactly what is accepted, but for
ports and addresses."""
