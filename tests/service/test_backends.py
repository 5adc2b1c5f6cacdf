"""Tests of service.model.backends."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from service.errors import InferenceError, ModelRefusedError, StartError
from service.model import backends
from service.model.backends import (
    choose_backends,
    choose_device,
    describe_unused_gpu,
    list_accelerators,
    onnx_runtime,
    open_backend,
)
from service.model.backends.onnx_runtime import check_self_contained, open_session
from service.model.manifest import BackendName
from tests import fakes

NAMES: tuple[BackendName, ...] = ("onnx", "torchscript")


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Any:
    """Opening a TorchScript graph sets the threads of the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def open_fake(fake: fakes.FakeModel, name: BackendName) -> backends.Backend:
    """Open one artifact on the CPU."""
    return open_backend(name, fake.contents[name], fake.manifest(), "cpu", 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2, 7, 256])
def test_backends_agree_with_eager_torch_and_numpy(name: BackendName, rows: int) -> None:
    """For any number of rows both backends give what eager torch and plain numpy give."""
    inputs = np.random.default_rng(rows).normal(size=(rows, 2)).astype(np.float32)
    outputs = open_fake(fakes.compass(), name).run(inputs)
    assert outputs.dtype == np.float32
    assert outputs.shape == (rows, 4)
    np.testing.assert_allclose(outputs, inputs @ fakes.COMPASS_WEIGHTS, rtol=1e-6)
    probabilities = open_fake(fakes.coin(), name).run(inputs)
    expected = torch.sigmoid(torch.from_numpy(inputs[:, :1] - inputs[:, 1:])).numpy()
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_backends_say_what_really_runs(name: BackendName) -> None:
    """`device` and `provider` are of what was opened."""
    backend = open_fake(fakes.doubler(), name)
    expected = {"onnx": "CPUExecutionProvider", "torchscript": f"torch {torch.__version__}"}[name]
    assert (backend.name, backend.device, backend.provider) == (name, "cpu", expected)


@pytest.mark.parametrize("name", NAMES)
def test_backends_answer_from_any_thread(name: BackendName) -> None:
    """Many threads at once get the rows that belong to them."""
    backend = open_fake(fakes.doubler(), name)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: backend.run(np.full((3, 1), n, np.float32)), range(64)))
    for number, answer in enumerate(answers):
        assert (answer == 2 * number).all()


@pytest.mark.parametrize("name", NAMES)
def test_graph_that_fails_is_an_inference_error(name: BackendName) -> None:
    """Rows that the graph cannot take become InferenceError, whatever the library raised."""
    with pytest.raises(InferenceError):
        open_fake(fakes.doubler(), name).run(np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + b"x" * 100])
def test_bytes_that_are_no_graph_are_refused(name: BackendName, content: bytes) -> None:
    """A file that is no graph is refused with one line."""
    with pytest.raises(ModelRefusedError, match="cannot load the graph") as caught:
        open_backend(name, content, fakes.doubler().manifest(), "cpu", 1)
    assert "\n" not in str(caught.value)


def _graph(inputs: list[Any], outputs: list[Any], nodes: list[Any]) -> bytes:
    model = helper.make_model(
        helper.make_graph(nodes, "fake", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )
    content: bytes = model.SerializeToString()
    return content


def _value(name: str, shape: list[Any] | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _same(*names: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Identity", [source], [target]) for source, target in zip(names[::2], names[1::2], strict=True)
    ]


def _zipmap() -> bytes:
    """Return what skl2onnx makes of a classifier unless told otherwise: a list of mappings."""
    node = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0])
    numbers = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, numbers))
    graph = helper.make_graph([node], "fake", [_value("x", ["batch", 1])], [helper.make_value_info("y", kind)])
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    content: bytes = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    return content


