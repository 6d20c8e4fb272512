"""When a webhook is tried again, and when no more. Pure: knows no clock, no network and no randomness of its own."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

from schemas.webhooks import WebhookDelivery, WebhookError

BACKOFF: Final = tuple(
    timedelta(seconds=seconds)
    for seconds in (5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600)
)
"""The pause after each failed attempt; the first attempt is made at once. Source: Standard Webhooks 1.0, "Retries"."""

MAX_ATTEMPTS: Final = len(BACKOFF) + 1
JITTER: Final = 0.2
"""A pause grows by up to so much of itself, so that what failed together does not come back together."""

LONGEST_PAUSE: Final = BACKOFF[-1] * (1 + JITTER)
"""Also the most of a receiver's Retry-After that is granted."""

NO_PAUSE: Final = timedelta(0)


@dataclass(frozen=True)
class Outcome:
    """What became of one attempt. gone: the receiver wants no more. retry_after: what it asked for, if anything."""

    kind: Literal["delivered", "failed", "gone"]
    status: int | None = None
    error: WebhookError | None = None
    retry_after: timedelta | None = None


def after(delivery: WebhookDelivery, outcome: Outcome, now: datetime, jitter: float = 0.0) -> WebhookDelivery:
    """The delivery once an attempt is over. jitter: 0 to 1, at random. Raises ValueError where it had ended before."""
    if delivery.state != "waiting":
        raise ValueError(f"a delivery that is {delivery.state} has no more attempts")
    attempts = delivery.attempts + 1
    tried = {
        "attempts": attempts,
        "last_status": outcome.status,
        "last_error": outcome.error,
        "next_attempt_at": None,
    }
    if outcome.kind == "delivered":
        return delivery.model_copy(update={**tried, "state": "delivered", "delivered_at": now})
    if outcome.kind == "gone" or attempts >= MAX_ATTEMPTS:
        return delivery.model_copy(update={**tried, "state": "given_up"})
    pause = BACKOFF[attempts - 1] * (1 + JITTER * jitter)
    asked_for = min(outcome.retry_after or NO_PAUSE, LONGEST_PAUSE)
    return delivery.model_copy(update={**tried, "next_attempt_at": now + max(pause, asked_for)})


def pause_before(delivery: WebhookDelivery, now: datetime) -> timedelta:
    """How long to wait for the next attempt, after a restart too; a clock that was set wrong costs `LONGEST_PAUSE`."""
    if delivery.next_attempt_at is None:
        return NO_PAUSE
    return min(max(delivery.next_attempt_at - now, NO_PAUSE), LONGEST_PAUSE)
