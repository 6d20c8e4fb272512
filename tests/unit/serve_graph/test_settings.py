"""Settings: the environment over the file, whatever is unknown refused by name, secrets nowhere."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.loras import Lora
from schemas.official_profiles import PROFILES, WAN_1_3B, WAN_14B_FEW_STEP
from serve_graph.api_keys import new_key
from serve_graph.settings import (
    CLIENT_NAMES,
    SECRET_NAMES,
    ConfigError,
    Secrets,
    Settings,
    check_cluster,
    read_settings,
    webhook_signer,
)
from serve_graph.webhooks.policy import WebhookPolicy

SECRET = "correct horse battery staple"
WEBHOOK_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def refusal(args: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        read_settings(args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_read_settings_has_a_default_for_everything() -> None:
    settings = read_settings({})

    assert settings.profile == PROFILES["wan-tiny"]
    assert settings.storage.kind == "local"
    assert settings.queue.max_waiting_jobs == 256
    assert settings.max_dispatched_jobs == settings.engine.max_jobs_in_flight + settings.queue.prefetch
    assert settings.max_body_bytes == 64 * 1024


def test_read_settings_takes_the_files_values() -> None:
    settings = read_settings({"url_ttl_s": 60, "model": {"profile": "wan2.1-t2v-14b", "device": "cuda"}})

    assert settings.default_url_ttl.total_seconds() == 60
    assert settings.profile.name == "wan2.1-t2v-14b"
    assert settings.model.device == "cuda"


@pytest.mark.parametrize("name", ["WAN_MODEL__PROFILE", "wan_model__profile", "WAN_Model__Profile"])
def test_environment_goes_over_the_file(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "wan2.1-t2v-1.3b")

    assert read_settings({"model": {"profile": "wan-tiny"}}).profile.name == "wan2.1-t2v-1.3b"


OWN = WAN_1_3B.model_copy(update={"name": "ours", "max_num_frames": 33})


def test_a_profile_of_ones_own_in_the_file_or_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings({"model": {"profile": OWN.model_dump(mode="json")}}).profile == OWN

    monkeypatch.setenv("WAN_MODEL__PROFILE", OWN.model_dump_json())
    assert read_settings({"model": {"profile": "wan-tiny"}}).profile == OWN


def test_a_profile_that_lacks_something_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"model\.profile\.hub_id: Field required"):
        read_settings({"model": {"profile": OWN.model_dump(mode="json", exclude={"hub_id"})}})


def test_environment_leaves_the_rest_of_a_section_to_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_QUEUE__PREFETCH", "5")
    settings = read_settings({"queue": {"max_waiting_jobs": 9, "prefetch": 1}, "url_ttl_s": 60})

    assert (settings.queue.prefetch, settings.queue.max_waiting_jobs, settings.url_ttl_s) == (5, 9, 60)


def test_environment_reads_numbers_and_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WAN_URL_TTL_S", "90")
    monkeypatch.setenv("WAN_STORAGE__FOLDER", str(tmp_path / "clips"))
    settings = read_settings({})

    assert settings.url_ttl_s == 90
    assert settings.storage.folder == tmp_path / "clips"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"modle": {}}, "unknown setting modle"),
        ({"model": {"profil": "wan-tiny"}}, "unknown setting model.profil"),
        ({"queue": {"max_waiting": 1}}, "unknown setting queue.max_waiting"),
        ({"signing_secret": SECRET}, "unknown setting signing_secret"),
    ],
)
def test_read_settings_refuses_an_unknown_setting_by_name(args: dict[str, Any], named: str) -> None:
    message = refusal(args)

    assert message == named
    assert SECRET not in message


@pytest.mark.parametrize("name", sorted(CLIENT_NAMES))
def test_read_settings_lets_the_client_s_variables_be(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "anything")

    assert read_settings({}).profile.name == "wan-tiny"


@pytest.mark.parametrize(
    "name",
    [
        *("WAN_MODLE__PROFILE", "WAN_MODEL_PROFILE", "WAN_PROFILE", "WAN_", "WAN__MODEL", "wan_profile"),
        *("WAN_MODEL__PROFIL", "WAN_MODEL__PROFILE__X", "WAN_DATA_DIR__X", "WAN_SIGNING_SECRETS"),
    ],
)
def test_read_settings_refuses_an_unknown_variable_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "wan-tiny")
    message = refusal({})

    spelled = name.lower().removeprefix("wan_").replace("__", ".")
    assert name in message or spelled in message or spelled.rpartition(".")[0] in message


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "SWAN_MODEL", "WAN"])
def test_read_settings_leaves_the_variables_of_others_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "x")

    read_settings({})


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"url_ttl_s": 0}, "url_ttl_s"),
        ({"url_ttl_s": 8 * 24 * 3600}, "url_ttl_s"),
        ({"max_body_bytes": 10}, "max_body_bytes"),
        ({"log_level": "loud"}, "log_level"),
        ({"storage": {"kind": "s4"}}, "storage.kind"),
        ({"queue": {"max_waiting_jobs": 0}}, "queue.max_waiting_jobs"),
        ({"queue": {"max_waiting_jobs": "many"}}, "queue.max_waiting_jobs"),
        ({"engine": {"max_jobs_in_flight": 0}}, "engine.max_jobs_in_flight"),
        ({"encode": {"crf": 52}}, "encode.crf"),
        ({"encode": {"preset": "fasst"}}, "encode.preset"),
        ({"model": {"device": "gpu"}}, "model.device"),
        ({"model": {"text_device": "cuda:x"}}, "model.text_device"),
        ({"model": {"dtype": "int8"}}, "model.dtype"),
        ({"model": "wan-tiny"}, "model"),
    ],
)
def test_read_settings_refuses_a_bad_value_by_name(args: dict[str, Any], named: str) -> None:
    assert refusal(args).startswith(f"{named}: ")


def test_read_settings_names_the_profiles_that_there_are() -> None:
    message = refusal({"model": {"profile": "wan3"}})

    assert "'wan3'" in message
    assert all(name in message for name in PROFILES)


@pytest.mark.parametrize(("name", "value"), [("WAN_MODEL", "wan-tiny"), ("WAN_MODEL", "{}"), ("WAN_URL_TTL_S", "soon")])
def test_read_settings_refuses_a_variable_that_can_not_be_read_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    assert name.removeprefix("WAN_").lower() in refusal({}).lower()


def test_read_settings_refuses_arguments_that_are_no_settings() -> None:
    with pytest.raises(ConfigError):
        read_settings({1: 2})  # type: ignore[dict-item]  # YAML may hold it


def test_read_settings_makes_relative_folders_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = read_settings({"data_dir": "d", "storage": {"folder": "s"}, "model": {"path": "m"}})

    assert settings.data_dir == tmp_path / "d"
    assert settings.storage.folder == tmp_path / "s"
    assert settings.model.path == tmp_path / "m"
    assert settings.spool_dir == tmp_path / "d/spool"


def test_public_url_is_the_configured_one_else_the_listeners() -> None:
    assert read_settings({}, public_url="http://127.0.0.1:8000").public_url == "http://127.0.0.1:8000"
    own = read_settings({"public_url": "https://clips.example"}, public_url="http://127.0.0.1:8000")
    assert own.public_url == "https://clips.example"


def test_settings_can_not_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read_settings({}).url_ttl_s = 5  # type: ignore[misc]  # that it is refused is the point


def test_secrets_are_never_in_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_SIGNING_SECRET", SECRET)
    settings = read_settings({})

    shown = f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert SECRET not in shown
    assert "signing_secret" not in shown


def test_secrets_come_from_the_environment_and_hide_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_SIGNING_SECRET", SECRET)
    secrets = Secrets()

    assert secrets.signing_secret is not None
    assert secrets.signing_secret.get_secret_value() == SECRET
    assert SECRET not in f"{secrets!r} {secrets} {secrets.model_dump()} {secrets.model_dump_json()}"
    assert {f"WAN_{name.upper()}" for name in Secrets.model_fields} == SECRET_NAMES


def test_settings_survive_the_way_to_a_replica() -> None:
    settings = read_settings({"model": {"profile": "wan2.1-t2v-14b"}, "url_ttl_s": 60})

    assert read_settings(settings.model_dump(mode="json")) == settings


def test_every_setting_says_what_it_is() -> None:
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and hasattr(section, "model_fields"):
            assert section.__doc__
            assert all(part.description for part in section.model_fields.values()), name
        else:
            assert field.description or name == "log_level", name


def test_urls_that_would_outlive_their_clips_are_refused() -> None:
    s3 = {"endpoint": "http://127.0.0.1:9000", "bucket": "clips"}
    storage = {"kind": "s3", "s3": s3, "clip_retention_days": 1}

    assert read_settings({"storage": storage, "url_ttl_s": 86_400}).storage.clip_retention == timedelta(days=1)
    with pytest.raises(ConfigError, match="outlives"):
        read_settings({"storage": storage, "url_ttl_s": 86_401})
    assert read_settings({"storage": storage | {"kind": "local"}, "url_ttl_s": 86_401}).storage.clip_retention is None


@pytest.mark.parametrize("given", [None, "", "  "])
def test_webhook_signer_is_absent_without_a_secret(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    monkeypatch.delenv("WAN_WEBHOOK_SECRET", raising=False)
    if given is not None:
        monkeypatch.setenv("WAN_WEBHOOK_SECRET", given)

    assert webhook_signer() is None


def test_webhook_signer_signs_with_the_environments_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_WEBHOOK_SECRET", f"{WEBHOOK_SECRET} {WEBHOOK_SECRET}")
    signer = webhook_signer()

    assert signer is not None
    headers = signer.headers("msg_1", datetime.now(UTC), "{}")
    assert len(headers["webhook-signature"].split()) == 2


def test_webhook_signer_refuses_a_secret_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_WEBHOOK_SECRET", SECRET)

    with pytest.raises(ConfigError, match="whsec_") as caught:
        webhook_signer()
    assert SECRET not in str(caught.value)


def test_webhooks_go_to_public_https_only_by_default() -> None:
    webhooks = read_settings({}).webhooks

    assert webhooks.policy(can_sign=True) == WebhookPolicy()
    assert webhooks.timeout == timedelta(seconds=10)


def test_webhook_settings_make_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_WEBHOOKS__ALLOW_HTTP", "true")
    webhooks = read_settings({"webhooks": {"allow_private_addresses": True}}).webhooks

    assert webhooks.policy(can_sign=False) == WebhookPolicy(
        allow_http=True, allow_private_addresses=True, can_sign=False
    )


# ---- a cluster

BUCKET = {"kind": "s3", "s3": {"endpoint": "https://s3.example.com", "bucket": "clips"}}


def test_a_cluster_needs_a_bucket() -> None:
    assert "storage.kind must be s3" in refusal({"cluster": True})


def test_a_cluster_needs_the_same_secret_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """One made on the spot is a machine's own: the same Idempotency-Key would make a job per machine."""
    monkeypatch.setenv("WAN_API_KEYS", new_key("alice")[1])
    settings = read_settings({"cluster": True, "storage": BUCKET})

    with pytest.raises(ConfigError, match="WAN_SIGNING_SECRET"):
        check_cluster(settings)
    monkeypatch.setenv("WAN_SIGNING_SECRET", SECRET)
    check_cluster(settings)


