"""Where a checkpoint lies: a folder in diffusers' layout, and which version it is."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from huggingface_hub import snapshot_download

from schemas.errors import ModelNotReady
from schemas.model_profile import ModelProfile
from schemas.official_profiles import WAN_TINY

SHIPPED = Path(__file__).parent.parent / "tiny_wan" / "checkpoint"
"""The tiny Wan, part of this package."""

_LAYOUT = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint's folder, and its version where that is known: the hub's commit, or the shipped one's checksum."""

    folder: Path
    revision: str | None


def locate_checkpoint(profile: ModelProfile, path: Path | None, revision: str | None) -> FoundCheckpoint:
    """Find the checkpoint: `path` itself, the hub's snapshot, or the shipped tiny Wan.

    Raises ModelNotReady, in one line that says what to do, when there is no such checkpoint.
    """
    if path is not None:
        found = FoundCheckpoint(path, revision)
    elif profile.hub_id is not None:
        snapshot = _download(profile.hub_id, revision)
        found = FoundCheckpoint(snapshot, snapshot.name)  # the hub's cache names the folder by the commit
    elif profile.name == WAN_TINY.name:
        found = FoundCheckpoint(SHIPPED, _checksum(SHIPPED))
    else:
        raise ModelNotReady(f"{profile.name} has no hub id: set model.path to its folder")
    check_layout(found.folder)
    return found


def check_layout(folder: Path) -> None:
    """Raises ModelNotReady unless `folder` has every part of diffusers' layout."""
    missing = [name for name in _LAYOUT if not (folder / name).exists()]
    if missing:
        raise ModelNotReady(
            f"the checkpoint lacks {', '.join(missing)}: model.path must name a folder in diffusers' layout"
        )


def _checksum(folder: Path) -> str:
    """Of the weights: 12 hexadecimal digits."""
    digest = sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _download(hub_id: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(hub_id, revision=revision))
    except Exception as error:  # the hub's client has errors of its own, of its HTTP library and of the system
        raise ModelNotReady(
            f"{hub_id} could not be fetched from the hub: download it elsewhere and set model.path to its folder"
        ) from error
