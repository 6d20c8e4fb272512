"""The child: a head with a GPU's worth of work, nodes beside it, the graph on them. Obeys commands, a line each.

`python -m ray_cluster.process PLAN` (a JSON object of `Plan`) starts the head and one more node and deploys. For that
and for each command on its standard input it prints a line of JSON. The GPUs are Ray's bookkeeping only: the model is
where the settings in the environment say.

    add            another node; the answer has its number
    kill NUMBER    every process of the node at once, as a power cut does
    drain NUMBER   tell Ray that the node goes, as the preStop hook does; answers once its replicas have gone
    replicas       answers the nodes of each deployment's running replicas
    stop           everything ends
"""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from serve_graph.server import RAY_ENVIRONMENT, ServeConfig, load_config

PROJECT = Path(__file__).parents[2]
NODE = {"num_cpus": 8, "num_gpus": 1, "object_store_memory": 150 * 2**20}
"""As configs/rayservice.yaml's worker, but that the head is one, too."""

LOOK_S = 0.1


@dataclass(frozen=True)
class Plan:
    """token: a file with Ray's token. port: of the head's proxy. other_port: of all other nodes' (SO_REUSEPORT)."""

    token: str
    port: int
    other_port: int

    def line(self) -> str:
        return json.dumps(asdict(self))


class LocalCluster:
    """Nodes by number, in the order in which they came; 0 is the head."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        self._nodes: dict[int, Any] = {0: self._cluster.head_node}
        self._next = 1

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> int:
        number, self._next = self._next, self._next + 1
        self._nodes[number] = self._cluster.add_node(**NODE)
        return number

    def kill(self, number: int) -> int:
        """Returns how many processes there were."""
        node = self._nodes.pop(number)
        family = self._family(node)
        for end in (psutil.Process.suspend, psutil.Process.kill):  # none of them sees another one end
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    end(process)
        self._cluster.remove_node(node, allow_graceful=False)
        psutil.wait_procs(family, 10)
        return len(family)

    def drain(self, number: int, limit_s: float) -> float:
        """Returns after how many seconds no replica was left."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        node = self._nodes[number]
        began = time.monotonic()
        accepted, why = GcsClient(address=self.address).drain_node(
            node.node_id,
            autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION,
            "the pod is stopped",
            int((time.time() + limit_s) * 1_000),
        )
        assert accepted, why
        while any("ServeReplica:" in " ".join(_command(process)) for process in self._family(node)):
            assert time.monotonic() - began < limit_s, "replicas did not leave the node"
            time.sleep(LOOK_S)  # another process's end is seen in /proc only
        return time.monotonic() - began

    def number(self, node_id: str) -> int:
        return next((number for number, node in self._nodes.items() if node.node_id == node_id), -1)

    def shutdown(self) -> None:
        self._cluster.shutdown()

    @staticmethod
    def _family(node: Any) -> list[psutil.Process]:
        own = [info.process.pid for infos in node.all_processes.values() for info in infos]
        processes = [psutil.Process(pid) for pid in own if psutil.pid_exists(pid)]
        return [*processes, *(child for process in processes for child in process.children(recursive=True))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def main(plan: Plan) -> None:
    """Start, deploy, obey until `stop` or the end of the input."""
    os.environ.update(
        RAY_ENVIRONMENT,
        RAY_AUTH_TOKEN_PATH=plan.token,
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # loopback only
        RAY_SERVE_WORKER_PROXY_HTTP_PORT=str(plan.other_port),
        RAY_prestart_worker_first_driver="0",  # eight idle workers per node
    )
    began = time.monotonic()
    config = load_config(PROJECT / "configs/cluster.yaml", host="127.0.0.1", port=plan.port)
    cluster = LocalCluster()
    cluster.add()
    try:
        _deploy(cluster, config)
        _say(ready=round(time.monotonic() - began, 1))
        for line in sys.stdin:
            command, *numbers = line.split()
            if command == "stop":
                break
            _say(**_obey(cluster, config.app_name, command, *map(int, numbers)))
    finally:
        cluster.shutdown()


def _deploy(cluster: LocalCluster, config: ServeConfig) -> None:
    """As `wan-serve serve` does it, on a Ray that is there already."""
    import ray
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as worker_output

    from serve_graph.replica_lines import ReplicaLines
    from serve_graph.server import check_schema, deploy

    schema = check_schema(config.serve)
    ray.init(address=cluster.address, namespace="serve", configure_logging=False, log_to_driver=True)
    worker_output.remove_handler("ray_print_logs")
    worker_output.add_handler("wan", ReplicaLines())
    deploy(schema, config.app_name, threading.Event())


def _obey(cluster: LocalCluster, app_name: str, command: str, number: int = 0, limit_s: int = 0) -> dict[str, Any]:
    if command == "add":
        return {"added": cluster.add()}
    if command == "kill":
        return {"killed": cluster.kill(number), "at": time.time()}
    if command == "drain":
        return {"drained_s": round(cluster.drain(number, limit_s), 1)}
    return _replicas(cluster, app_name)


def _replicas(cluster: LocalCluster, app_name: str) -> dict[str, Any]:
    import ray
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ReplicaState

    instance = ray.get(_get_global_client()._controller.get_serve_instance_details.remote())
    return {
        name: sorted(
            cluster.number(replica["node_id"])
            for replica in deployment["replicas"]
            if replica["state"] == ReplicaState.RUNNING
        )
        for name, deployment in instance["applications"][app_name]["deployments"].items()
    }


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(Plan(**json.loads(sys.argv[1])))
