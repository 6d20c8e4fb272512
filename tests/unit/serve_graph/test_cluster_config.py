"""configs/cluster.yaml, configs/rayservice.yaml and the Dockerfile: that they fit each other, the code and Ray.

What KubeRay and a container engine make of them needs a cluster and is not shown here.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import serve_graph
from serve_graph import server
from serve_graph.api.auth import OPEN_ROUTES
from serve_graph.api_keys import new_key
from serve_graph.app import build_app
from serve_graph.server import RAY_ENVIRONMENT, ServeConfig, load_config
from serve_graph.settings import SECRET_NAMES, ConfigError

PROJECT = Path(serve_graph.__file__).parents[1]
CLUSTER = PROJECT / "configs/cluster.yaml"
PLACE = {
    "WAN_PUBLIC_URL": "https://wan.example.com",
    "WAN_STORAGE__S3__ENDPOINT": "https://s3.example.com",
    "WAN_STORAGE__S3__BUCKET": "clips",
}
SECRETS = {
    "WAN_S3_ACCESS_KEY": "an otter",
    "WAN_S3_SECRET_KEY": "correct horse",
    "WAN_SIGNING_SECRET": "battery staple everywhere",
    "WAN_API_KEYS": new_key("alice")[1],
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What every node has."""
    for name, value in {**PLACE, **SECRETS}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def cluster(environment: pytest.MonkeyPatch) -> ServeConfig:
    return load_config(CLUSTER)


