"""`python -m tests.ray.driver`: a Ray of two nodes on this machine, told what to do by lines of JSON on standard input.

Ray wants its environment set before it is imported, starts a dozen processes and leaves threads behind, so it has a
process of its own. Each line is answered by one line: what was asked for, or `{"error": …}`.
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
    """The cluster, and what a test may ask of it."""

    def __init__(self, port: int) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS, "include_dashboard": False})
        self._workers: list[Any] = []
        self.add_node()
        ray.init(self._cluster.address, log_to_driver=False, logging_level="ERROR")
        http = {"host": "127.0.0.1", "port": port, "request_timeout_s": 35}
        serve.start(proxy_location="HeadOnly", http_options=http)

    def add_node(self) -> None:
        """Start one more node."""
        self._workers.append(self._cluster.add_node(num_cpus=CPUS))
        self._cluster.wait_for_nodes()

    def remove_node(self) -> None:
        """End a node that is not the head, with all that runs there, at once."""
        self._cluster.remove_node(self._workers.pop(), allow_graceful=False)

    def deploy(self, environment: dict[str, str], options: dict[str, Any]) -> None:
        """Serve the application with these settings and deployment options, in the place of what was served."""
        from service.hosts.ray import deployment  # noqa: PLC0415 - Ray reads its environment when it is imported

        actor = options.pop("ray_actor_options", {}) | {"runtime_env": {"env_vars": environment}}
        options = {"autoscaling_config": None} | options
        if any(each.status == "DEPLOY_FAILED" for each in serve.status().applications.values()):
            serve.delete("default")  # or the next one is taken to have failed as well
        serve.run(deployment.options(ray_actor_options=actor, **options).bind(), blocking=False)

    def status(self) -> dict[str, Any]:
        """Return how many replicas are in each state, the state of the application, and where metrics are."""
        application = serve.status().applications["default"]
        states = next(iter(application.deployments.values())).replica_states
        ports = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]
        return {"application": application.status, "replicas": states, "metrics_ports": ports}

    def stop(self) -> None:
        """End everything."""
        serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()


def main() -> None:
    """Start, and do as told until told to stop."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer

    def answer(content: object) -> None:
        print(json.dumps(content), file=answers, flush=True)

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
