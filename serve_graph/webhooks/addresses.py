"""Which addresses a webhook may reach. Knows nothing of names, URLs or settings.

An own table, since `ipaddress.is_global` holds for multicast, for Azure's metadata host, and (in Python 3.11.7) for
`::127.0.0.1`, `2002:7f00:1::` and `64:ff9b::127.0.0.1`, all of which may lead to 127.0.0.1; other releases of Python
differ. What is in no list here and not global is refused as well.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Literal

from schemas.webhook_url import Address

Reach = Literal["public", "private", "never"]
"""private: somebody's own network or this machine; never: no receiver of webhooks has such an address."""

_PRIVATE: Final = tuple(
    ip_network(text)
    for text in (
        *("127.0.0.0/8", "::1/128"),  # this machine
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"),  # RFC 1918, RFC 4193
        "100.64.0.0/10",  # carriers' NAT, RFC 6598; overlay networks use it too
    )
)
_NEVER: Final = tuple(
    ip_network(text)
    for text in (
        *("0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4"),  # this network, link-local, multicast, reserved
        *("192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15"),  # IETF protocols, 6to4 relays, benchmarks
        *("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"),  # documentation, RFC 5737
        # Cloud metadata outside of link-local: AWS, Google (IPv6), Alibaba, Azure's host, Oracle.
        *("fd00:ec2::254/128", "fd20:ce::254/128", "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32"),
        *("2001::/23", "2002::/16"),  # IETF protocols with Teredo and ORCHID, 6to4: IPv4 inside, no receivers
        *("2001:db8::/32", "3fff::/20", "5f00::/16"),  # documentation, segment routing
    )
)
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
"""All that IANA assigns to networks. Outside of it, unless private: `::`, mapped (::ffff:0:0/96) and compatible IPv4,
link-local, site-local, multicast."""

_NAT64: Final = IPv6Network("64:ff9b::/96")
"""What DNS64 answers for a name that has IPv4 addresses only (RFC 6052): where it leads depends on what is inside."""


def parse_address(text: str) -> Address:
    """An address as getaddrinfo writes it. Raises ValueError."""
    return ip_address(text)


def reach(address: Address) -> Reach:
    """Who can be reached at an address."""
    if isinstance(address, IPv6Address) and address in _NAT64:
        return reach(IPv4Address(int(address) & 0xFFFF_FFFF))
    if _is_in(address, _NEVER):
        return "never"
    if _is_in(address, _PRIVATE):
        return "private"
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return "never"
    return "public" if address.is_global else "never"


def _is_in(address: Address, networks: tuple[IPv4Network | IPv6Network, ...]) -> bool:
    return any(address in network for network in networks)
