"""Backends on a GPU, as far as that can be tested without one: sizes of calls, options, and what a failure means."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort
import pytest
import torch

from service.errors import DeviceLostError, InferenceError, ModelRefusedError, StartError
from service.model import predictor as predictor_module
from service.model.backends import Array
from service.model.backends.accelerator import AcceleratorBackend
from service.model.backends.onnx_runtime import describe_failure, open_session
from service.model.backends.torchscript import TorchBackend, open_torchscript
from service.model.manifest import BackendName
from service.model.predictor import Predictor
from tests import fakes


class Recorder:
    """A backend on a made-up device: y = 2·x, for at most `most` rows a call."""

    name: BackendName = "onnx"
    device = "cuda:0"
    provider = "CUDAExecutionProvider"
    is_tf32 = False

    def __init__(self, most: int = 10**6) -> None:
        self.most = most
        self.sizes: list[int] = []

    def run(self, inputs: Array) -> Array:
        """Count the rows and double them."""
        self.sizes.append(len(inputs))
        if len(inputs) > self.most:
            raise InferenceError("out of memory")
        return 2 * inputs


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 2), (3, 4), (33, 40), (40, 40)])
def test_accelerator_runs_a_few_sizes(rows: int, size: int) -> None:
    """Calls are padded to the next size, and the padding does not come back."""
    recorder = Recorder()
    backend = AcceleratorBackend(recorder, (1,))
    backend.warm_up(40)
    assert recorder.sizes[::3] == [40, 32, 16, 8, 4, 2, 1]
    recorder.sizes.clear()
    inputs = np.arange(rows, dtype=np.float32)[:, None]
    assert (backend.run(inputs) == 2 * inputs).all()
    assert recorder.sizes == [size]


def test_accelerator_splits_what_does_not_fit() -> None:
    """A size that fails while it warms up is left out, and larger calls come in parts."""
    recorder = Recorder(most=20)
    backend = AcceleratorBackend(recorder, (1,))
    backend.warm_up(64)
    recorder.sizes.clear()
    inputs = np.arange(50, dtype=np.float32)[:, None]
    assert (backend.run(inputs) == 2 * inputs).all()
    assert recorder.sizes == [16, 16, 16, 2]
    with pytest.raises(InferenceError):
        AcceleratorBackend(Recorder(most=0), (1,)).warm_up(4)


def test_accelerator_says_that_it_rounds() -> None:
    """The provider that `/v1/models` shows tells TF32 from full precision."""
    recorder = Recorder()
    assert AcceleratorBackend(recorder, (1,)).provider == "CUDAExecutionProvider"
    recorder.is_tf32 = True
    assert AcceleratorBackend(recorder, (1,)).provider == "CUDAExecutionProvider with TF32"


CUDA_TEXT = (
    "Non-zero status code returned while running Gemm node. Name:'g' Status Message: /src/cuda_call.cc:146 bool"
    " CudaCall(...) CUDA failure {} ; GPU=0 ; hostname=secret ; file=/src/gemm.cc ; line=70 ; expr=cudaGetLastError(); "
)
CPU_TEXT = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Expand node. Name:''"
    " Status Message: /src/bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 4000000000000000"
)
LOST = CUDA_TEXT.format("700: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("text", "device", "probe", "kind", "sentence"),
    [
        (LOST, "cuda:0", LOST, DeviceLostError, "onnxruntime: CUDA failure 700: an illegal memory access was encounte"),
        (LOST, "cuda:0", "", InferenceError, "onnxruntime: CUDA failure 700: an illegal memory access was encountered"),
        (CUDA_TEXT.format("2: out of memory"), "cuda:0", LOST, InferenceError, "it needs more memory"),
        (CPU_TEXT, "cpu", LOST, InferenceError, "it needs more memory for this input than cpu has left"),
        (LOST, "cuda:0", "CUDA failure 2: out of memory", InferenceError, "onnxruntime: CUDA failure 700: an illegal"),
        ("Invalid rank\nmore", "cpu", LOST, InferenceError, "onnxruntime: Invalid rank"),
    ],
)
def test_lost_gpu_is_told_from_a_failed_call(
    text: str, device: str, probe: str, kind: type[Exception], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is lost if a trivial call fails as well, other than for too little memory; the message is without paths."""

    def copy(array: Array, kind: str, number: int) -> Any:
        assert (kind, number) == ("cuda", 0)
        if probe:
            raise RuntimeError(probe)
        return SimpleNamespace(numpy=lambda: array)

    monkeypatch.setattr(ort, "OrtValue", SimpleNamespace(ortvalue_from_numpy=copy))
    error = describe_failure(RuntimeError(text), device)
    assert type(error) is kind
    assert str(error).startswith(sentence)
    assert "hostname" not in str(error)


