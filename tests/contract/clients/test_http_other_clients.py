"""HTTP clients of other makers, unchanged: KServe's, MLServer's codecs, and PyTriton's."""

import base64
import json
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests import columns, fakes
from tests.contract.clients.environments import run_script
from tests.contract.clients.grpc_server import GrpcServer

ROWS = [[0.0, 3.0], [5.0, 0.0]]
LOGITS = (np.array(ROWS, np.float32) @ fakes.COMPASS_WEIGHTS).tolist()
KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

async def main(url, rows):
    for protocol in ("v2", "v1"):
        client = InferenceRESTClient(RESTConfig(protocol=protocol))
        assert await client.is_server_live(url)
        if protocol == "v2":
            assert await client.is_server_ready(url)
        assert await client.is_model_ready(url, "compass")
        if protocol == "v1":
            answer = await client.infer(url, {"instances": rows.tolist()}, model_name="compass")
            print(json.dumps([each["label"] for each in answer["predictions"]]))
            continue
        for binary in (True, False):
            tensor = InferInput("input-0", list(rows.shape), "FP32")
            tensor.set_data_from_numpy(rows, binary_data=binary)
            answer = await client.infer(url, InferRequest("compass", [tensor]), model_name="compass")
            print(json.dumps({output.name: output.as_numpy().tolist() for output in answer.outputs}["outputs"]))
        await client.close()

asyncio.run(main(sys.argv[1], np.array(json.loads(sys.argv[2]), np.float32)))
"""
MLSERVER = """
import base64, json, sys, urllib.request
import numpy as np
import pandas as pd
from mlserver.codecs import Base64Codec, NumpyCodec, NumpyRequestCodec, PandasCodec
from mlserver.types import InferenceRequest, InferenceResponse

def infer(model, request):
    body = request.model_dump_json().encode()
    sent = urllib.request.Request(f"{sys.argv[1]}/v2/models/{model}/infer", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(sent, timeout=60) as answer:
        return InferenceResponse.model_validate_json(answer.read())

rows = np.array(json.loads(sys.argv[2]), np.float64)
answer = infer("compass", NumpyRequestCodec.encode_request(rows))
print(json.dumps(NumpyCodec.decode_output(answer.outputs[0]).tolist()))
table = pd.DataFrame(json.loads(sys.argv[3])).astype({name: object for name in ("city", "remark", "since")})
answer = infer("house", PandasCodec.encode_request(table, use_bytes=False))
print(json.dumps(NumpyCodec.decode_output(answer.outputs[0]).tolist()))
answer = infer("box", PandasCodec.encode_request(pd.DataFrame({"a": [1.0, 2.0], "b": [3, 4]})))
print(json.dumps(NumpyCodec.decode_output(answer.outputs[0]).tolist()))
picture = Base64Codec.encode_input("picture", [base64.b64decode(sys.argv[4])], use_bytes=False)
answer = infer("canvas", InferenceRequest(inputs=[picture]))
print(json.dumps([output.shape for output in answer.outputs if output.name == "prediction"]))
"""
PYTRITON = """
import json, sys
import numpy as np
from pytriton.client import ModelClient

rows = np.array(json.loads(sys.argv[2]), np.float32)
with ModelClient(sys.argv[1], "compass") as client:
    print(json.dumps({name: array.tolist() for name, array in client.infer_batch(rows).items() if name != "label"}))
    sample = client.infer_sample(rows[0])
    print(json.dumps({name: np.shape(array) for name, array in sample.items()}))
    print(json.dumps([int(sample["prediction"]), sample["label"].decode()]))
    config = client.model_config
    print(json.dumps({spec.name: spec.shape for spec in (*config.inputs, *config.outputs)}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcServer]:
    """A server with gRPC and a model each of numbers, columns and pictures."""
    root = tmp_path_factory.mktemp("others") / "models"
    for fake in (fakes.compass(), fakes.canvas(), columns.house(), columns.box()):
        fakes.write_version(root, fake)
    with GrpcServer(root, "--workers", "1") as running:
        yield running


def test_kserve(server: GrpcServer) -> None:
    """Health and predictions of both its protocols, with a tensor's name of its own."""
    assert run_script("kserve", KSERVE, server.url, json.dumps(ROWS)) == [LOGITS, LOGITS, ["north", "east"]]


def test_mlserver(server: GrpcServer) -> None:
    """Arrays of float64, tables with nulls, and pictures, as its codecs write them."""
    table = {
        "age": [40.0, None], "rooms": [2, 4], "garden": [True, False], "city": ["Oslo", "Bonn"],
        "remark": ["fine", "none"], "since": ["1970-01-03T12:00:00Z", "1970-01-01"],
    }  # fmt: skip
    file = BytesIO()
    Image.new("L", (28, 28)).save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    answers = run_script("mlserver", MLSERVER, server.url, json.dumps(ROWS), json.dumps(table), picture)
    houses = [[40.0, 2.0, 1.0, 2.0, 1.0, 2.5], [-1.0, 4.0, 0.0, 6.0, -1.0, 0.0]]
    assert answers == [LOGITS, houses, [[1.0, 3.0], [2.0, 4.0]], [[1]]]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_pytriton(scheme: str, server: GrpcServer) -> None:
    """A batch, and a sample, which has the configuration's shapes; one of `prediction` and `label` is a scalar."""
    url = server.url if scheme == "http" else f"grpc://{server.address}"
    batch, shapes, first, described = run_script("nvidia-pytriton", PYTRITON, url, json.dumps(ROWS))
    assert (batch["outputs"], batch["prediction"], first) == (LOGITS, [0, 1], [0, "north"])
    assert shapes == {"outputs": [4], "prediction": [], "probabilities": [4], "label": []}
    assert described == {"inputs": [2]} | {name: shape or [1] for name, shape in shapes.items()}