ROW = ["batch", 1]
X, Y = _value("x", ROW), _value("y", ROW)
ZIPMAP = _zipmap()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_graph([X, _value("z", ROW)], [Y], _same("x", "y")), "the graph's inputs are x, z; name one with --input-"),
        (_graph([X], [Y, _value("z", ROW)], _same("x", "y", "x", "z")), "the graph's outputs are y, z; name one"),
        (_graph([_value("x", [1, 1])], [Y], _same("x", "y")), "batch size is fixed at 1; export it with a"),
        (_graph([_value("x", ["batch", 4])], [_value("y", ["batch", 4])], _same("x", "y")), "the graph takes [4] per"),
        (
            _graph([_value("x", ROW, TensorProto.DOUBLE)], [_value("y", ROW, TensorProto.DOUBLE)], _same("x", "y")),
            "the graph's input x is tensor(double), expected tensor(float)",
        ),
        (
            _graph([X], [_value("y", ROW, TensorProto.INT64)], [helper.make_node("Cast", ["x"], ["y"], to=7)]),
            "the graph's output y is tensor(int64), expected tensor(float)",
        ),
        (ZIPMAP, 'y is seq(map(int64,tensor(float))), expected tensor(float); export it with to_onnx(…, options={"zip'),
    ],
)  # fmt: skip
def test_onnx_graph_of_other_tensors_is_refused(content: bytes, message: str) -> None:
    """A graph whose tensors are not the manifest's is refused with a sentence that names them."""
    with pytest.raises(ModelRefusedError) as caught:
        open_backend("onnx", content, fakes.doubler().manifest(), "cpu", 1)
    assert message in str(caught.value)


@pytest.mark.parametrize("size", [1, 4096])
def test_onnx_graph_without_its_weights_is_refused(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in a file beside the graph are outside every digest; also where that file lies in the working folder."""
    weights = {"weights": np.full((size, 1), 2, np.float32)}
    content = fakes.build_onnx(
        helper.make_node("MatMul", ["inputs", "weights"], ["outputs"]), weights=weights, wide=size, out=1
    )
    path = tmp_path / "mine.onnx"
    onnx.save(onnx.load_from_string(content), path, save_as_external_data=True, location="my.data", size_threshold=0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelRefusedError, match=r"keeps its weights in my\.data; export it with external_data=False"):
        open_session(path.read_bytes(), "cpu", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere onnxruntime is given bytes, and keeps them")
def test_onnx_session_does_not_keep_the_bytes_of_its_graph() -> None:
    """A worker has the weights once, as the session holds them."""
    content = fakes.canvas().contents["onnx"]
    before = sys.getrefcount(content)
    session = open_session(content, "cpu", 1)
    assert sys.getrefcount(content) == before
    assert session.run(None, {"inputs": np.zeros((1, 784), np.float32)})[0].shape == (1, 10)


def test_onnx_graph_cannot_reach_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """External weights that the scan of the bytes has missed lead nowhere, not even to the process's open files."""
    monkeypatch.setattr(onnx_runtime, "check_self_contained", lambda content: None)
    with (tmp_path / "secret").open("w+b") as secret:
        secret.write(np.ones(1, np.float32).tobytes())
        secret.flush()
        tensor = TensorProto(name="w", data_type=1, dims=[1, 1], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=str(secret.fileno()))
        graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "fake", [X], [Y], [tensor])
        content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
        with pytest.raises(ModelRefusedError, match="External data path"):
            open_session(content.SerializeToString(), "cpu", 1)


def test_onnx_graph_that_says_location_is_not_one_without_weights() -> None:
    """A note under the key `location` is a note."""
    model = onnx.load_from_string(fakes.doubler().contents["onnx"])
    helper.set_model_props(model, {"location": "Tromsø"})
    check_self_contained(model.SerializeToString())


def test_onnx_tensors_are_chosen_by_name() -> None:
    """Of several outputs the manifest's is run."""
    content = _graph([X], [Y, _value("z", ROW)], [helper.make_node("Neg", ["x"], ["y"]), *_same("x", "z")])
    fake = replace(fakes.doubler(), output={"kind": "value", "tensor": "y"}, contents={"onnx": content}, more={})
    assert open_fake(fake, "onnx").run(np.array([[3]], np.float32)).tolist() == [[-3]]


