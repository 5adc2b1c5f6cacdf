"""Tests of programs of torch.export: what they answer, and that reading one runs no code that is in it."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.errors import InferenceError, ModelRefusedError, StartError
from service.model.backends import open_backend
from service.model.backends.exported_program import load_program
from service.model.backends.program_archive import clean_archive
from service.model.predictor import load_predictor
from tests import fakes

GRAPH = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
Graph = dict[str, Any]


class Net(torch.nn.Module):
    """Has what a net of pictures has: convolution, norm, a buffer, a constant, and a shape that the batch is in."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(1, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4 * 9, 5)
        self.mean = torch.nn.Buffer(torch.tensor(0.1))
        self.shift = torch.arange(5.0)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return logits (N, 5) of pictures (N, 1, 8, 8)."""
        hidden = torch.max_pool2d(torch.relu(self.norm(self.convolution(pictures - self.mean))), 2)
        logits: torch.Tensor = self.head(hidden.reshape(pictures.shape[0], -1)) + self.shift
        return logits


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Any:
    """Opening a program sets the threads of the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def net() -> Net:
    """A net from fixed parameters."""
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def content(net: Net) -> bytes:
    """Its program."""
    return fakes.build_program(net, torch.zeros(2, 1, 8, 8))


@pytest.fixture(scope="module")
def doubler() -> fakes.FakeModel:
    """The doubler, with a program too."""
    layer = torch.nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(0.0)
    fake = fakes.doubler()
    return replace(fake, contents=fake.contents | {"torch-export": fakes.build_program(layer, torch.zeros(2, 1))})


def open_program(content: bytes, device: str = "cpu") -> Any:
    """Open a program as the service does."""
    return open_backend("torch-export", content, fakes.doubler().manifest(), device, 1)


def rewrite(content: bytes, change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive whose parts, by name, were changed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(parts)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, part in parts.items():
            archive.writestr(f"net/{name}", part)
    return buffer.getvalue()


def edit_graph(content: bytes, change: Callable[[Graph], None], name: str = GRAPH) -> bytes:
    """Return an archive with one of its JSON parts changed."""

    def change_part(parts: dict[str, bytes]) -> None:
        graph = json.loads(parts[name])
        change(graph)
        parts[name] = json.dumps(graph).encode()

    return rewrite(content, change_part)


@pytest.mark.parametrize("rows", [1, 2, 7, 300])
def test_program_answers_as_its_net(net: Net, content: bytes, rows: int) -> None:
    """For any number of rows."""
    pictures = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows))
    with torch.inference_mode():
        expected = net(pictures).numpy()
    backend = open_program(content)
    assert (backend.name, backend.device, backend.provider) == ("torch-export", "cpu", f"torch {torch.__version__}")
    np.testing.assert_allclose(backend.run(pictures.numpy()), expected, rtol=1e-4, atol=1e-5)


def test_program_passes_the_checks_of_every_artifact(doubler: fakes.FakeModel, tmp_path: Path) -> None:
    """Its digest and its golden samples."""
    folder = fakes.write_version(tmp_path, doubler.only("torch-export"))
    for backend in ("auto", "torch-export"):
        predictor = load_predictor(folder, backend, "cpu")
        assert predictor.backend.name == "torch-export"
        assert predictor.predict(np.array([[3]], np.float32)).tolist() == [[6]]
    other = replace(doubler.only("torch-export"), version=2, more={"golden": {"inputs": [[1.0]], "outputs": [[3.0]]}})
    with pytest.raises(ModelRefusedError, match="its torch-export graph on cpu misses a golden output"):
        load_predictor(fakes.write_version(tmp_path, other), "torch-export", "cpu")
    with (folder / "model.pt2").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(ModelRefusedError, match=r"model\.pt2 has sha256"):
        load_predictor(folder, "torch-export", "cpu")


def test_cleaning_is_repeatable_and_leaves_no_trace(net: Net, content: bytes) -> None:
    """Equal nets give equal bytes, without paths of this machine and example inputs."""
    cleaned = clean_archive(content)
    assert clean_archive(cleaned) == cleaned
    assert clean_archive(fakes.build_program(net, torch.zeros(2, 1, 8, 8))) == cleaned
    assert __file__.encode() in content
    assert __file__.encode() not in cleaned
    assert b"pickle" not in cleaned.replace(b'"use_pickle": false', b"")


def test_program_that_fails_is_an_inference_error(content: bytes) -> None:
    """A wrong shape, which the service itself never sends."""
    with pytest.raises(InferenceError, match="torch: "):
        open_program(content).run(np.zeros((2, 3), np.float32))


