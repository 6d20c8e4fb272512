"""When a webhook is tried again: the schedule, its bounds, and the events that end it."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.webhooks import WebhookDelivery
from serve_graph.webhooks.schedule import BACKOFF, JITTER, LONGEST_PAUSE, MAX_ATTEMPTS, Outcome, after, pause_before

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
WAITING = WebhookDelivery(url="https://example.com/")
FAILED = Outcome("failed", 500, "unexpected_status")

retry_afters = st.none() | st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=20_000))
failures = st.builds(Outcome, st.just("failed"), st.just(503), st.just("unexpected_status"), retry_afters)
chances = st.floats(min_value=0, max_value=1)


def test_backoff_is_standard_webhooks() -> None:
    delivery, pauses = WAITING, []
    while (delivery := after(delivery, FAILED, NOW)).next_attempt_at is not None:
        pauses.append((delivery.next_attempt_at - NOW).total_seconds())

    assert pauses == [5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400]
    assert (delivery.state, delivery.attempts) == ("given_up", 10)


@given(st.integers(min_value=0, max_value=MAX_ATTEMPTS - 2), failures, chances)
def test_a_failure_is_tried_again_no_sooner_than_planned_and_within_bounds(
    attempts: int, outcome: Outcome, chance: float
) -> None:
    before = WAITING.model_copy(update={"attempts": attempts})
    tried = after(before, outcome, NOW, chance)

    assert tried.state == "waiting"
    assert tried.attempts == attempts + 1
    assert tried.next_attempt_at is not None
    pause = tried.next_attempt_at - NOW
    assert BACKOFF[attempts] <= pause <= LONGEST_PAUSE
    assert outcome.retry_after is None or pause >= min(outcome.retry_after, LONGEST_PAUSE)
    assert WebhookDelivery.model_validate_json(tried.model_dump_json()) == tried


@given(st.lists(failures, min_size=MAX_ATTEMPTS, max_size=MAX_ATTEMPTS), chances)
def test_failures_end_in_giving_up_after_the_last_attempt(outcomes: list[Outcome], chance: float) -> None:
    delivery = WAITING
    for outcome in outcomes:
        delivery = after(delivery, outcome, NOW, chance)

    assert (delivery.state, delivery.attempts, delivery.next_attempt_at) == ("given_up", MAX_ATTEMPTS, None)


@given(chances)
def test_jitter_grows_with_chance(chance: float) -> None:
    tried = after(WAITING, FAILED, NOW, chance)

    assert tried.next_attempt_at is not None
    assert tried.next_attempt_at - NOW == BACKOFF[0] * (1 + JITTER * chance)


@pytest.mark.parametrize("attempts", [0, MAX_ATTEMPTS - 1])
def test_a_delivery_ends_it(attempts: int) -> None:
    failed = after(WAITING, FAILED, NOW).model_copy(update={"attempts": attempts})
    tried = after(failed, Outcome("delivered", 204), NOW)

    assert (tried.state, tried.delivered_at, tried.last_status, tried.last_error) == ("delivered", NOW, 204, None)
    assert tried.next_attempt_at is None


def test_gone_ends_it_at_once() -> None:
    tried = after(WAITING, Outcome("gone", 410, "gone"), NOW)

    assert (tried.state, tried.attempts, tried.last_error, tried.delivered_at) == ("given_up", 1, "gone", None)


@pytest.mark.parametrize("state", ["delivered", "given_up"])
def test_what_ended_has_no_more_attempts(state: str) -> None:
    with pytest.raises(ValueError, match="no more attempts"):
        after(WAITING.model_copy(update={"state": state}), FAILED, NOW)


def test_the_first_attempt_waits_for_nothing() -> None:
    assert pause_before(WAITING, NOW) == timedelta(0)


@given(st.timedeltas(min_value=timedelta(days=-9_000), max_value=timedelta(days=9_000)))
def test_a_wrong_clock_costs_at_most_the_longest_pause(skew: timedelta) -> None:
    tried = after(WAITING, FAILED, NOW)
    pause = pause_before(tried, NOW + skew)

    assert timedelta(0) <= pause <= LONGEST_PAUSE
    assert skew != timedelta(0) or pause == BACKOFF[0]
