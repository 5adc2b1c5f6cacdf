"""`python -m tests.ray.driver`: runs a Ray cluster of two nodes, with commands as lines of JSON on standard input.

It is a process of its own because Ray reads its environment on import, starts a dozen processes and leaves threads
behind. It replies to each line with one line: the result, or `{"error": …}`.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

CPUS = 2  # a node; replicas take a fraction of one


class Driver:
    """The cluster, and the commands that a test can send."""

    def __init__(self, port: int) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS, "include_dashboard": False})
        self._workers: list[Any] = []
        self.add_node()
        ray.init(self._cluster.address, log_to_driver=False, logging_level="ERROR")
        http = {"host": "127.0.0.1", "port": port, "request_timeout_s": 35}
        serve.start(proxy_location="HeadOnly", http_options=http)

    def add_node(self) -> None:
        """Add a node."""
        self._workers.append(self._cluster.add_node(num_cpus=CPUS))
        self._cluster.wait_for_nodes()

    def remove_node(self) -> None:
        """Kill a node that is not the head, and all that runs on it."""
        self._cluster.remove_node(self._workers.pop(), allow_graceful=False)

    def deploy(self, environment: dict[str, str], options: dict[str, Any]) -> None:
        """Deploy the application with these settings and deployment options, replacing the deployment before."""
        from service.hosts.ray import deployment  # noqa: PLC0415 - Ray reads its environment on import

        actor = options.pop("ray_actor_options", {}) | {"runtime_env": {"env_vars": environment}}
        options = {"autoscaling_config": None} | options
        if any(each.status == "DEPLOY_FAILED" for each in serve.status().applications.values()):
            serve.delete("default")  # or the next one would count as failed, too
        serve.run(deployment.options(ray_actor_options=actor, **options).bind(), blocking=False)

    def status(self) -> dict[str, Any]:
        """Return the state of the application, the number of replicas by state, and the ports of the metrics agents."""
        application = serve.status().applications["default"]
        states = next(iter(application.deployments.values())).replica_states
        ports = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]
        return {"application": application.status, "replicas": states, "metrics_ports": ports}

    def stop(self) -> None:
        """Stop the service and the cluster."""
        serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()


def main() -> None:
    """Start the cluster, and run commands until `stop`."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that Ray's own output is not taken for a reply

    def answer(content: object) -> None:
        print(json.dumps(content), file=replies, flush=True)

    driver = Driver(int(sys.argv[1]))
    answer("ready")
    for line in sys.stdin:
        order = json.loads(line)
        action: Callable[..., object] = getattr(driver, order.pop("do"))
        try:
            answer(action(**order))
        except Exception as error:
            traceback.print_exc()
            answer({"error": str(error)})
        if action == driver.stop:
            return


if __name__ == "__main__":
    main()
