"""Frames to an MP4 file: H.264, yuv420p, BT.709, the index in front (faststart). Knows nothing of models or stores."""

import json
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

from schemas.errors import RenderFailed

if TYPE_CHECKING:
    from serve_graph.settings import EncodeSettings

X264_PARAMS = "mbtree=0"
"""x264's macroblock tree gives other bytes for the same frames now and then, with one thread too. Measured: 14 of 200
encodes of one clip at 64x64, 11 of 16 at 832x480; without it none of 700 and none of 24."""


class Mp4Writer:
    """Writes one clip. Use as a context manager; without `close()` reached, the file is not a clip.

    metadata goes into the file's `comment` as JSON: the model and the seed, never the prompt.
    Raises: OSError from the file system, as it is; RenderFailed when the frames do not fit the clip.
    """

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        fps: int,
        settings: "EncodeSettings",
        metadata: dict[str, str | int],
    ) -> None:
        self._size = (height, width)
        # faststart moves the index to the front when the file is closed; it needs a path, not a stream
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self._container.metadata["comment"] = json.dumps(metadata, sort_keys=True)
        stream = self._container.add_stream(
            "libx264",
            rate=fps,
            options={"crf": str(settings.crf), "preset": settings.preset, "x264-params": X264_PARAMS},
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = settings.num_threads
        context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        self._stream = stream
        self._reformatter = VideoReformatter()  # one per clip: a new one per frame sets up its tables each time
        self.num_frames = 0

    def write(self, frames: npt.NDArray[np.uint8]) -> None:
        """Append (t, H, W, 3) uint8 RGB."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*self._size, 3):
            raise RenderFailed("the decoder gave frames that do not fit the clip")
        for image in frames:
            frame = self._reformatter.reformat(
                av.VideoFrame.from_ndarray(image, format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                threads=1,  # the model needs the other cores
            )
            frame.pts = self.num_frames
            self._container.mux(self._stream.encode(frame))
            self.num_frames += 1

    def close(self) -> None:
        """Flush the encoder and finish the file."""
        try:
            self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()

    def __enter__(self) -> "Mp4Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(av.FFmpegError):  # the file is given up; what was raised says why
                self._container.close()
