"""A stage's log as a picture: one panel per figure, over the steps. Pillow only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

_PANEL = (460, 200)
_MARGIN = (58, 22, 14, 24)
"""Left, top, right, bottom of a panel: room for its numbers."""
_COLUMNS = 2


def write_curves(lines: Sequence[dict[str, Any]], picture: Path) -> None:
    """Draw every number of the log's lines but the CPU time, which stands in the title."""
    series: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        prefix = f"{line['kind']}: " if "kind" in line else ""
        for name, value in line.items():
            if name not in ("step", "cpu_s", "kind") and isinstance(value, int | float):
                series.setdefault(prefix + name, []).append((line["step"], value))
    drawn = {name: points for name, points in series.items() if len(points) > 1}
    rows = -(-len(drawn) // _COLUMNS)
    width, height = _PANEL
    page = Image.new("RGB", (_COLUMNS * width, max(1, rows) * height), "white")
    for i, (name, points) in enumerate(drawn.items()):
        panel = _panel(name, points)
        page.paste(panel, (i % _COLUMNS * width, i // _COLUMNS * height))
    picture.parent.mkdir(parents=True, exist_ok=True)
    page.save(picture, optimize=True)


def _panel(name: str, points: list[tuple[float, float]]) -> Image.Image:
    image = Image.new("RGB", _PANEL, "white")
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = _MARGIN[0], _MARGIN[1], _PANEL[0] - _MARGIN[2], _PANEL[1] - _MARGIN[3]
    steps, values = zip(*points, strict=True)
    low, high = min(values), sorted(values)[int(0.98 * (len(values) - 1))]  # the first steps would hide the rest
    high = high if high > low else low + 1

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * (step - steps[0]) / (steps[-1] - steps[0])
        return x, bottom - (bottom - top) * min(1.0, (value - low) / (high - low))

    pen.rectangle((left, top, right, bottom), outline="#bbb")
    pen.line([place(*point) for point in points], fill="#1f5fbf", width=2)
    pen.text((left, 5), name, fill="black")
    pen.text((4, top - 4), f"{high:.3g}", fill="#555")
    pen.text((4, bottom - 8), f"{low:.3g}", fill="#555")
    pen.text((left, bottom + 6), f"step {steps[0]:g}", fill="#555")
    pen.text((right - 40, bottom + 6), f"{steps[-1]:g}", fill="#555")
    return image
