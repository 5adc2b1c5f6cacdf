"""gRPC clients of other makers, unchanged: KServe's and MLServer's."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import fakes
from tests.contract.clients.environments import run_script
from tests.contract.clients.grpc_server import GrpcServer

KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest

async def main(address, rows):
    client = InferenceGRPCClient(address)
    assert await client.is_server_live() and await client.is_server_ready() and await client.is_model_ready("compass")
    for as_raw in (True, False):
        tensor = InferInput("inputs", list(rows.shape), "FP32")
        tensor.set_data_from_numpy(rows, binary_data=as_raw)
        answer = await client.infer(InferRequest("compass", [tensor]))
        found = {output.name: output.as_numpy() for output in answer.outputs}
        labels = [label.decode() for label in found["label"].tolist()]
        print(json.dumps({"outputs": found["outputs"].tolist(), "label": labels}))
    await client.close()

asyncio.run(main(sys.argv[1], np.array(json.loads(sys.argv[2]), np.float32)))
"""
MLSERVER = """
import json, sys
import grpc
import numpy as np
from mlserver.codecs import NumpyCodec
from mlserver.grpc import dataplane_pb2 as pb
from mlserver.grpc.converters import ModelInferRequestConverter, ModelInferResponseConverter
from mlserver.grpc.dataplane_pb2_grpc import GRPCInferenceServiceStub
from mlserver.types import InferenceRequest

rows = np.array(json.loads(sys.argv[2]), np.float32)
with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = GRPCInferenceServiceStub(channel)
    assert stub.ServerLive(pb.ServerLiveRequest()).live and stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="compass")).ready
    assert stub.ModelMetadata(pb.ModelMetadataRequest(name="compass")).inputs[0].datatype == "FP32"
    assert stub.RepositoryIndex(pb.RepositoryIndexRequest()).models[0].state == "READY"
    for use_raw in (True, False):
        request = InferenceRequest(inputs=[NumpyCodec.encode_input("inputs", rows)])  # the converter changes it
        message = ModelInferRequestConverter.from_types(request, "compass", "", use_raw=use_raw)
        answer = ModelInferResponseConverter.to_types(stub.ModelInfer(message))
        found = {output.name: output for output in answer.outputs}
        labels = [label.decode() for label in found["label"].data]
        print(json.dumps({"outputs": NumpyCodec.decode_output(found["outputs"]).tolist(), "label": labels}))
"""


@pytest.fixture(scope="module")
def server(models_dir: Path) -> Iterator[GrpcServer]:
    """A server with gRPC."""
    with GrpcServer(models_dir, "--workers", "1") as running:
        yield running


@pytest.mark.parametrize(("name", "script"), [("kserve", KSERVE), ("mlserver", MLSERVER)])
def test_client_works_unchanged(name: str, script: str, server: GrpcServer) -> None:
    """Health, and predictions with raw and with typed contents."""
    rows = [[0.0, 3.0], [5.0, 0.0]]
    logits = (np.array(rows, np.float32) @ fakes.COMPASS_WEIGHTS).tolist()
    expected = {"outputs": logits, "label": ["north", "east"]}
    assert run_script(name, script, server.address, json.dumps(rows)) == [expected, expected]