def test_a_cluster_asks_for_keys_unless_it_says_that_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_SIGNING_SECRET", SECRET)

    with pytest.raises(ConfigError, match="WAN_API_KEYS"):
        check_cluster(read_settings({"cluster": True, "storage": BUCKET}))
    check_cluster(read_settings({"cluster": True, "storage": BUCKET, "auth": "none"}))


def test_one_machine_needs_nothing_of_that() -> None:
    check_cluster(read_settings({}))


LORAS = {"style": {"path": "style.safetensors", "description": "Ink on paper."}}


def test_loras_of_the_file_or_the_environment_are_the_served_profile_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = read_settings({"model": {"loras": LORAS}})

    assert settings.profile.loras == {"style": Lora(description="Ink on paper.")}
    assert settings.model.lora_paths == {"style": tmp_path / "style.safetensors"}
    assert "path" not in settings.profile.model_dump_json()  # `GET /models` shows the profile
    assert Settings(**settings.model_dump(mode="json")) == settings
    monkeypatch.setenv("WAN_MODEL__LORAS", json.dumps(LORAS))
    assert read_settings({}).profile == settings.profile


def test_loras_of_the_profile_stay_and_are_changed_where_the_settings_say_so() -> None:
    name, own = next(iter(WAN_14B_FEW_STEP.loras.items()))
    model = {"profile": WAN_14B_FEW_STEP.name, "loras": {**LORAS, name: {"path": "/here.safetensors"}}}
    settings = read_settings({"model": model})

    assert settings.profile.loras == {name: own, "style": Lora(description="Ink on paper.")}
    assert settings.model.lora_paths[name] == Path("/here.safetensors")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"model": {"loras": {"style": {"file": "x"}}}}, "unknown setting model.loras.style.file"),
        ({"model": {"loras": {"Style": {}}}}, "model.loras.Style"),
        ({"model": {"loras": {"style": {"weight": 3}}}}, "model.loras.style.weight: "),
        ({"model": {"loras": "style"}}, "model.loras: "),
        (
            {"model": {"loras": LORAS}, "engine": {"compile": "regional"}},
            "compiled blocks take no LoRA adapters: set engine.compile: off",
        ),
    ],
)
def test_loras_that_can_not_be_served_are_refused_in_one_line(args: dict[str, Any], says: str) -> None:
    assert says in refusal(args)
