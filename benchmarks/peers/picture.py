"""Latency against load as a picture: short and long jobs, mean and p95, one line for each contender. Pillow only."""

from collections.abc import Mapping
from math import log
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.peers.report import Found
from benchmarks.peers.traces import LOADS, STEPS

_PANEL = (470, 270)
_LEFT, _TOP, _RIGHT, _BOTTOM = 52, 30, 16, 34
"""Room around a panel's frame for its numbers."""
LEGEND = 30
"""Height of the strip with the names, above the panels."""
_COLOURS = ("#c0392b", "#1f5fbf", "#2e8b57", "#8e6bbf")
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
"""Seconds, of the logarithmic scale."""

Lines = Mapping[str, list[tuple[float, float]]]


def write_picture(found: Mapping[str, Found], path: Path) -> None:
    """Draw it. Raises OSError."""
    width, height = _PANEL
    page = Image.new("RGB", (2 * width, LEGEND + 2 * height), "white")
    font = ImageFont.load_default(13)
    colours = dict(zip(found, _COLOURS, strict=False))
    pen = ImageDraw.Draw(page)
    x = _LEFT
    for name, colour in colours.items():
        pen.line((x, LEGEND / 2, x + 22, LEGEND / 2), fill=colour, width=3)
        pen.text((x + 28, 7), name, fill="black", font=font)
        x += 60 + int(font.getlength(name))
    for column, kind in enumerate(STEPS):
        for row, figure in enumerate(("mean", "p95")):
            lines = {
                name: [(o.load, getattr(w, figure)) for o in one.open if (w := o.waits[kind]) is not None]
                for name, one in found.items()
            }
            panel = _panel(f"{kind} jobs: {figure}, s, by load", lines, colours, font)
            page.paste(panel, (column * width, LEGEND + row * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, optimize=True)


def _panel(
    title: str, lines: Lines, colours: Mapping[str, str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> Image.Image:
    image = Image.new("RGB", _PANEL, "white")
    pen = ImageDraw.Draw(image)
    right, bottom = _PANEL[0] - _RIGHT, _PANEL[1] - _BOTTOM
    values = [seconds for points in lines.values() for _, seconds in points] or [1.0]
    low = max([tick for tick in _TICKS if tick <= min(values)], default=min(values))
    high = min([tick for tick in _TICKS if tick > max(values)], default=2 * max(values))

    def place(load: float, seconds: float) -> tuple[float, float]:
        across = (load - LOADS[0]) / (LOADS[-1] - LOADS[0])
        x = _LEFT + 24 + (right - _LEFT - 48) * across
        return x, bottom - (bottom - _TOP) * _share(seconds, low, high)

    pen.text((_LEFT, 8), title, fill="black", font=font)
    for tick in (tick for tick in _TICKS if low <= tick <= high):
        y = place(LOADS[0], tick)[1]
        pen.line((_LEFT, y, right, y), fill="#ddd")
        pen.text((_LEFT - 8, y), f"{tick:g}", fill="#555", font=font, anchor="rm")
    for load in LOADS:
        pen.text((place(load, low)[0], bottom + 8), f"{load:.0%}", fill="#555", font=font, anchor="mt")
    pen.rectangle((_LEFT, _TOP, right, bottom), outline="#999")
    for name, points in lines.items():
        placed = [place(*point) for point in points]
        pen.line(placed, fill=colours[name], width=3)
        for x, y in placed:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colours[name])
    return image


def _share(seconds: float, low: float, high: float) -> float:
    """Where it lies between `low` (0) and `high` (1) on a logarithmic scale."""
    return log(seconds / low) / log(high / low)
