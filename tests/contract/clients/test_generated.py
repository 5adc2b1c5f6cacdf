"""A client that openapi-python-client generates for a model with columns: it type-checks, and predicts.

Source: https://github.com/openapi-generators/openapi-python-client
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import columns
from tests.servers import Server

pytest.importorskip("openapi_python_client", reason="it generates the client; it is in the dev extra")
CALLER = """
import sys
from datetime import UTC, datetime

from generated import Client
from generated.api.house import predict_house
from generated.models import HouseRequest, HouseResponse
from generated.models import HouseRequestInstancesItemType0 as House
from generated.models import HouseRequestInstancesItemType0City as City

home = House(age=40.0, rooms=2, garden=True, city=City.OSLO, since=datetime(1970, 1, 2, tzinfo=UTC))
answer = predict_house.sync(client=Client(base_url=sys.argv[1]), body=HouseRequest(instances=[home]))
assert isinstance(answer, HouseResponse), answer
print(answer.predictions[0].prediction.to_dict())
"""


def run(folder: Path, *arguments: str) -> str:
    """Run a Python module or script in a folder, and return what it prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_generated_client_type_checks_and_predicts(tmp_path: Path) -> None:
    """Columns are arguments with types, categories an enum, and the answer's values attributes."""
    columns.write_house(tmp_path / "models")
    (tmp_path / "options.yaml").write_text("post_hooks: []\n")
    (tmp_path / "caller.py").write_text(CALLER)
    with Server(tmp_path / "models", "--workers", "1") as server:
        (tmp_path / "openapi.json").write_text(json.dumps(server.get("/openapi.json").json()))
        made = ("--path", "openapi.json", "--output-path", "generated", "--meta", "none", "--config", "options.yaml")
        assert "Warning" not in run(tmp_path, "-m", "openapi_python_client", "generate", *made)
        assert "Success" in run(tmp_path, "-m", "mypy", "--strict", "--follow-imports=silent", "caller.py")
        told = run(tmp_path, "caller.py", server.url)
    values = {"age": 40.0, "rooms": 2.0, "garden": 1.0, "city": 2.0, "remark": -1.0, "since": 1.0}
    assert told.strip() == str(values)
