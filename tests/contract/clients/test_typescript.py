"""A TypeScript client generated from `/openapi.json`, and two linters of the document, all from npm.

Sources: https://openapi-ts.dev, https://redocly.com/docs/cli and https://docs.stoplight.io/docs/spectral
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import columns, fakes
from tests.contract.clients.environments import SECONDS, find_client
from tests.servers import Server

CALLER = """
import createClient from "openapi-fetch";
import type { paths } from "./schema";

declare const process: { argv: string[] };
const client = createClient<paths>({ baseUrl: process.argv[2] });
const home = { age: 40, rooms: 2, garden: true, remark: null, since: "1970-01-02T00:00:00Z" };
const predict = "/v1/models/house:predict";
const { data, error } = await client.POST(predict, { body: { instances: [{ ...home, city: "Oslo" }] } });
if (data === undefined) throw new Error(error.error);
const age: number = data.predictions[0].prediction.age;
console.log(JSON.stringify({ ...data.predictions[0].prediction, age }));
// @ts-expect-error: the category has no such value
const refused = await client.POST(predict, { body: { instances: [{ ...home, city: "Osl" }] } });
console.log(JSON.stringify([refused.response.status, refused.error?.error]));
const tensor = { name: "inputs" as const, shape: [1, 2], datatype: "FP32" as const, data: [0, 3] };
const tensors = await client.POST("/v2/models/compass/infer", { body: { inputs: [tensor] } });
if (tensors.data === undefined || typeof tensors.data === "string") throw new Error("it is JSON or binary data");
console.log(JSON.stringify(tensors.data.outputs.at(-1)?.data));
"""
OPTIONS = {"strict": True, "module": "es2022", "moduleResolution": "bundler", "target": "es2022", "types": []}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with models of every input and task."""
    root = tmp_path_factory.mktemp("typed") / "models"
    columns.write_house(root)
    for build in fakes.GOOD:
        fakes.write_version(root, build())
    with Server(root, "--workers", "1") as running:
        yield running


@pytest.fixture
def project(tmp_path: Path, server: Server) -> Path:
    """A folder with the document, and the packages of npm."""
    if shutil.which("node") is None:
        pytest.skip("there is no node; apt-get install nodejs npm")
    (tmp_path / "node_modules").symlink_to(find_client("npm", "node_modules"))
    document = server.get("/openapi.json").json()
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "package.json").write_text('{"type": "module"}')
    return tmp_path


def run(folder: Path, program: str, *arguments: str) -> str:
    """Run a program of npm in a folder, and return what it prints."""
    command = ["node", *([f"node_modules/.bin/{program}"] if program else []), *arguments]
    quiet = {"REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true", "NODE_NO_WARNINGS": "1"}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False, env=os.environ | quiet
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_generated_client_type_checks_and_predicts(project: Path, server: Server) -> None:
    """Columns and categories have types, and so has the answer."""
    run(project, "openapi-typescript", "openapi.json", "--output", "schema.d.ts")
    (project / "caller.ts").write_text(CALLER)
    (project / "tsconfig.json").write_text(json.dumps({"compilerOptions": OPTIONS, "include": ["caller.ts"]}))
    run(project, "tsc", "--project", ".")
    told = [json.loads(line) for line in run(project, "", "caller.js", server.url).splitlines()]
    assert told[0] == {"age": 40.0, "rooms": 2.0, "garden": 1.0, "city": 2.0, "remark": -1.0, "since": 1.0}
    assert (told[1][0], 'instances[0].city is "Osl"' in told[1][1]) == (400, True)
    assert told[2] == ["north"]


def test_linters_find_no_error(project: Path) -> None:
    """Redocly and Spectral, with the rules that they recommend."""
    assert "valid" in run(project, "redocly", "lint", "openapi.json")
    (project / "rules.yaml").write_text("extends: spectral:oas\n")
    run(project, "spectral", "lint", "openapi.json", "--ruleset", "rules.yaml", "--fail-severity", "error")
