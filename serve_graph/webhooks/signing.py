"""Signs webhooks as Standard Webhooks 1.0 wants it, with each of the service's secrets. Sends nothing.

`WAN_WEBHOOK_SECRET` holds one secret, or several separated by white space while they are rotated: receivers that know
the old one and receivers that know the new one both find a signature that is theirs.
"""

import base64
from datetime import UTC, datetime
from typing import Final

from standardwebhooks import Webhook

_PREFIX: Final = "whsec_"
MIN_SECRET_BYTES: Final = 24
MAX_SECRET_BYTES: Final = 64
"""Source: Standard Webhooks 1.0, "Signature scheme", symmetric."""


class InvalidWebhookSecret(ValueError):
    """`WAN_WEBHOOK_SECRET` can't be used; the message names the secret by its place and quotes nothing."""


class WebhookSigner:
    """Makes the three headers. Keeps its secrets out of its repr."""

    def __init__(self, secrets: str) -> None:
        """secrets: as the environment has them. Raises InvalidWebhookSecret, also where there is none."""
        given = secrets.split()
        if not given:
            raise InvalidWebhookSecret("WAN_WEBHOOK_SECRET is empty")
        self._keys = tuple(Webhook(_key(number, text)) for number, text in enumerate(given, start=1))

    def headers(self, webhook_id: str, at: datetime, body: str) -> dict[str, str]:
        """`webhook-id`, `webhook-timestamp` and `webhook-signature` of a body that is sent now.

        at: aware; receivers refuse what is minutes old, so each attempt is signed anew.
        """
        at = at.astimezone(UTC)  # the library takes any time's digits for UTC
        signatures = [key.sign(webhook_id, at, body) for key in self._keys]
        return {
            "webhook-id": webhook_id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": " ".join(signatures),
        }


def _key(number: int, text: str) -> bytes:
    """The library would skip characters that are not base64's, and take a secret of any length."""
    where = f"secret {number} of WAN_WEBHOOK_SECRET"
    if not text.startswith(_PREFIX):
        raise InvalidWebhookSecret(f"{where} does not begin with {_PREFIX}")
    encoded = text.removeprefix(_PREFIX).rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:  # binascii.Error is one, and so is text beyond ASCII
        raise InvalidWebhookSecret(f"{where} is not base64 behind {_PREFIX}") from None
    if not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise InvalidWebhookSecret(f"{where} must have {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, as base64")
    return key
