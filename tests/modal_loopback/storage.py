"""What apps are made of and what they keep: blobs, mounts, images, Secrets and Volumes."""

import hashlib
import itertools
import shutil
from collections.abc import AsyncIterator, Mapping
from pathlib import Path, PurePosixPath

from grpclib import Status
from modal_proto import api_pb2
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from modal_loopback.records import Files, Image, Secret, Volume
from modal_loopback.rpc import refuse

BUILDER_VERSION = "2025.06"
"""The image builder of the one environment, unless MODAL_IMAGE_BUILDER_VERSION says otherwise."""

BLOCK_BYTES = 8 * 1024 * 1024
"""A Volume's files are read in blocks of this size. Source: modal._utils.blob_utils.BLOCK_SIZE."""


class Storage:
    """RPCs of objects that hold data, and HTTP for their bytes. `folder` gets a folder for each Volume."""

    def __init__(self, folder: Path, secrets: Mapping[str, Mapping[str, str]], ids: "itertools.count[int]") -> None:
        self.base_url = ""
        self.images: dict[str, Image] = {}
        self.mounts: dict[str, Files] = {}
        self.secrets: dict[str, Secret] = {}
        self.volumes: dict[str, Volume] = {}
        self._folder = folder
        self._ids = ids
        self._blobs: dict[str, bytes] = {}
        self._contents: dict[str, bytes] = {}  # of mounted and uploaded files, by sha256
        for name, env in secrets.items():
            self._add_secret(name, dict(env))

    def volume(self, name: str) -> Volume:
        """The Volume of that name, made if there is none yet."""
        found = next((volume for volume in self.volumes.values() if volume.name == name), None)
        if found is None:
            found = Volume(f"vo-{next(self._ids)}", name, self._folder / name)
            found.folder.mkdir(parents=True)
            self.volumes[found.volume_id] = found
        return found

    # Blobs: what is too large for a message

    def blob(self, blob_id: str) -> bytes:
        return self._blobs[blob_id]

    async def BlobCreate(self, request: api_pb2.BlobCreateRequest) -> api_pb2.BlobCreateResponse:
        blob_id = f"bl-{next(self._ids)}"
        urls = api_pb2.UploadUrlList(items=[f"{self.base_url}/blob/{blob_id}"])
        return api_pb2.BlobCreateResponse(blob_ids=[blob_id], upload_urls=urls)

    async def BlobGet(self, request: api_pb2.BlobGetRequest) -> api_pb2.BlobGetResponse:
        return api_pb2.BlobGetResponse(download_url=f"{self.base_url}/blob/{request.blob_id}")

    def routes(self) -> list[Route]:
        """HTTP for blobs and for the blocks of Volume files."""
        return [
            Route("/blob/{blob_id}", self._put_blob, methods=["PUT"]),
            Route("/blob/{blob_id}", self._get_blob),
            Route("/volume/{volume_id}/{block:int}/{path:path}", self._get_block),
        ]

    async def _put_blob(self, request: Request) -> Response:
        data = self._blobs[request.path_params["blob_id"]] = await request.body()
        return Response(headers={"etag": f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'})

    async def _get_blob(self, request: Request) -> Response:
        return Response(self._blobs[request.path_params["blob_id"]])

    async def _get_block(self, request: Request) -> Response:
        volume, path = self.volumes[request.path_params["volume_id"]], request.path_params["path"]
        with _inside(volume, path).open("rb") as file:
            file.seek(request.path_params["block"] * BLOCK_BYTES)
            return Response(file.read(BLOCK_BYTES))

    # Mounts: files of this machine, for containers and Volumes

    async def MountBatchedCheckExistence(
        self, request: api_pb2.MountBatchedCheckExistenceRequest
    ) -> api_pb2.MountBatchedCheckExistenceResponse:
        missing = [digest for digest in request.sha256_hex_hashes if digest not in self._contents]
        return api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def MountPutFile(self, request: api_pb2.MountPutFileRequest) -> api_pb2.MountPutFileResponse:
        match request.WhichOneof("data_oneof"):  # an empty file has `data`, and it is empty
            case "data":
                self._contents[request.sha256_hex] = request.data
            case "data_blob_id":
                self._contents[request.sha256_hex] = self._blobs[request.data_blob_id]
        return api_pb2.MountPutFileResponse(exists=request.sha256_hex in self._contents)

    async def MountGetOrCreate(self, request: api_pb2.MountGetOrCreateRequest) -> api_pb2.MountGetOrCreateResponse:
        """Also the mounts that Modal itself publishes by name (its client, its Pythons), which are empty here."""
        mount_id = f"mo-{next(self._ids)}"
        self.mounts[mount_id] = {file.filename: self._contents[file.sha256_hex] for file in request.files}
        return api_pb2.MountGetOrCreateResponse(mount_id=mount_id)

    # Images

    async def ImageGetOrCreate(self, request: api_pb2.ImageGetOrCreateRequest) -> api_pb2.ImageGetOrCreateResponse:
        """An image is built at once, and nothing is run for it."""
        if request.image.HasField("build_function"):
            refuse(Status.UNIMPLEMENTED, "The loopback Modal runs no build functions.")
        image = Image(
            image_id=f"im-{next(self._ids)}",
            commands=tuple(request.image.dockerfile_commands),
            bases=tuple(self.images[base.image_id] for base in request.image.base_images),
            files=self.mounts.get(request.image.context_mount_id, {}),
            builder_version=request.builder_version,
        )
        self.images[image.image_id] = image
        return api_pb2.ImageGetOrCreateResponse(
            image_id=image.image_id,
            result=api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS),
            metadata=api_pb2.ImageMetadata(image_builder_version=request.builder_version),
        )

    # Secrets

    async def SecretGetOrCreate(self, request: api_pb2.SecretGetOrCreateRequest) -> api_pb2.SecretGetOrCreateResponse:
        if request.object_creation_type:
            secret = self._add_secret(request.deployment_name, dict(request.env_dict))
        else:
            secret = self._find_secret(request.deployment_name, set(request.required_keys))
        metadata = api_pb2.SecretMetadata(name=secret.name, keys=sorted(secret.env))
        return api_pb2.SecretGetOrCreateResponse(secret_id=secret.secret_id, metadata=metadata)

    def _add_secret(self, name: str, env: dict[str, str]) -> Secret:
        secret = Secret(f"st-{next(self._ids)}", name, env)
        self.secrets[secret.secret_id] = secret
        return secret

    def _find_secret(self, name: str, required_keys: set[str]) -> Secret:
        secret = next((secret for secret in self.secrets.values() if secret.name == name), None)
        if secret is None:
            refuse(Status.NOT_FOUND, f"Secret '{name}' not found in environment 'main'.")
        if missing := required_keys - secret.env.keys():
            refuse(Status.INVALID_ARGUMENT, f"Secret '{name}' is missing the required keys {sorted(missing)}.")
        secret.required_keys |= required_keys
        return secret

    # Volumes

    async def VolumeGetOrCreate(self, request: api_pb2.VolumeGetOrCreateRequest) -> api_pb2.VolumeGetOrCreateResponse:
        known = any(volume.name == request.deployment_name for volume in self.volumes.values())
        if not known and not request.object_creation_type:
            refuse(Status.NOT_FOUND, f"Volume '{request.deployment_name}' not found in environment 'main'.")
        volume = self.volume(request.deployment_name)
        return api_pb2.VolumeGetOrCreateResponse(volume_id=volume.volume_id, metadata=volume_metadata(volume))

    async def VolumeCommit(self, request: api_pb2.VolumeCommitRequest) -> api_pb2.VolumeCommitResponse:
        return api_pb2.VolumeCommitResponse(skip_reload=True)

    async def VolumeReload(self, request: api_pb2.VolumeReloadRequest) -> None: ...

    async def VolumePutFiles(self, request: api_pb2.VolumePutFilesRequest) -> None:
        volume = self.volumes[request.volume_id]
        for file in request.files:
            path = _inside(volume, file.filename)
            if path.exists() and request.disallow_overwrite_existing_files:
                refuse(Status.ALREADY_EXISTS, f"{file.filename}: already exists")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._contents[file.sha256_hex])

    async def VolumeListFiles(
        self, request: api_pb2.VolumeListFilesRequest
    ) -> AsyncIterator[api_pb2.VolumeListFilesResponse]:
        volume = self.volumes[request.volume_id]
        path = _existing(volume, request.path)
        found = [path] if path.is_file() else sorted(path.rglob("*") if request.recursive else path.iterdir())
        yield api_pb2.VolumeListFilesResponse(entries=[_entry(volume, each) for each in found])

    async def VolumeGetFile2(self, request: api_pb2.VolumeGetFile2Request) -> api_pb2.VolumeGetFile2Response:
        if request.start or request.len:
            refuse(Status.UNIMPLEMENTED, "The loopback Modal reads whole files of Volumes only.")
        volume = self.volumes[request.volume_id]
        path = _existing(volume, request.path)
        size, name = path.stat().st_size, path.relative_to(volume.folder).as_posix()
        blocks = range(-(-size // BLOCK_BYTES))
        urls = [f"{self.base_url}/volume/{volume.volume_id}/{block}/{name}" for block in blocks]
        return api_pb2.VolumeGetFile2Response(get_urls=urls, size=size, len=size)

    async def VolumeRemoveFile(self, request: api_pb2.VolumeRemoveFileRequest) -> None:
        path = _existing(self.volumes[request.volume_id], request.path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def volume_metadata(volume: Volume) -> api_pb2.VolumeMetadata:
    return api_pb2.VolumeMetadata(name=volume.name, version=api_pb2.VOLUME_FS_VERSION_V1)


def _inside(volume: Volume, path: str) -> Path:
    relative = PurePosixPath("/", path).relative_to("/")
    if ".." in relative.parts:
        refuse(Status.INVALID_ARGUMENT, f"{path}: not below the Volume")
    return volume.folder / relative


def _existing(volume: Volume, path: str) -> Path:
    found = _inside(volume, path)
    if not found.exists():
        refuse(Status.NOT_FOUND, f"{path}: no such file or directory")
    return found


def _entry(volume: Volume, path: Path) -> api_pb2.FileEntry:
    is_file, status = path.is_file(), path.stat()
    return api_pb2.FileEntry(
        path=path.relative_to(volume.folder).as_posix(),
        type=api_pb2.FileEntry.FILE if is_file else api_pb2.FileEntry.DIRECTORY,
        mtime=int(status.st_mtime),
        size=status.st_size if is_file else 0,
    )
