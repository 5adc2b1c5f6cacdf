"""What an operator reads in the log: what is served, what changes, how it ends, and nothing in another format."""

import json
import re
from pathlib import Path

import pytest
from onnx import helper

from tests import fakes
from tests.servers import ROOT, Server
from tests.wire import wait_until


def messages(server: Server) -> list[tuple[str, str]]:
    """Return level and message of each line of a log in JSON; a line in another format fails the test."""
    lines = [json.loads(line) for line in server.log().splitlines()]
    return [(line["level"], line["message"]) for line in lines if line["logger"] != "access"]


def test_log_tells_what_is_served_from_start_to_end(empty_dir: Path) -> None:
    """One line for each version at the start and at each change, for a rollback, the signal and the end; no more."""
    for version in (1, 2):
        fakes.write_version(empty_dir, fakes.doubler(version=version))
    fakes.write_version(empty_dir, fakes.coin().only("torchscript"))
    flags = ("--workers", "2", "--device", "cpu", "--reload-interval", "0", "--log-format", "json")
    with Server(empty_dir, *flags) as server:
        wait_until(lambda: sum("serving doubler" in text for _, text in messages(server)) == 2)
        for action, name in (("rollback", "doubler"), ("unload", "coin"), ("load", "coin")):
            assert server.post(f"/v2/repository/models/{name}/{action}").status_code == 200
        assert server.stop() == 0
        found = [text for level, text in messages(server) if level == "info"]
    assert found[-2:] == ["received SIGTERM, draining", "stopped"]
    rest = [re.sub(r"torch [\w.+]+", "torch", text) for text in found[:-2] if not text.startswith("serving on http")]
    assert rest == [
        "serving coin version 1 by torchscript on cpu (torch)",
        "serving doubler version 1 by onnx on cpu (CPUExecutionProvider)",
        "serving doubler version 2 by onnx on cpu (CPUExecutionProvider)",
        "the latest version of doubler is now 1, not 2",
        "no longer serving coin version 1",
        "serving coin version 1 by torchscript on cpu (torch)",
    ]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_onnxruntime_writes_nothing_of_its_own(log_format: str, empty_dir: Path) -> None:
    """A graph that fails, at its check or on a caller's tensors, is told of in the service's own lines alone."""
    fakes.write_version(empty_dir, fakes.picky())
    whole = ("INT64", [-1])
    node = helper.make_node("Add", ["a", "b"], ["sum"])
    fakes.write_signature(empty_dir, "adder", {"a": whole, "b": whole}, {"sum": whole}, node)
    with Server(empty_dir, "--workers", "1", "--log-format", log_format) as server:
        tensors = [
            {"name": name, "datatype": "INT64", "shape": [size], "data": [1] * size}
            for name, size in zip("ab", (2, 3), strict=True)
        ]
        assert server.post("/v2/models/adder/infer", json={"inputs": tensors}).status_code == 400
        wait_until(lambda: "does not take these tensors" in server.log())
        text = server.log()
    assert "picky" in text
    start = r'\{"time": ' if log_format == "json" else r"\d{4}-\d\d-\d\d [\d:,]+ (INFO|ERROR) (service|access): "
    assert [line for line in text.splitlines() if not re.match(start, line)] == []


def test_failure_has_one_traceback(models_dir: Path, tmp_path: Path) -> None:
    """What goes wrong on a path that is no prediction is answered 500 and logged once, under the request's id."""
    broken = "import prometheus_client\n\ndef fail(*_):\n    raise ValueError('no figures')\n"
    (tmp_path / "sitecustomize.py").write_text(broken + "\nprometheus_client.generate_latest = fail\n")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with Server(models_dir, "--workers", "1", "--reload-interval", "0", environment=environment) as server:
        answer = server.get("/metrics", headers={"X-Request-ID": "mine"})
        assert answer.status_code == 500
        assert answer.json() == {"error": "the model failed to answer this request"}
        assert server.get("/v1/models").status_code == 200
        assert server.log().count("ValueError: no figures") == 1  # the end of its traceback
        assert "ERROR service: request mine failed" in server.log()