class FakeSession:
    """What `InferenceSession` would be given."""

    arguments: ClassVar[dict[str, Any]] = {}

    def __init__(self, source: str | bytes, options: ort.SessionOptions, **more: Any) -> None:
        FakeSession.arguments = more
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        if content == b"broken":
            raise RuntimeError(CUDA_TEXT.format("35: CUDA driver version is insufficient"))
        if content == b"large":
            raise RuntimeError("Failed to allocate memory for requested buffer of size 99")

    def get_providers(self) -> list[str]:
        """Return what was asked for."""
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_cuda_session_has_exact_numbers_and_no_long_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 is off unless asked for, no convolution is searched for long, and a session never moves to the CPU."""
    monkeypatch.setattr(ort, "InferenceSession", FakeSession)
    for tf32, flag in ((False, "0"), (True, "1")):
        open_session(b"graph", "cuda:1", 1, tf32)
        (name, options), fallback = FakeSession.arguments["providers"]
        assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        expected = {"device_id": "1", "use_tf32": flag, "cudnn_conv_algo_search": "HEURISTIC"}
        assert expected.items() <= options.items()
        assert FakeSession.arguments["enable_fallback"] is False
    with pytest.raises(StartError, match=r"cannot use cuda:0: CUDA failure 35: CUDA driver version is insufficient$"):
        open_session(b"broken", "cuda:0", 1)
    with pytest.raises(ModelRefusedError, match="does not fit into the memory of cuda:0"):
        open_session(b"large", "cuda:0", 1)


class FakeModule:
    """A module whose call fails in some way."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Fail."""
        raise self.error


ASSERTED = "Traceback of TorchScript, most recent call last:\nCUDA error: device-side assert triggered\nCompile with it"


@pytest.mark.parametrize(
    ("error", "is_alive", "kind", "sentence"),
    [
        (RuntimeError(ASSERTED), False, DeviceLostError, "torch: CUDA error: device-side assert triggered"),
        (RuntimeError(ASSERTED), True, InferenceError, "torch: CUDA error: device-side assert triggered"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB"), False, InferenceError, "torch: CUDA out of memory"),
        (RuntimeError("stack\nsizes differ"), True, InferenceError, "torch: sizes differ"),
    ],
)
def test_lost_gpu_is_told_from_a_failed_call_in_torch(
    error: Exception, is_alive: bool, kind: type[Exception], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for onnxruntime, a trivial call tells."""

    def zeros(*shape: int, device: torch.device) -> torch.Tensor:
        if not is_alive:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return torch.empty(*shape)

    backend = TorchBackend("torchscript", FakeModule(error), torch.device("cpu"))
    backend._device = torch.device("cuda:0")
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch, "from_numpy", lambda inputs: SimpleNamespace(to=lambda device: inputs))
    with pytest.raises(InferenceError) as caught:
        backend.run(np.zeros((1, 1), np.float32))
    assert type(caught.value) is kind
    assert str(caught.value).startswith(sentence)


def test_torch_has_exact_numbers_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 is off in matrix products and in cuDNN unless asked for."""
    chosen: list[str] = []
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    monkeypatch.setattr(torch.jit, "load", lambda file, map_location: SimpleNamespace(eval=lambda: None))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    before = torch.backends.cudnn.allow_tf32
    try:
        for tf32, precision in ((True, "high"), (False, "highest")):
            backend = open_torchscript(b"", "cuda:0", 1, tf32)
            assert torch.backends.cudnn.allow_tf32 is tf32
            assert backend.is_tf32 is tf32
            assert chosen[-1] == precision
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("is_tf32", "off_by", "passes"), [(False, 1e-3, False), (True, 1e-3, True), (True, 1, False)])
def test_rounded_numbers_have_a_tolerance_of_their_own(is_tf32: bool, off_by: float, passes: bool) -> None:
    """With TF32, golden outputs may be off by a hundredth; without, they may not."""

    class Rounding(Recorder):
        def run(self, inputs: Array) -> Array:
            return 2 * inputs + np.float32(off_by)

    backend = Rounding()
    backend.is_tf32 = is_tf32
    manifest = fakes.doubler().manifest()
    golden = {"inputs": [[1.0], [2.0]], "outputs": [[2.0], [4.0]]}
    manifest = type(manifest).model_validate(manifest.model_dump() | {"golden": golden})
    predictor = Predictor(manifest, backend)
    if passes:
        predictor_module.check_golden(predictor)
    else:
        with pytest.raises(ModelRefusedError, match="misses a golden output"):
            predictor_module.check_golden(predictor)


def test_measuring_warms_up_first() -> None:
    """Before a model on an accelerator is measured, every size has been run."""
    recorder = Recorder()
    cost = Predictor(fakes.doubler().manifest(), AcceleratorBackend(recorder, (1,))).measure_cost(8)
    assert recorder.sizes[:12:3] == [8, 4, 2, 1]
    assert cost.batch <= 8
