"""Weights from a hub: whole or not there. The hub is one on loopback."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_on_loopback import COMMIT, LARGE, LORA, LORA_HUB_ID, PROFILE, SMALL, STRANGER, Hub

from schemas.errors import ModelNotReady
from schemas.loras import Lora
from schemas.official_profiles import WAN_TINY
from serve_graph.engine.checkpoint_folder import locate_loras
from serve_graph.on_modal.weights import INVENTORY, check_whole, fetch


@pytest.fixture
def hub() -> Iterator[Hub]:
    with contextlib.closing(Hub()) as opened:
        yield opened


def test_weights_come_whole_from_one_commit_and_are_not_fetched_again(tmp_path: Path, hub: Hub) -> None:
    assert fetch(PROFILE, "main", tmp_path, hub.url) == COMMIT

    assert (tmp_path / LARGE).read_bytes() == hub.files[LARGE]
    check_whole(tmp_path)
    inventory = json.loads((tmp_path / INVENTORY).read_text())
    assert (inventory["commit"], {file["path"] for file in inventory["files"]}) == (COMMIT, {SMALL, LARGE})
    hub.asked.clear()
    fetch(PROFILE, COMMIT, tmp_path, hub.url)
    assert [line for line in hub.asked if line.startswith("GET") and LARGE in line] == []


def test_a_file_that_is_not_the_hub_s_is_refused_and_fetched_anew(tmp_path: Path, hub: Hub) -> None:
    hub.files[LARGE] = hub.files[LARGE][::-1]
    with pytest.raises(ModelNotReady, match="did not come as the hub has it"):
        fetch(PROFILE, "main", tmp_path, hub.url)
    with pytest.raises(ModelNotReady, match="no whole weights"):
        check_whole(tmp_path)

    hub.files = dict(hub.told)
    fetch(PROFILE, "main", tmp_path, hub.url)
    check_whole(tmp_path)


def test_a_folder_that_lost_a_file_since_is_not_whole(tmp_path: Path, hub: Hub) -> None:
    fetch(PROFILE, "main", tmp_path, hub.url)
    (tmp_path / LARGE).write_bytes(b"short")

    with pytest.raises(ModelNotReady, match=f"{LARGE} in .* is not whole: run `modal run"):
        check_whole(tmp_path)


def test_a_hub_that_is_away_is_told(tmp_path: Path, hub: Hub) -> None:
    hub.server.server_close()
    with pytest.raises(ModelNotReady, match="could not be fetched from the hub"):
        fetch(PROFILE, "main", tmp_path, "http://127.0.0.1:9")


WITH_LORA = PROFILE.model_copy(
    update={"loras": {"ink": Lora(hub_id=LORA_HUB_ID, weight_name=LORA), "local": Lora(description="no hub's")}}
)


def test_adapters_come_with_the_weights_to_where_the_generator_looks(tmp_path: Path, hub: Hub) -> None:
    fetch(WITH_LORA, "main", tmp_path, hub.url)

    found = locate_loras({"ink": WITH_LORA.loras["ink"]}, {}, tmp_path)["ink"]
    assert found.read_bytes() == hub.loras[LORA]
    assert found.is_relative_to(tmp_path)
    assert not [line for line in hub.asked if STRANGER in line]
    check_whole(tmp_path)
    found.unlink()
    with pytest.raises(ModelNotReady, match=r"ink\.safetensors in .* is not whole"):
        check_whole(tmp_path)


def test_an_adapter_that_the_hub_has_not_is_told(tmp_path: Path, hub: Hub) -> None:
    loras = {"ink": Lora(hub_id=LORA_HUB_ID, weight_name="gone.safetensors")}

    with pytest.raises(ModelNotReady, match=f"{LORA_HUB_ID} on the hub has no gone.safetensors"):
        fetch(PROFILE.model_copy(update={"loras": loras}), "main", tmp_path, hub.url)
    with pytest.raises(ModelNotReady, match="no whole weights"):
        check_whole(tmp_path)


def test_a_profile_that_is_made_here_has_nothing_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(ModelNotReady, match="nothing to fetch"):
        fetch(WAN_TINY, "main", tmp_path)
