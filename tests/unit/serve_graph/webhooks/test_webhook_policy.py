"""Who may be called: each class of addresses, and what is refused before a job exists."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import InvalidRequest
from serve_graph.webhooks.addresses import Reach, reach
from serve_graph.webhooks.policy import WebhookPolicy, check_webhook_url

PUBLIC = ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2001:4860:4860::8888", "2606:4700::1111"]
PRIVATE = {
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "RFC 1918": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"],
    "unique local": ["fc00::1", "fd12:3456::1"],
    "CGNAT": ["100.64.0.1", "100.127.255.255"],
}
NEVER = {
    "metadata": ["169.254.169.254", "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"],
    "link-local": ["169.254.0.1", "fe80::1", "fe80::1%1"],
    "this network": ["0.0.0.0", "0.1.2.3", "::"],  # noqa: S104  # nothing is bound to it
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "4000::1", "fec0::1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "protocols": ["192.0.0.1", "192.0.0.9", "192.88.99.1", "198.18.0.1", "100::1", "5f00::1", "2001:20::1"],
    "mapped": ["::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:169.254.169.254"],
    "compatible": ["::127.0.0.1", "::8.8.8.8"],
    "6to4": ["2002:7f00:1::", "2002:808:808::1"],
    "Teredo": ["2001:0:4136:e378:8000:63bf:3fff:fdd2"],
    "NAT64 to metadata": ["64:ff9b::169.254.169.254"],
    "local NAT64": ["64:ff9b:1::1"],
}
NAT64 = ip_network("64:ff9b::/96")
INSIDE_NAT64: dict[str, Reach] = {
    "64:ff9b::8.8.8.8": "public",
    "64:ff9b::10.0.0.1": "private",
    "64:ff9b::127.0.0.1": "private",
    "64:ff9b::0.0.0.0": "never",
}


def cases(groups: dict[str, list[str]]) -> list[str]:
    return [address for addresses in groups.values() for address in addresses]


def literal(address: str) -> str:
    return f"https://[{address}]/" if ":" in address else f"https://{address}/"


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_public(address: str) -> None:
    assert reach(ip_address(address)) == "public"


@pytest.mark.parametrize("address", cases(PRIVATE))
def test_private_addresses_need_the_setting(address: str) -> None:
    assert not WebhookPolicy().allows_address(ip_address(address))
    assert WebhookPolicy(allow_private_addresses=True).allows_address(ip_address(address))


@pytest.mark.parametrize("address", cases(NEVER))
def test_special_addresses_are_refused_whatever_is_configured(address: str) -> None:
    assert not WebhookPolicy(allow_http=True, allow_private_addresses=True).allows_address(ip_address(address))


@pytest.mark.parametrize(("address", "inside"), INSIDE_NAT64.items())
def test_nat64_leads_where_the_address_inside_does(address: str, inside: Reach) -> None:
    assert reach(ip_address(address)) == inside


@given(st.ip_addresses())
def test_what_python_calls_private_is_never_public(address: object) -> None:
    parsed = ip_address(str(address))
    if not parsed.is_global or parsed.is_multicast or parsed.is_reserved:
        assert reach(parsed) != "public" or parsed in NAT64


@pytest.mark.parametrize("address", [a for a in cases(PRIVATE | NEVER) if "%" not in a])
def test_check_refuses_an_address_that_is_not_public(address: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_webhook_url(literal(address), WebhookPolicy())

    (mistake,) = caught.value.errors
    assert mistake.field == "webhook_url"
    assert address not in caught.value.detail


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8443", "api.localhost"])
def test_check_refuses_this_machines_name(host: str) -> None:
    with pytest.raises(InvalidRequest, match="private"):
        check_webhook_url(f"https://{host}/", WebhookPolicy())

    check_webhook_url(f"https://{host}/", WebhookPolicy(allow_private_addresses=True))


def test_check_refuses_http_unless_allowed() -> None:
    with pytest.raises(InvalidRequest, match="https://"):
        check_webhook_url("http://example.com/", WebhookPolicy())

    check_webhook_url("http://example.com/", WebhookPolicy(allow_http=True))


def test_check_refuses_every_url_while_the_service_has_no_secret() -> None:
    with pytest.raises(InvalidRequest, match="WAN_WEBHOOK_SECRET"):
        check_webhook_url("https://example.com/", WebhookPolicy(can_sign=False))


def test_check_refuses_a_malformed_url() -> None:
    with pytest.raises(InvalidRequest, match="absolute URL"):
        check_webhook_url("https://user@example.com/", WebhookPolicy())


@pytest.mark.parametrize("url", ["https://example.com/hook", "https://8.8.8.8/", "https://[2606:4700::1111]/"])
def test_check_lets_public_hosts_pass(url: str) -> None:
    check_webhook_url(url, WebhookPolicy())
