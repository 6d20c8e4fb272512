"""Whom this service may send webhooks to, by its settings. Resolves nothing."""

from dataclasses import dataclass

from schemas.errors import FieldError, InvalidRequest
from schemas.webhook_url import Address, Scheme, split_webhook_url
from serve_graph.webhooks.addresses import reach

_FIELD = "webhook_url"


@dataclass(frozen=True)
class WebhookPolicy:
    """What is allowed beyond https to public addresses; the defaults allow nothing more.

    can_sign: whether the service has a secret. Nothing is sent unsigned, since its receiver could not tell it from
    what anybody else sends.
    """

    allow_http: bool = False
    allow_private_addresses: bool = False
    can_sign: bool = True

    def allows_scheme(self, scheme: Scheme) -> bool:
        return scheme == "https" or self.allow_http

    def allows_address(self, address: Address) -> bool:
        """Link-local, metadata, multicast and the like stay refused, whatever is configured."""
        reached = reach(address)
        return reached == "public" or (reached == "private" and self.allow_private_addresses)


def check_webhook_url(url: str, policy: WebhookPolicy) -> None:
    """Refuse, before a job exists, what could never be delivered; a name's addresses are checked when it is called.

    Raises InvalidRequest. All of it is a 422: the same request without the field, or with another URL, is served.
    """
    refusal = _refusal(url, policy)
    if refusal is not None:
        raise InvalidRequest([refusal])


def _refusal(url: str, policy: WebhookPolicy) -> FieldError | None:
    if not policy.can_sign:
        return FieldError(field=_FIELD, message="this service sends no webhooks: it has no WAN_WEBHOOK_SECRET")
    try:
        parts = split_webhook_url(url)
    except ValueError as error:
        return FieldError(field=_FIELD, message=str(error))
    if not policy.allows_scheme(parts.scheme):
        return FieldError(field=_FIELD, message="must begin with https://", legal="an https URL")
    if not _may_be_allowed(parts.host, policy):
        return FieldError(field=_FIELD, message="must not name a private or special address", legal="a public host")
    return None


def _may_be_allowed(host: str | Address, policy: WebhookPolicy) -> bool:
    if not isinstance(host, str):
        return policy.allows_address(host)
    is_this_machine = host == "localhost" or host.endswith(".localhost")  # RFC 6761, section 6.3
    return policy.allow_private_addresses or not is_this_machine
