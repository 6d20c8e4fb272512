"""The MP4 files, read back with PyAV and byte by byte."""

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from schemas.errors import RenderFailed
from serve_graph.encode import Mp4Writer
from serve_graph.settings import EncodeSettings

Frames = npt.NDArray[np.uint8]

METADATA: dict[str, str | int] = {"model": "wan-random", "seed": 7}


def moving_square(num_frames: int = 9, width: int = 64, height: int = 64) -> Frames:
    frames = np.full((num_frames, height, width, 3), 40, np.uint8)
    for i, frame in enumerate(frames):
        frame[20:40, 2 * i : 2 * i + 20] = (200, 120, 30)
    return frames


def write(path: Path, frames: Frames, settings: EncodeSettings | None = None, fps: int = 16) -> Path:
    _, height, width, _ = frames.shape
    with Mp4Writer(
        path, width=width, height=height, fps=fps, settings=settings or EncodeSettings(), metadata=METADATA
    ) as mp4:
        mp4.write(frames[:1])
        mp4.write(frames[1:])
    return path


def atoms(path: Path) -> list[str]:
    """The names of the file's top-level atoms, in order."""
    data = path.read_bytes()
    names, offset = [], 0
    while offset < len(data):
        size, name = struct.unpack_from(">I4s", data, offset)
        names.append(name.decode("ascii"))
        offset += size
    return names


def rgb_frames(path: Path) -> Frames:
    """All frames, converted as a player does that believes the file's tags."""
    with av.open(path) as container:
        images = [
            frame.reformat(
                format="rgb24", src_colorspace=Colorspace.ITU709, src_color_range=ColorRange.MPEG
            ).to_ndarray()
            for frame in container.decode(video=0)
        ]
    return np.stack(images)


@pytest.mark.parametrize(("width", "height", "num_frames", "fps"), [(64, 64, 9, 16), (112, 64, 17, 30)])
def test_mp4_writer_writes_h264_of_the_asked_size_frames_and_rate(
    tmp_path: Path, width: int, height: int, num_frames: int, fps: int
) -> None:
    path = write(tmp_path / "clip.mp4", moving_square(num_frames, width, height), fps=fps)

    with av.open(path) as container:
        [stream] = container.streams
        assert stream.type == "video"
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height) == (width, height)
        assert stream.frames == num_frames
        assert stream.average_rate == fps
        assert stream.duration * stream.time_base == pytest.approx(num_frames / fps)
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([i / fps for i in range(num_frames)])


def test_mp4_writer_tags_the_colors_as_bt709(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", moving_square())

    with av.open(path) as container:
        context: Any = container.streams.video[0].codec_context
        assert context.colorspace == Colorspace.ITU709
        assert context.color_primaries == ColorPrimaries.BT709
        assert context.color_trc == ColorTrc.BT709
        assert context.color_range == ColorRange.MPEG


@pytest.mark.parametrize(
    "color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 120, 30)]
)
def test_mp4_writer_keeps_colors(tmp_path: Path, color: tuple[int, int, int]) -> None:
    frames = np.empty((5, 64, 64, 3), np.uint8)
    frames[:] = color

    path = write(tmp_path / "clip.mp4", frames)

    assert np.abs(rgb_frames(path).mean(axis=(0, 1, 2)) - color).max() <= 3


def test_mp4_writer_keeps_the_picture_and_the_order_of_frames(tmp_path: Path) -> None:
    frames = moving_square(17)

    decoded = rgb_frames(write(tmp_path / "clip.mp4", frames))

    distances = np.abs(decoded[:, None].astype(int) - frames[None]).mean(axis=(2, 3, 4))  # (decoded, written)
    assert (distances.argmin(axis=1) == np.arange(17)).all()
    assert distances.diagonal().max() < 4


def test_mp4_writer_puts_the_index_in_front(tmp_path: Path) -> None:
    names = atoms(write(tmp_path / "clip.mp4", moving_square()))

    assert names[0] == "ftyp"
    assert names.index("moov") < names.index("mdat")


def test_mp4_writer_writes_the_metadata_as_json(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", moving_square())

    with av.open(path) as container:
        assert json.loads(container.metadata["comment"]) == METADATA


def test_mp4_writer_gives_the_same_bytes_for_the_same_frames(tmp_path: Path) -> None:
    one = write(tmp_path / "one.mp4", moving_square(17))
    other = write(tmp_path / "other.mp4", moving_square(17))

    assert one.read_bytes() == other.read_bytes()
    assert write(tmp_path / "third.mp4", moving_square(18)).read_bytes() != one.read_bytes()


def test_mp4_writer_obeys_the_quality_setting(tmp_path: Path) -> None:
    good = write(tmp_path / "good.mp4", moving_square(17), EncodeSettings(crf=5))
    bad = write(tmp_path / "bad.mp4", moving_square(17), EncodeSettings(crf=45))

    assert good.stat().st_size > bad.stat().st_size


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, 64, 112, 3), np.uint8),
        np.zeros((1, 3, 64, 64), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((1, 64, 64, 4), np.uint8),
        np.zeros((1, 64, 64, 3), np.float32),
    ],
    ids=["wide", "channels-first", "one-image", "alpha", "float"],
)
def test_mp4_writer_refuses_frames_that_do_not_fit(tmp_path: Path, frames: npt.NDArray[Any]) -> None:
    writer = Mp4Writer(tmp_path / "clip.mp4", width=64, height=64, fps=16, settings=EncodeSettings(), metadata=METADATA)
    with pytest.raises(RenderFailed), writer as mp4:
        mp4.write(frames)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_mp4_writer_raises_the_file_systems_error_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.symlink_to("/dev/full")
    noise = np.random.default_rng(1).integers(0, 256, (17, 64, 64, 3), np.uint8)

    with pytest.raises(OSError, match="No space left"):
        write(path, noise)


def test_mp4_writer_raises_the_file_systems_error_when_the_folder_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "nowhere" / "clip.mp4", moving_square())


def test_mp4_writer_closes_its_file_when_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    writer = Mp4Writer(path, width=64, height=64, fps=16, settings=EncodeSettings(), metadata=METADATA)

    writer.write(moving_square())
    writer.__exit__(ZeroDivisionError, ZeroDivisionError(), None)

    assert str(path) not in {file.path for file in psutil.Process().open_files()}


def test_mp4_writer_gives_the_same_bytes_when_many_write_at_once(tmp_path: Path) -> None:
    """x264's macroblock tree once made several files of one clip, about one encode in five of this texture."""
    rng = np.random.default_rng(0)
    still = rng.integers(60, 120, (240, 416, 3))
    frames = np.stack([np.roll(still, 3 * i, axis=1) + rng.integers(0, 24, still.shape) for i in range(17)])

    def encode(number: int) -> bytes:
        return write(tmp_path / f"{number}.mp4", frames.astype(np.uint8)).read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(encode, range(24)))) == 1
