"""A contact sheet: frames of clips, evenly spaced, a row for each clip under its caption, in one PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from serve_graph.mp4_frames import read_frames

_MIN_TILE_PX = 160
_MARGIN_PX = 6
_CAPTION_PX = 15


def write_contact_sheet(clips: Sequence[tuple[str, Path]], sheet: Path, num_tiles: int = 6) -> None:
    """Decode `clips` (captions and files) and write `sheet`: a row each, first and last frame, and those between.

    Small frames are enlarged without smoothing, so that every pixel can be seen.
    Raises av.FFmpegError when a clip can't be decoded, OSError when the sheet can't be written.
    """
    rows = [(caption, _tiles(path, num_tiles)) for caption, path in clips]
    font = ImageFont.load_default(_CAPTION_PX)
    line = _CAPTION_PX + 2 * _MARGIN_PX
    width = max(sum(tile.width + _MARGIN_PX for tile in tiles) for _, tiles in rows) + _MARGIN_PX
    page = Image.new("RGB", (width, sum(line + tiles[0].height for _, tiles in rows) + _MARGIN_PX), "white")
    draw, y = ImageDraw.Draw(page), 0
    for caption, tiles in rows:
        draw.text((_MARGIN_PX, y + _MARGIN_PX), caption, "black", font)
        x, y = _MARGIN_PX, y + line
        for tile in tiles:
            page.paste(tile, (x, y))
            x += tile.width + _MARGIN_PX
        y += tiles[0].height
    page.save(sheet)


def _tiles(clip: Path, num_tiles: int) -> list[Image.Image]:
    images = [Image.fromarray(frame) for frame in read_frames(clip)]
    chosen = np.linspace(0, len(images) - 1, min(num_tiles, len(images))).round().astype(int)
    scale = max(1, -(-_MIN_TILE_PX // images[0].width))
    return [
        images[i].resize((images[i].width * scale, images[i].height * scale), Image.Resampling.NEAREST) for i in chosen
    ]
