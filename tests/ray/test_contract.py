"""The contract tests, unchanged, against the application on Ray Serve: clients see no difference between hosts.

Left out are the files about the host itself: `test_failures_*` (death of workers, signals, slow heads, connection
limits, metrics summed over workers), `test_reload` and `test_own_models` (servers with flags of their own, coordination
of workers), `test_playground` (a browser), `test_published_models` and `test_tracing`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray.cluster import RayServer
from tests.servers import ROOT

ADMIN_KEY = "for-the-tests"  # on Ray there is no token of the command line
SUITE = ("predictions", "bad_input", "operations", "images", "protocol_clients", "protocol_malformed")
OTHER_SERVERS = (  # these start a second server
    "tests/contract/test_operations.py::test_device_and_provider_are_what_runs",
    "tests/contract/test_operations.py::test_need_for_a_key_is_described",
    "tests/contract/test_operations.py::test_description_is_small_compressed_and_can_be_of_one_model",
    "tests/contract/test_operations.py::test_versions_of_other_inputs_have_operations_of_their_own",
    "tests/contract/test_operations.py::test_golden_outputs_are_the_example_of_an_answer",
    "tests/contract/test_operations.py::test_more_instances_than_the_queue_takes_do_not_match",
    "tests/contract/test_operations.py::test_answer_that_not_all_is_ready_is_as_described",
    "tests/contract/test_images.py::test_digits_that_a_person_draws_are_read",
    "tests/contract/test_images.py::test_many_large_pictures_are_read_in_turn_and_in_time",
    "tests/contract/test_images.py::test_hairline_is_a_digit",
    "tests/contract/test_images.py::test_colour_pictures_are_previewed_as_they_are_predicted",
)


@pytest.mark.parametrize("names", [SUITE, ("protocol_tensors",)], ids=["/v1 and /v2", "tensors"])
def test_contract(names: tuple[str, ...], cluster: RayServer, doubler: Path) -> None:
    """Every test of these files passes against the application on Ray, whose replica follows the models folder."""
    cluster.deploy(doubler, {"SERVICE_ADMIN_KEY": ADMIN_KEY}, num_replicas=1)
    keys = {"SERVICE_TEST_ADMIN_KEY": ADMIN_KEY}
    files = [f"tests/contract/test_{name}.py" for name in names]
    flags = [word for test in OTHER_SERVERS for word in ("--deselect", test)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.ray.elsewhere", "-p", "no:cacheprovider", *flags, *files],
        cwd=ROOT,
        env=os.environ | {"SERVICE_TEST_URL": cluster.url, "SERVICE_TEST_MODELS_DIR": str(doubler)} | keys,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    print(done.stdout.splitlines()[-1])


def test_settings_and_ids(cluster: RayServer, doubler: Path) -> None:
    """The settings are the environment variables of our own host; the response repeats the request id once."""
    cluster.deploy(doubler, {"SERVICE_API_KEY": "secret"})
    refused = cluster.predict("doubler", [[2]])
    assert (refused.status_code, list(refused.json())) == (401, ["error"])
    answer = cluster.post(
        "/v1/models/doubler:predict", json={"instances": [[2]]}, headers={"X-API-Key": "secret", "X-Request-ID": "n1"}
    )
    assert answer.json()["predictions"] == [{"prediction": 4.0}]
    assert answer.headers["X-Request-ID"] == "n1"
