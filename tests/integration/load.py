"""Twenty requests through a fault, by clients that do what a client should: wait as told, and try again."""

import concurrent.futures
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.integration.service import RunningService

NUM_REQUESTS = 20
NUM_CLIENTS = 4
GIVE_UP_S = 120
BODY = {"prompt": "a blue square", "num_frames": 17, "num_inference_steps": 60, "reproducible": True}


@dataclass
class Outcome:
    """One request, with all tries at it. `refusals`: statuses and broken connections before the last answer."""

    answer: httpx.Response | None
    seconds: float
    refusals: list[str] = field(default_factory=list)

    @property
    def clip(self) -> dict[str, Any]:
        assert self.answer is not None, self.refusals
        assert self.answer.status_code == 200, self.answer.text
        clip: dict[str, Any] = self.answer.json()
        return clip


def send(service: RunningService, seed: int) -> Outcome:
    """Ask for one clip until there is an answer that no second try could better."""
    began = time.monotonic()
    outcome = Outcome(None, 0)
    with service.client(timeout_s=GIVE_UP_S) as http:
        while time.monotonic() - began < GIVE_UP_S:
            try:
                answer = http.post("/generate", json={**BODY, "seed": seed})
            except httpx.TransportError as error:
                outcome.refusals.append(type(error).__name__)
                time.sleep(0.2)  # as a client would
                continue
            if answer.status_code != 503:
                outcome.answer = answer
                break
            outcome.refusals.append(answer.json()["type"].rpartition(":")[2])
            time.sleep(int(answer.headers["retry-after"]))  # as the answer asks
    outcome.seconds = time.monotonic() - began
    return outcome


def run(service: RunningService, disturb: Callable[[], None] | None = None) -> list[Outcome]:
    """All requests; `disturb` is called once some are answered and others are running."""
    with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as pool:
        sent = [pool.submit(send, service, seed) for seed in range(NUM_REQUESTS)]
        if disturb is not None:
            concurrent.futures.wait(sent[:NUM_CLIENTS])
            wait_running(service)
            disturb()
        return [future.result() for future in sent]


def wait_running(service: RunningService, num_jobs: int = 1) -> None:
    """Until so many jobs hold a slot of the generator."""
    while httpx.get(service.base + "/health", timeout=30).json()["queue"]["running"] < num_jobs:
        pass


def report(name: str, outcomes: list[Outcome], usual: list[Outcome]) -> str:
    """The figures of one fault, in a line."""
    answered = [outcome for outcome in outcomes if outcome.answer is not None and outcome.answer.status_code == 200]
    slowest = max(outcome.seconds for outcome in outcomes)
    expected = max(outcome.seconds for outcome in usual)
    refusals = Counter(refusal for outcome in outcomes for refusal in outcome.refusals)
    return (
        f"{name}: {len(answered)} of {len(outcomes)} answered, "
        f"{sum(bool(outcome.refusals) for outcome in answered)} of them after a retry by the client, "
        f"{len(outcomes) - len(answered)} failed; slowest {slowest:.1f} s, undisturbed {expected:.1f} s, "
        f"added {max(0.0, slowest - expected):.1f} s; refusals {dict(refusals)}"
    )
