"""The checkpoint in the Volume, with its LoRA adapters: fetched from the hub, each at one commit, verified, and whole.

`wan-serve.json` beside the parts is written last and names every file with its size and, where the hub has one, its
SHA-256: a folder without it is one that is still being fetched.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.hf_api import RepoSibling
from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.errors import ModelNotReady
from schemas.model_profile import ModelProfile
from serve_graph.engine.checkpoint_folder import lora_folder

INVENTORY: Final = "wan-serve.json"
_CHUNK: Final = 16 * 2**20


class WeightFile(BaseModel):
    """sha256: None for a small file, which the hub keeps in git."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size_bytes: int
    sha256: str | None


class Inventory(BaseModel):
    """What `fetch` has verified."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hub_id: str
    commit: str
    files: tuple[WeightFile, ...]


def fetch(profile: ModelProfile, revision: str, folder: Path, endpoint: str | None = None) -> str:
    """Fetch a profile's checkpoint and adapters into a folder; what is there already is kept. Returns the hub's commit.

    revision: the checkpoint's branch, tag or commit; all of it comes from the commit that this names now, and so does
    each adapter with its own revision. endpoint: another hub's.

    Raises ModelNotReady for a profile without a hub id, for a hub that can't be reached, and for a file whose size
    or SHA-256 is not the hub's; it is deleted then, so that the next run fetches it again.
    """
    if profile.hub_id is None:
        raise ModelNotReady(f"{profile.name} is not on the hub; there is nothing to fetch")
    try:
        info = HfApi(endpoint).model_info(profile.hub_id, revision=revision, files_metadata=True)
        commit = str(info.sha)
        snapshot_download(profile.hub_id, revision=commit, local_dir=folder, endpoint=endpoint)
    except Exception as error:  # the hub's client has errors of its own, of its HTTP library and of the system
        raise ModelNotReady(f"{profile.hub_id} could not be fetched from the hub: {error}") from error
    files = (
        *(_weight_file(file.rfilename, file) for file in info.siblings or ()),
        *_fetch_loras(profile, folder, endpoint),
    )
    for file in files:
        _verify(folder / file.path, file)
    inventory = Inventory(hub_id=profile.hub_id, commit=commit, files=files)
    (folder / INVENTORY).write_text(inventory.model_dump_json(indent=1))
    return commit


def _fetch_loras(profile: ModelProfile, folder: Path, endpoint: str | None) -> Iterator[WeightFile]:
    """Those of the hub, to where `locate_loras` looks for them."""
    for name, lora in profile.loras.items():
        if lora.hub_id is None or lora.weight_name is None:
            continue
        try:
            info = HfApi(endpoint).model_info(lora.hub_id, revision=lora.revision, files_metadata=True)
            found = next(file for file in info.siblings or () if file.rfilename == lora.weight_name)
            hf_hub_download(
                lora.hub_id,
                lora.weight_name,
                revision=str(info.sha),
                local_dir=folder / lora_folder(name),
                endpoint=endpoint,
            )
        except StopIteration as error:
            raise ModelNotReady(f"{lora.hub_id} on the hub has no {lora.weight_name}") from error
        except Exception as error:  # as above
            raise ModelNotReady(f"{lora.hub_id} could not be fetched from the hub: {error}") from error
        yield _weight_file(f"{lora_folder(name)}/{lora.weight_name}", found)


def _weight_file(path: str, file: RepoSibling) -> WeightFile:
    return WeightFile(path=path, size_bytes=file.size or 0, sha256=file.lfs.sha256 if file.lfs else None)


def check_whole(folder: Path) -> None:
    """Whether `fetch` has ended there. Raises ModelNotReady, in one line that says what to do."""
    again = "run `modal run -m serve_graph.modal_app::download_weights`"
    try:
        inventory = read_inventory((folder / INVENTORY).read_bytes())
    except FileNotFoundError as error:
        raise ModelNotReady(f"there are no whole weights in {folder}: {again}") from error
    for file in inventory.files:
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.size_bytes:
            raise ModelNotReady(f"{file.path} in {folder} is not whole: {again}")


def read_inventory(content: bytes) -> Inventory:
    """Raises ModelNotReady for what is none."""
    try:
        return Inventory.model_validate_json(content)
    except ValidationError as error:
        raise ModelNotReady(f"{INVENTORY} among the weights can't be read") from error


def _verify(path: Path, file: WeightFile) -> None:
    wrong = not path.is_file() or path.stat().st_size != file.size_bytes
    if not wrong and file.sha256 is not None:
        digest = hashlib.sha256()
        with path.open("rb") as content:
            while chunk := content.read(_CHUNK):
                digest.update(chunk)
        wrong = digest.hexdigest() != file.sha256
    if wrong:
        path.unlink(missing_ok=True)
        raise ModelNotReady(f"{file.path} did not come as the hub has it; run the download again")
