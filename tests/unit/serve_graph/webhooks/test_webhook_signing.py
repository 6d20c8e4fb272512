"""Signatures that the reference library verifies, and secrets that are refused."""

import base64
from datetime import UTC, datetime, timedelta, timezone

import pytest
from standardwebhooks import Webhook

from serve_graph.webhooks.signing import InvalidWebhookSecret, WebhookSigner

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def whsec(num_bytes: int) -> str:
    return "whsec_" + base64.b64encode(b"k" * num_bytes).decode()


def test_signature_is_the_specifications_example() -> None:
    # Source: the specification's test vector, as its libraries carry it.
    headers = WebhookSigner(SECRET).headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", datetime.fromtimestamp(1614265330, UTC), '{"test": 2432232314}'
    )

    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_signature_holds_for_a_time_in_another_zone() -> None:
    now = datetime.now(timezone(timedelta(hours=5)))

    Webhook(SECRET).verify("{}", WebhookSigner(SECRET).headers("msg_1", now, "{}"))


@pytest.mark.parametrize("num_bytes", [24, 25, 32, 64])
def test_signer_takes_secrets_of_the_specified_lengths_padded_or_not(num_bytes: int) -> None:
    now, secret = datetime.now(UTC), whsec(num_bytes)

    for text in (secret, secret.rstrip("=")):
        Webhook(secret).verify("{}", WebhookSigner(text).headers("msg_1", now, "{}"))


@pytest.mark.parametrize(
    ("secrets", "mistake"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        (SECRET.removeprefix("whsec_"), "secret 1 .* begin"),
        ("whsec_", "24 to 64 bytes"),
        (whsec(23), "24 to 64 bytes"),
        (whsec(65), "24 to 64 bytes"),
        (f"{SECRET} {whsec(8)}", "secret 2 .* 24 to 64"),
        ("whsec_" + "-_" * 20, "base64"),
        ("whsec_" + "a" * 33, "base64"),
        ("whsec_" + "ä" * 40, "base64"),
        (f"{SECRET},{SECRET}", "base64"),
    ],
)
def test_signer_refuses_a_secret_and_quotes_nothing(secrets: str, mistake: str) -> None:
    with pytest.raises(InvalidWebhookSecret, match=mistake) as caught:
        WebhookSigner(secrets)
    assert SECRET.removeprefix("whsec_") not in str(caught.value)


def test_signer_keeps_its_secret_out_of_its_repr() -> None:
    assert SECRET[6:] not in repr(WebhookSigner(SECRET)) + str(vars(WebhookSigner(SECRET)))
