"""A contact sheet: frames of a clip, evenly spaced, side by side in one PNG."""

from pathlib import Path

import av
import numpy as np
from PIL import Image

_MIN_TILE_PX = 160
_MARGIN_PX = 6


def write_contact_sheet(clip: Path, sheet: Path, num_tiles: int = 6) -> None:
    """Decode `clip` and write `sheet`: first and last frame, and those between, left to right.

    Small frames are enlarged without smoothing, so that every pixel can be seen.
    Raises av.FFmpegError when the clip can't be decoded, OSError when the sheet can't be written.
    """
    with av.open(str(clip)) as container:
        images = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    chosen = np.linspace(0, len(images) - 1, min(num_tiles, len(images))).round().astype(int)
    scale = max(1, -(-_MIN_TILE_PX // images[0].width))
    tiles = [
        images[i].resize((images[i].width * scale, images[i].height * scale), Image.Resampling.NEAREST) for i in chosen
    ]
    width, height = tiles[0].size
    page = Image.new("RGB", (len(tiles) * (width + _MARGIN_PX) + _MARGIN_PX, height + 2 * _MARGIN_PX), "white")
    for i, tile in enumerate(tiles):
        page.paste(tile, (_MARGIN_PX + i * (width + _MARGIN_PX), _MARGIN_PX))
    page.save(sheet)
