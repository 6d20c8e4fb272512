"""An MP4 back to its frames."""

from pathlib import Path

import av
import numpy as np
import numpy.typing as npt


def read_frames(path: Path) -> npt.NDArray[np.uint8]:
    """All frames, (T, H, W, 3) uint8 RGB. Raises av.FFmpegError when it is no clip."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