@pytest.fixture
def deployments(cluster: ServeConfig) -> dict[str, dict[str, Any]]:
    return {deployment["name"]: deployment for deployment in cluster.serve["applications"][0]["deployments"]}


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """The RayService's spec."""
    document = yaml.safe_load((PROJECT / "configs/rayservice.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayService")
    spec: dict[str, Any] = document["spec"]
    return spec


def workers(manifest: dict[str, Any]) -> dict[str, Any]:
    (group,) = manifest["rayClusterConfig"]["workerGroupSpecs"]
    found: dict[str, Any] = group
    return found


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    head = manifest["rayClusterConfig"]["headGroupSpec"]
    return [head["template"]["spec"], workers(manifest)["template"]["spec"]]


# ---- the Serve config


def test_cluster_config_is_one_that_we_and_serve_accept(cluster: ServeConfig) -> None:
    schema = server.check_schema(cluster.serve)

    assert schema.proxy_location == "EveryNode"
    assert cluster.settings.storage.kind == "s3"
    assert cluster.settings.public_url == PLACE["WAN_PUBLIC_URL"]


def test_cluster_config_holds_no_secret_and_no_place(cluster: ServeConfig) -> None:
    text = CLUSTER.read_text()

    assert not [value for value in SECRETS.values() if value in str(cluster.serve)]
    assert not [value for value in PLACE.values() if value in yaml.safe_dump(yaml.safe_load(text))]


@pytest.mark.parametrize("missing", ["WAN_API_KEYS", "WAN_SIGNING_SECRET"])
def test_neither_serve_deploy_nor_we_start_without_a_secret(environment: pytest.MonkeyPatch, missing: str) -> None:
    """`serve deploy` calls the builder with the file's args, and knows none of our checks before it."""
    environment.delenv(missing)

    with pytest.raises(ConfigError, match=missing):
        load_config(CLUSTER)
    with pytest.raises(ConfigError, match=missing):
        build_app(yaml.safe_load(CLUSTER.read_text())["applications"][0]["args"])


def test_as_many_jobs_are_handed_out_as_the_largest_cluster_takes(
    cluster: ServeConfig, deployments: dict[str, dict[str, Any]]
) -> None:
    """Or the generators would never look busy enough to be given another one."""
    settings, generator = cluster.settings, deployments["Generator"]
    scaling = generator["autoscaling_config"]
    handed_out = deployments["Ingress"]["num_replicas"] * settings.max_dispatched_jobs

    assert scaling["target_ongoing_requests"] <= settings.engine.max_jobs_in_flight
    assert handed_out >= scaling["max_replicas"] * scaling["target_ongoing_requests"]
    assert generator["max_ongoing_requests"] >= handed_out + 16  # health and metrics get through to the last one


def test_what_is_stopped_may_end_the_longest_job(cluster: ServeConfig, deployments: dict[str, dict[str, Any]]) -> None:
    queue = cluster.settings.queue
    generator, ingress = (deployments[name]["graceful_shutdown_timeout_s"] for name in ("Generator", "Ingress"))

    assert generator > queue.max_run_time_s
    assert ingress > queue.max_run_time_s + queue.drain_timeout_s


# ---- the manifest


def test_the_manifest_holds_the_serve_config_itself(manifest: dict[str, Any]) -> None:
    text = CLUSTER.read_text()

    assert manifest["serveConfigV2"] == text[text.index("proxy_location") :]


def test_the_smallest_cluster_has_room_for_the_fewest_replicas(
    manifest: dict[str, Any], deployments: dict[str, dict[str, Any]]
) -> None:
    group = workers(manifest)
    (container,) = group["template"]["spec"]["containers"]
    has = {name: int(container["resources"]["limits"][resource]) for name, resource in RESOURCES.items()}
    needs = {name: sum(d["ray_actor_options"].get(name, 0) for d in deployments.values()) for name in RESOURCES}

    assert all(has[name] >= needs[name] for name in RESOURCES)  # one of each per node
    for name in ("Ingress", "Preprocessor"):
        assert deployments[name]["max_replicas_per_node"] == 1
        assert deployments[name]["num_replicas"] <= group["minReplicas"]
    scaling = deployments["Generator"]["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (group["minReplicas"], group["maxReplicas"])
    assert manifest["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(deployment["ray_actor_options"]["num_cpus"] for deployment in deployments.values())  # none on the head


RESOURCES = {"num_cpus": "cpu", "num_gpus": "nvidia.com/gpu"}


def test_a_pod_that_is_stopped_may_drain(manifest: dict[str, Any], deployments: dict[str, dict[str, Any]]) -> None:
    """Serve stops a replica its shutdown time before the node's deadline, which comes before Kubernetes' own."""
    pod = workers(manifest)["template"]["spec"]
    (container,) = pod["containers"]
    hook = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    found = re.search(r"--deadline-remaining-seconds (\d+)", hook)
    assert found is not None
    longest = max(deployments[name]["graceful_shutdown_timeout_s"] for name in ("Generator", "Ingress"))

    assert longest + 120 < int(found[1]) < pod["terminationGracePeriodSeconds"] - 60
    assert manifest["rayClusterDeletionDelaySeconds"] > longest


def test_a_drain_waits_for_replicas_by_the_name_that_serve_gives_them(manifest: dict[str, Any]) -> None:
    (container,) = workers(manifest)["template"]["spec"]["containers"]
    hook = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    pattern = re.search(r"pgrep -f '(.+?)'", hook)
    assert pattern is not None

    assert re.search(pattern[1], "ray::ServeReplica:wan:Generator")
    assert not re.search(pattern[1], hook)  # or it would wait for itself


def test_every_pod_has_the_place_the_secrets_and_ray_s_token(manifest: dict[str, Any]) -> None:
    text = (PROJECT / "configs/rayservice.yaml").read_text()

    assert manifest["rayClusterConfig"]["authOptions"] == {"mode": "token", "secretName": "wan-ray-token"}
    for pod in pods(manifest):
        (container,) = pod["containers"]
        assert container["image"] == "wan-serve:0.1.0"
        assert {"secretRef": {"name": "wan-serve"}} in container["envFrom"]
        assert {"configMapRef": {"name": "wan-serve"}} in container["envFrom"]
        assert "env" not in container
    for name in (*PLACE, *SECRETS):
        assert name in text
    assert set(SECRETS) <= SECRET_NAMES


def test_weights_are_mounted_read_only_where_the_config_looks(manifest: dict[str, Any], cluster: ServeConfig) -> None:
    pod = workers(manifest)["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}

    assert mounts.keys() == volumes.keys()
    assert mounts["weights"]["readOnly"]
    assert volumes["weights"]["persistentVolumeClaim"]["readOnly"]
    assert cluster.settings.model.path is not None
    assert cluster.settings.model.path.is_relative_to(mounts["weights"]["mountPath"])
    assert cluster.settings.data_dir == Path(mounts["data"]["mountPath"])


def test_probes_ask_what_is_answered(manifest: dict[str, Any], cluster: ServeConfig) -> None:
    """Serve's proxy answers /-/healthz itself; the load balancer is told to ask a route of ours."""
    (container,) = workers(manifest)["template"]["spec"]["containers"]
    (told,) = re.findall(r"GET (/\S+)\.", (PROJECT / "configs/rayservice.yaml").read_text())

    probe = container["readinessProbe"]["httpGet"]
    assert probe == {"path": "/-/healthz", "port": cluster.port}
    assert told in OPEN_ROUTES
    assert manifest["serveService"]["spec"]["ports"][0]["targetPort"] == cluster.port
    assert cluster.port in [port["containerPort"] for port in container["ports"]]


def test_the_manifest_is_for_the_ray_that_is_installed(manifest: dict[str, Any]) -> None:
    import ray

    assert manifest["rayClusterConfig"]["rayVersion"] == ray.__version__


# ---- the image


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (PROJECT / "Dockerfile").read_text()


def test_the_image_sets_what_a_start_on_one_machine_sets(dockerfile: str) -> None:
    (block,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", dockerfile, re.MULTILINE)

    assert dict(part.split("=", 1) for part in block.replace("\\\n", " ").split()) == RAY_ENVIRONMENT


def test_the_image_copies_what_there_is_and_what_the_build_may_see(dockerfile: str) -> None:
    copied = [word for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE) for word in line.split()[:-1]]
    seen = re.findall(r"^!(.+)$", (PROJECT / ".dockerignore").read_text(), re.MULTILINE)

    assert sorted(copied) == sorted(seen)
    assert all((PROJECT / name).exists() for name in copied)


def test_the_image_runs_as_a_user_of_its_own_whose_folder_the_cluster_uses(
    dockerfile: str, cluster: ServeConfig
) -> None:
    assert f"--owner wan --mode 0700 {cluster.settings.data_dir}" in dockerfile
    assert "\nUSER wan\n" in dockerfile
