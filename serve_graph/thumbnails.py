"""A clip's first frame as a JPEG beside it in the store. Blocks: run it in a thread pool."""

from io import BytesIO

from PIL import Image

from schemas.errors import ClipGone, RenderFailed
from storage.store import ObjectNotFound, ObjectStore

JPEG_QUALITY = 90


def ensure_thumbnail(store: ObjectStore, clip_key: str, thumbnail_key: str) -> bool:
    """Make the thumbnail unless it is there. Returns whether it was made; the same clip gives the same bytes.

    Raises ClipGone, RenderFailed, StoreUnavailable, StoreFull.
    """
    try:
        store.stat(thumbnail_key)
        return False
    except ObjectNotFound:
        pass
    try:
        clip = store.get(clip_key).body
    except ObjectNotFound as error:
        raise ClipGone from error
    store.put(thumbnail_key, first_frame(clip))
    return True


def first_frame(clip: bytes) -> bytes:
    """The first frame of an MP4 as a JPEG. Raises RenderFailed."""
    import av  # here: an ingress that is never asked for a thumbnail does without PyAV's libraries

    try:
        with av.open(BytesIO(clip), "r") as container:
            frame = next(container.decode(video=0))
    except (av.FFmpegError, StopIteration, IndexError) as error:
        raise RenderFailed("the clip's first frame can't be read") from error
    jpeg = BytesIO()
    Image.fromarray(frame.to_ndarray(format="rgb24")).save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return jpeg.getvalue()