def test_device_that_is_not_there_is_told(content: bytes) -> None:
    """As for TorchScript."""
    with pytest.raises(StartError, match="torch cannot use device 'cuda:99'"):
        open_program(content, "cuda:99")


class Trap:
    """A pickle that leaves a file behind where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        """Touch the file."""
        return (Path.touch, (self.path,))


def test_example_inputs_are_not_unpickled(content: bytes, tmp_path: Path) -> None:
    """torch.export.load would."""

    def set_trap(parts: dict[str, bytes]) -> None:
        buffer = io.BytesIO()
        torch.save(Trap(tmp_path / "sprung"), buffer)
        parts["data/sample_inputs/model.pt"] = buffer.getvalue()

    program = load_program(rewrite(content, set_trap))
    assert program.example_inputs is None
    assert not (tmp_path / "sprung").exists()


def test_pickled_weights_are_refused(content: bytes, tmp_path: Path) -> None:
    """Whether they say so, or are of the kind that has no other form."""

    def set_trap(parts: dict[str, bytes]) -> None:
        config = json.loads(parts[WEIGHTS])
        config["config"]["mean"]["use_pickle"] = True
        parts[WEIGHTS] = json.dumps(config).encode()
        parts["data/weights/weight_0"] = pickle.dumps(Trap(tmp_path / "sprung"))

    def add_object(parts: dict[str, bytes]) -> None:
        parts["data/constants/opaque_obj_0"] = pickle.dumps(Trap(tmp_path / "sprung"))

    with pytest.raises(ModelRefusedError, match="the program has pickled weights, which could run code"):
        load_program(rewrite(content, set_trap))
    with pytest.raises(ModelRefusedError, match="could run code: data/constants/opaque_obj_0"):
        load_program(rewrite(content, add_object))
    assert not (tmp_path / "sprung").exists()


def set_target(graph: Graph) -> None:
    """Call a function of the operating system by way of a module that torch imports."""
    graph["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"


def set_expression(graph: Graph) -> None:
    """Write Python where a size is evaluated."""
    sizes = graph["graph_module"]["graph"]["tensor_values"]["pictures"]["sizes"]
    sizes[0]["as_expr"]["expr_str"] = "Integer(__import__('os').getpid())"


def set_name(graph: Graph) -> None:
    """Write Python where the generated function has the name of an argument."""
    graph["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"] = "x=print(1)"


def set_weight_name(graph: Graph) -> None:
    """Write Python where the generated function has the name of a weight."""
    graph["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = 'a"),print(1),("'


def set_key(graph: Graph) -> None:
    """Write Python in a key."""
    graph["graph_module"]["graph"]["tensor_values"]["print(1)"] = {}


@pytest.mark.parametrize("change", [set_target, set_expression, set_name, set_weight_name, set_key])
def test_graph_with_code_is_refused(content: bytes, change: Callable[[Graph], None]) -> None:
    """Operators other than aten's, and texts that would be evaluated or compiled."""
    with pytest.raises(ModelRefusedError, match="that is not allowed, because it could run code"):
        clean_archive(edit_graph(content, change))


def test_other_ways_of_nesting_are_refused(content: bytes) -> None:
    """Only tuples, lists and dicts."""

    def set_tree(graph: Graph) -> None:
        tree = [1, {"type": "os.stat_result", "context": "null", "children_spec": []}]
        graph["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps(tree)

    with pytest.raises(ModelRefusedError, match=r"the program takes or gives os\.stat_result"):
        clean_archive(edit_graph(content, set_tree))


def test_compressed_archive_is_refused(content: bytes) -> None:
    """It could inflate to any size."""
    with pytest.raises(ModelRefusedError, match="archive is compressed"):
        clean_archive(rewrite(content, lambda parts: None, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", b"PK\x05\x06" + bytes(18)], ids=["empty", "png", "empty zip"])
def test_other_files_are_told_as_that(content: bytes) -> None:
    """With what writes a right one."""
    with pytest.raises(ModelRefusedError, match=r"the file is not a program of torch\.export; write one with"):
        clean_archive(content)


def test_torchscript_is_no_program() -> None:
    """Its archive has other parts."""
    with pytest.raises(ModelRefusedError, match=r"the file is not a program of torch\.export"):
        clean_archive(fakes.doubler().contents["torchscript"])


def test_program_of_two_inputs_is_refused() -> None:
    """One tensor is served."""

    class Sum(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Sum(), (torch.zeros(2, 1), torch.zeros(2, 1))), buffer)
    with pytest.raises(ModelRefusedError, match="the program takes 2 inputs and gives 1 outputs; one of each"):
        open_program(buffer.getvalue())
