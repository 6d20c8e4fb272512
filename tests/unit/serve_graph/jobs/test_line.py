"""The jobs that wait in a process, and which of them is next."""

import pytest
from processes import recorded
from support import Jobs

from schemas.clips import Timings
from schemas.jobs import JobState, RenderedClip
from serve_graph.jobs.line import SHORT_LINE, Line, Scheduling
from serve_graph.jobs.live import LiveJob

TIMINGS = Timings(denoise=1.0, decode=1.0, encode=0.1, upload=0.1)


def clip_of(device_s: float) -> RenderedClip:
    """A clip for which the device worked so long."""
    half = device_s / 2
    return RenderedClip(
        key="clip", size_bytes=1, sha256="", timings=TIMINGS, denoise_device_s=half, decode_device_s=half
    )


@pytest.mark.parametrize("num_jobs", [3, SHORT_LINE + 3])
async def test_equal_jobs_begin_in_the_order_they_came_though_estimates_fall_meanwhile(
    jobs: Jobs, num_jobs: int
) -> None:
    record = jobs.record(recorded(jobs, JobState.QUEUED, 0))
    line, device_s = Line(Scheduling(slots=num_jobs)), 100.0
    came = [LiveJob(record.model_copy(update={"job_id": f"job_{i}"}), None, began=0.0) for i in range(num_jobs)]
    for live in came:
        line.join(live)
        line.learn(live, clip_of(device_s := 0.99 * device_s))

    assert [line.next() for _ in came] == came


async def test_what_the_line_will_take_follows_the_newest_estimate(jobs: Jobs) -> None:
    line = Line(Scheduling(slots=1))
    first, second, third = (LiveJob(jobs.record(recorded(jobs, JobState.QUEUED, i)), None, began=0.0) for i in range(3))
    line.join(first)
    line.learn(first, clip_of(8.0))
    line.join(second)
    line.join(third)
    assert line.next() is first

    line.learn(first, clip_of(1.0))
    line.leave(first)
    assert line.next() is second
    assert line.seconds_for(1) == pytest.approx(line.own_seconds(third.record.parameters))


async def test_clients_are_told_the_order_in_which_equal_jobs_will_begin(jobs: Jobs) -> None:
    record = jobs.record(recorded(jobs, JobState.QUEUED, 0))
    line, device_s = Line(Scheduling(slots=1)), 100.0
    came = [LiveJob(record.model_copy(update={"job_id": f"job_{i}"}), None, began=0.0) for i in range(4)]
    for live in came:
        line.join(live)
        line.learn(live, clip_of(device_s := 0.9 * device_s))

    places = [line.outlook(live) for live in came]

    assert [place.position for place in places if place is not None] == [1, 2, 3, 4]
    assert line.prospect(record.request, record.parameters).position == 5