def test_onnx_graph_of_unknown_rank_is_run() -> None:
    """A graph that does not say its input's shape is taken at the manifest's word."""
    content = _graph([_value("x", None)], [_value("y", None)], _same("x", "y"))
    backend = open_backend("onnx", content, fakes.doubler().manifest(), "cpu", 1)
    assert backend.run(np.array([[3]], np.float32)).tolist() == [[3]]


def test_onnx_outputs_of_one_dimension_are_a_column() -> None:
    """A graph that gives (N,) gives (N, 1); one that gives a single number for many rows fails."""
    squeeze = _graph([X], [_value("y", ["batch"])], [helper.make_node("Flatten", ["x"], ["f"], axis=0),
                     helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)])  # fmt: skip
    backend = open_backend("onnx", squeeze, fakes.doubler().manifest(), "cpu", 1)
    with pytest.raises(InferenceError):
        backend.run(np.ones((2, 1), np.float32))
    assert backend.run(np.ones((1, 1), np.float32)).tolist() == [[1]]


@pytest.mark.parametrize("name", NAMES)
def test_one_number_for_many_rows_is_told_as_that(name: BackendName) -> None:
    """A graph that sums over the batch is told what its output lacks."""

    class Total(torch.nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows.sum()

    total = helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)
    contents = {
        "onnx": _graph([X], [_value("y", [])], [total]),
        "torchscript": fakes.build_torchscript(Total(), torch.zeros(3, 1)),
    }
    backend = open_backend(name, contents[name], fakes.doubler().manifest(), "cpu", 1)
    with pytest.raises(InferenceError, match="gives one number for 3 instances; its first dimension must be the batch"):
        backend.run(np.ones((3, 1), np.float32))
    with pytest.raises(InferenceError):
        backend.run(np.ones((0, 1), np.float32))


def test_torchscript_that_gives_several_is_told_as_that() -> None:
    """A tuple or a dictionary is not one tensor."""

    class Pair(torch.nn.Module):
        def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return rows, rows + 1

    content = fakes.build_torchscript(Pair(), torch.zeros(3, 1))
    backend = open_backend("torchscript", content, fakes.doubler().manifest(), "cpu", 1)
    with pytest.raises(InferenceError, match="gives a tuple where one tensor is read; return that tensor from forward"):
        backend.run(np.ones((3, 1), np.float32))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_told_as_that(zipped: bool) -> None:
    """What `torch.save` writes, today or of old, is told from TorchScript, with what to do."""
    buffer = io.BytesIO()
    torch.save(torch.nn.Linear(1, 1).state_dict(), buffer, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelRefusedError, match=r"is not TorchScript; save it with torch\.jit\.script"):
        open_backend("torchscript", buffer.getvalue(), fakes.doubler().manifest(), "cpu", 1)


def test_choose_backends_prefers_onnx_and_keeps_to_what_was_asked() -> None:
    """ONNX first, TorchScript second; a backend asked for by name is the only one; none where there is no artifact."""
    both, onnx_only = fakes.doubler().manifest(), fakes.doubler().only("onnx").manifest()
    assert choose_backends(both, "auto") == ["onnx", "torchscript"]
    assert choose_backends(both, "torchscript") == ["torchscript"]
    assert choose_backends(onnx_only, "torchscript") == []


def test_rounded_weights_are_used_where_they_are_asked_for() -> None:
    """`onnx-int8` takes that artifact where there is one and plain ONNX elsewhere; "auto" takes it last."""
    both = fakes.doubler()
    rounded = replace(both, contents=both.contents | {"onnx-int8": both.contents["onnx"]}).manifest()
    assert choose_backends(rounded, "onnx-int8") == ["onnx-int8", "onnx"]
    assert choose_backends(both.manifest(), "onnx-int8") == ["onnx"]
    assert choose_backends(rounded, "auto") == ["onnx", "torchscript", "onnx-int8"]
    assert list_accelerators("onnx-int8") == []


