"""How long the rest of a job will take, learnt from the steps and chunks seen so far."""

_WEIGHT = 0.3
"""Of the newest observation: smooth over a few steps, yet quick to follow when the load changes."""


class Pace:
    """Moving averages of seconds per step and per decode chunk, by shape."""

    def __init__(self) -> None:
        self._steps: dict[tuple[int, ...], float] = {}
        self._chunks: dict[tuple[int, ...], float] = {}

    def saw_step(self, shape: tuple[int, ...], seconds: float) -> None:
        """One more step of a job of this shape took so long, the work of its neighbours included."""
        _blend(self._steps, shape, seconds)

    def saw_chunk(self, shape: tuple[int, ...], seconds: float) -> None:
        """One more decode chunk took so long."""
        _blend(self._chunks, shape, seconds)

    def seconds_left(self, shape: tuple[int, ...], steps: int, chunks: int) -> float | None:
        """Seconds for so many steps and chunks; None before the first step of this shape was seen.

        A shape that was never decoded counts its chunks as one step each until it was.
        """
        step_seconds = self._steps.get(shape)
        if step_seconds is None:
            return None
        return steps * step_seconds + chunks * self._chunks.get(shape, step_seconds)


def _blend(averages: dict[tuple[int, ...], float], shape: tuple[int, ...], seconds: float) -> None:
    known = averages.get(shape)
    averages[shape] = seconds if known is None else known + _WEIGHT * (seconds - known)
