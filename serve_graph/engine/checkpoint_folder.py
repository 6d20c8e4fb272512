"""Where a checkpoint lies, a folder in diffusers' layout, and which version it is; and where its adapters lie."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from schemas.errors import ModelNotReady
from schemas.loras import Lora
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


def locate_loras(loras: Mapping[str, Lora], paths: Mapping[str, Path], checkpoint: Path) -> dict[str, Path]:
    """Each adapter's safetensors file: at its path, in the checkpoint's folder (`lora_folder`), or from the hub.

    Raises ModelNotReady, in one line that says what to do, for one that isn't there.
    """
    return {name: _locate_lora(name, lora, paths.get(name), checkpoint) for name, lora in loras.items()}


def lora_folder(name: str) -> str:
    """What in a checkpoint's folder has an adapter's files of the hub, for a machine that has no hub."""
    return f"loras/{name}"


def find_lora(name: str, lora: Lora, path: Path) -> Path:
    """The file at `path`, a file or a folder that has `weight_name` or one file only. Raises ModelNotReady."""
    if path.is_dir():
        files = [path / lora.weight_name] if lora.weight_name else sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelNotReady(
                f"the LoRA {name} is in a folder of {len(files)} safetensors files: set model.loras.{name}.weight_name"
            )
        path = files[0]
    if not path.is_file():
        raise ModelNotReady(f"there is no LoRA {name}: model.loras.{name}.path must name its safetensors file")
    return path


def _locate_lora(name: str, lora: Lora, path: Path | None, checkpoint: Path) -> Path:
    if path is not None:
        return find_lora(name, lora, path)
    if lora.hub_id is None or lora.weight_name is None:
        raise ModelNotReady(f"the LoRA {name} lies nowhere: set model.loras.{name}.path, or hub_id and weight_name")
    fetched = checkpoint / lora_folder(name) / lora.weight_name
    if fetched.is_file():
        return fetched
    try:
        return Path(hf_hub_download(lora.hub_id, lora.weight_name, revision=lora.revision))
    except Exception as error:  # the hub's client has errors of its own, of its HTTP library and of the system
        raise ModelNotReady(
            f"{lora.weight_name} of {lora.hub_id} could not be fetched from the hub: "
            f"download it elsewhere and set model.loras.{name}.path to it"
        ) from error


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