def test_choose_device_refuses_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device asked for by name is used or refused, never replaced; "auto" takes what there is."""
    monkeypatch.setattr(backends, "list_accelerators", lambda name: [])
    assert choose_device("auto", "onnx") == "cpu"
    assert choose_device("cpu", "onnx") == "cpu"
    with pytest.raises(StartError, match="device cuda is not usable by the onnx backend here; usable: cpu"):
        choose_device("cuda", "onnx")
    monkeypatch.setattr(backends, "list_accelerators", lambda name: ["cuda:0", "cuda:1"])
    assert choose_device("auto", "onnx") == "cuda:0"
    assert choose_device("auto", "onnx", "cuda:1") == "cuda:1"
    assert choose_device("cuda", "onnx", "cuda:1") == "cuda:1"
    assert choose_device("cuda:1", "onnx") == "cuda:1"
    with pytest.raises(StartError, match="cuda:7 is not usable"):
        choose_device("cuda:7", "onnx")


def test_torch_refuses_a_device_that_is_not_there() -> None:
    """Opening on a device that torch cannot use is a StartError."""
    fake = fakes.doubler()
    with pytest.raises(StartError, match="torch cannot use device 'cuda:99'"):
        open_backend("torchscript", fake.contents["torchscript"], fake.manifest(), "cuda:99", 1)


def test_accelerators_are_those_that_torch_sees() -> None:
    """The list is empty on a machine without an accelerator, and names each otherwise."""
    found = list_accelerators("torchscript")
    assert all(name == "mps" or name.startswith("cuda:") for name in found)
    assert len([name for name in found if name.startswith("cuda")]) == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("nodes", "known", "visible", "count"),
    [
        (3, 3, None, 3),
        (1, 8, None, 1),  # a container that was given one of eight
        (2, 0, None, 2),
        (0, 2, None, 2),
        (0, 0, None, 1),
        (3, 3, "", 0),
        (3, 3, "-1", 0),
        (3, 3, "2, 0", 2),
        (3, 3, "0,3,1", 1),
        (3, 3, "GPU-1b2c,GPU-3d4e", 2),
        (0, 0, "0,1", 2),
    ],
)
def test_gpus_are_counted(nodes: int, known: int, visible: str | None, count: int, tmp_path: Path) -> None:
    """GPUs are those with a device file that the driver knows; CUDA_VISIBLE_DEVICES says which are ours."""
    for name in ("nvidiactl", "nvidia-uvm", "nvidia-caps", *(f"nvidia{index}" for index in range(nodes))):
        (tmp_path / "dev" / name).mkdir(parents=True)
    for index in range(known):
        (tmp_path / f"proc/driver/nvidia/gpus/0000:0{index}:00.0").mkdir(parents=True)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert onnx_runtime.count_gpus(tmp_path, environment) == count


def test_onnx_devices_have_cudas_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices are numbered from 0, whatever onnxruntime says of their kind; a build without CUDA has none."""
    assert onnx_runtime.list_devices() == []
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnx_runtime, "count_gpus", lambda: 2)
    assert onnx_runtime.list_devices() == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("has_gpu", "visible", "wanted", "cure"),
    [
        (True, 1, "auto", "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
        (True, 1, "torchscript", "install PyTorch's build for CUDA"),
        (True, 1, "onnx-int8", ""),
        (True, 0, "auto", ""),
        (False, 1, "auto", ""),
    ],
)
def test_gpu_without_a_backend_is_told(
    has_gpu: bool, visible: int, wanted: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence says what to install; there is none where no GPU could be used anyway."""
    monkeypatch.setattr(backends, "has_nvidia_gpu", lambda: has_gpu)
    monkeypatch.setattr(onnx_runtime, "count_gpus", lambda: visible)
    sentence = describe_unused_gpu(wanted)
    assert bool(sentence) == bool(cure)
    assert cure in sentence
