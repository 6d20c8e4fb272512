"""The spelling of `webhook_url`, and the document's pattern for it."""

from ipaddress import IPv4Address, IPv6Address
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.requests import GenerateRequest
from schemas.webhook_url import MAX_WEBHOOK_URL_CHARS, WebhookUrlParts, split_webhook_url

BASE = "https://example.com/"
SCHEMA = next(
    choice
    for choice in GenerateRequest.model_json_schema()["properties"]["webhook_url"]["anyOf"]
    if "pattern" in choice
)


def accepts(url: Any) -> bool:
    try:
        GenerateRequest.model_validate({"prompt": "a red circle", "webhook_url": url})
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    "url",
    [
        *("https://example.com", "http://example.com", "https://example.com:8443/hook?a=b&c=%20", "https://a_b.c-d/"),
        *("https://example.com?a=b", "https://8.8.8.8/", "https://[2001:4860:4860::8888]:8443/x", "https://xn--4ca.de"),
        BASE + "x" * (MAX_WEBHOOK_URL_CHARS - len(BASE)),
        "https://" + "a" * 63 + ".example/",
        None,
    ],
)
def test_request_accepts_a_webhook_url(url: str | None) -> None:
    assert accepts(url)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "example.com/hook",
            "/hook",
            "//example.com/",
            "https:example.com",
            "https:///x",
            "https://",
            "https://:80/",
        ),
        *("ftp://example.com/", "file:///etc/passwd", "HTTPS://example.com/", "javascript:alert(1)"),
        *("https://user@example.com/", "https://user:word@example.com/", "https://example.com@evil.example/"),
        *("https://example.com/#part", "https://example.com#part", "https://example.com\\@evil.example/"),
        *(" https://example.com/", "https://example.com/ ", "https://example.com/\n", "https://exa mple.com/"),
        *("https://example.com/a b", "https://example.com/\r\nX: y", "https://example.com/\x00", "https://e\tx.com/"),
        *("https://exämple.com/", "https://example.com/ä", "https://①②⑦.0.0.1/", "https://example\u3002com/"),
        *("https://example..com/", "https://.example.com/", "https://example.com./", "https://-a.com/", "https://a-/"),
        *("https://" + "a" * 64 + ".com/", "https://" + ".".join(["a" * 60] * 5) + "/"),
        *("https://example.com:/", "https://example.com:0/", "https://example.com:65536/", "https://example.com:x/"),
        BASE + "x" * (MAX_WEBHOOK_URL_CHARS - len(BASE) + 1),
        *("https://[::1/", "https://::1/", "https://[::g]/", "https://[fe80::1%25eth0]/", "https://[1.2.3.4]/"),
    ],
)
def test_request_refuses_what_is_no_webhook_url(url: str) -> None:
    assert not accepts(url)


@pytest.mark.parametrize("url", [5, True, ["https://example.com"], {}, b"https://example.com"])
def test_request_refuses_what_is_no_text(url: object) -> None:
    assert not accepts(url)


@pytest.mark.parametrize(
    "host",
    [
        *("2130706433", "0x7f000001", "0x7f.1", "0X7F.0.0.1", "017700000001", "0177.0.0.1", "127.1", "127.0.1", "0"),
        *("127.0.0.01", "1.2.3.4.5", "256.0.0.1", "example.0x1", "example.1", "0x"),
    ],
)
def test_request_refuses_other_spellings_of_ipv4(host: str) -> None:
    with pytest.raises(ValueError, match="four decimal numbers"):
        split_webhook_url(f"http://{host}/")
    assert not accepts(f"http://{host}/")


def test_split_takes_a_url_apart() -> None:
    assert split_webhook_url("https://Example.com:8443?a=b") == WebhookUrlParts(
        "https", "example.com", 8443, "Example.com:8443", "/?a=b"
    )
    assert split_webhook_url("http://10.0.0.1").host == IPv4Address("10.0.0.1")
    assert split_webhook_url("http://[::1]/").host == IPv6Address("::1")
    assert (split_webhook_url("http://a.b").port, split_webhook_url("https://a.b").port) == (80, 443)


def test_refusal_quotes_nothing_of_the_url() -> None:
    with pytest.raises(ValueError, match="absolute URL") as caught:
        split_webhook_url("https://user:hunter2@host.example/")
    assert "hunter2" not in str(caught.value)
    assert "host.example" not in str(caught.value)


@given(st.one_of(st.text(), st.from_regex(SCHEMA["pattern"]), st.from_regex(r"^https?://[ -~]{0,30}$")))
def test_whatever_is_accepted_is_what_the_document_says(url: str) -> None:
    if accepts(url):
        jsonschema.validate(url, SCHEMA)
