"""Artifacts are single files with a dynamic batch, equal for equal nets, and contain no path of the machine."""

import io
import re
import warnings
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from service.model.manifest import BackendName
from training.export import export
from training.nets import DigitsNet, ServingNet


def build_serving_net() -> ServingNet:
    """Return the digits net from fixed parameters."""
    torch.manual_seed(0)
    return ServingNet(DigitsNet(mean=0.1307, deviation=1.0), "multiclass").eval()


@pytest.fixture(scope="module")
def contents() -> dict[BackendName, bytes]:
    """Both artifacts of the digits net."""
    return export(build_serving_net(), (784,))


def test_onnx_tensors(contents: dict[BackendName, bytes]) -> None:
    """The graph has one input "inputs" and one output "outputs", both with a dynamic batch, and no external weights."""
    model = onnx.load_from_string(contents["onnx"])
    for values, name, width in ((model.graph.input, "inputs", 784), (model.graph.output, "outputs", 10)):
        assert [value.name for value in values] == [name]
        batch, columns = values[0].type.tensor_type.shape.dim
        assert batch.dim_param
        assert columns.dim_value == width
    assert all(weights.data_location != onnx.TensorProto.EXTERNAL for weights in model.graph.initializer)


@pytest.mark.parametrize("size", [1, 2, 7, 300])
def test_any_batch_size(contents: dict[BackendName, bytes], size: int) -> None:
    """Graphs traced with two instances work for any number."""
    inputs = torch.rand(size, 784, generator=torch.Generator().manual_seed(size))
    with torch.no_grad():
        expected = build_serving_net()(inputs).numpy()
    session = onnxruntime.InferenceSession(contents["onnx"])
    np.testing.assert_allclose(session.run(["outputs"], {"inputs": inputs.numpy()})[0], expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        module = torch.jit.load(io.BytesIO(contents["torchscript"]))  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(module(inputs).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_equal_nets_give_equal_bytes(contents: dict[BackendName, bytes]) -> None:
    """A second export in the same process gives the same bytes."""
    assert export(build_serving_net(), (784,)) == contents


def test_no_path_of_this_machine(contents: dict[BackendName, bytes]) -> None:
    """Neither artifact contains a path, a module of this machine or a stack trace."""
    archive = zipfile.ZipFile(io.BytesIO(contents["torchscript"]))
    readable = [
        contents["onnx"],
        *(archive.read(name) for name in archive.namelist() if name.endswith((".py", ".pkl"))),
    ]
    for content in readable:
        assert not re.search(rb"/(home|tmp|usr|work|root|Users|opt)/|site-packages|stack_trace|__main__", content)
    assert not [name for name in archive.namelist() if "debug" in name or "mangle" in name]


def test_tensors_are_aligned(contents: dict[BackendName, bytes]) -> None:
    """Entries of the TorchScript archive start at multiples of 64 bytes, uncompressed, as PyTorch writes them."""
    content = contents["torchscript"]
    for entry in zipfile.ZipFile(io.BytesIO(content)).infolist():
        name, extra = (int.from_bytes(content[entry.header_offset + at :][:2], "little") for at in (26, 28))
        assert (entry.header_offset + 30 + name + extra) % 64 == 0
        assert entry.compress_type == zipfile.ZIP_STORED
