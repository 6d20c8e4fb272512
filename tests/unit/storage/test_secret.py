"""The secret: where it comes from, who may read it, and that everyone has the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

import storage
from schemas.errors import StoreUnavailable
from storage.local import LocalStore
from storage.secret import derive, load_secret

LOAD = """
import pathlib, sys
from storage.secret import load_secret
input()
print(load_secret(None, pathlib.Path(sys.argv[1])).hex())
"""


def test_load_secret_prefers_the_configured_one(tmp_path: Path) -> None:
    assert load_secret(SecretStr("sixteen letters!"), tmp_path) == b"sixteen letters!"
    assert list(tmp_path.iterdir()) == []


def test_load_secret_refuses_a_short_one_without_showing_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 16 characters") as refusal:
        load_secret(SecretStr("fifteen letters"), tmp_path)
    assert "fifteen" not in str(refusal.value)


def test_load_secret_makes_one_and_keeps_it(tmp_path: Path) -> None:
    made = load_secret(None, tmp_path / "new")
    assert len(made) == 32
    assert load_secret(None, tmp_path / "new") == made
    assert load_secret(None, tmp_path / "other") != made


@pytest.mark.parametrize("mask", [0o000, 0o277])
def test_load_secret_leaves_one_private_file_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        load_secret(None, tmp_path)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == [".secret"]
    assert (tmp_path / ".secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o610])
def test_load_secret_refuses_a_file_that_others_can_use(tmp_path: Path, mode: int) -> None:
    load_secret(None, tmp_path)
    (tmp_path / ".secret").chmod(mode)
    with pytest.raises(ValueError, match="read by others") as refusal:
        load_secret(None, tmp_path)
    assert str(tmp_path) not in str(refusal.value)


@pytest.mark.parametrize("damaged", [b"", b"x" * 31, b"x" * 33])
def test_load_secret_refuses_a_damaged_file(tmp_path: Path, damaged: bytes) -> None:
    load_secret(None, tmp_path)
    (tmp_path / ".secret").write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        load_secret(None, tmp_path)


def test_load_secret_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"x" * 32)
    (tmp_path / "outside").chmod(0o600)
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / ".secret").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreUnavailable):
        load_secret(None, folder)


def test_load_secret_gives_racing_processes_the_same_one(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(tmp_path / "store")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(Path(storage.__file__).parents[1])},
        )
        for _ in range(8)
    ]
    secrets = {process.communicate("go\n", timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 8
    assert secrets == {load_secret(None, tmp_path / "store").hex() + "\n"}


def test_load_secret_keeps_what_another_process_made_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_secret(None, tmp_path)
    monkeypatch.setattr("os.path.lexists", lambda _path: False)  # this process looked just before
    assert load_secret(None, tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [".secret"]


def test_load_secret_is_no_object_of_the_store_beside_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    load_secret(None, tmp_path)
    assert store.list("").stats == ()


def test_derive_separates_purposes_and_secrets() -> None:
    keys = {derive(secret, purpose) for secret in (b"a" * 32, b"b" * 32) for purpose in ("urls", "prompts", "")}
    assert len(keys) == 6
    assert {len(key) for key in keys} == {32}
    assert derive(b"a" * 32, "urls") == derive(b"a" * 32, "urls")
