"""Backends run graphs: float32 (N, *shape) in, float32 (N, K) out, independent of tasks and HTTP."""

import shutil
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.errors import InferenceError, StartError
from service.model.manifest import AnyManifest, BackendName, Manifest

Array = NDArray[np.float32]
TORCH_BACKENDS: tuple[BackendName, ...] = ("torchscript", "torch-export")


class Backend(Protocol):
    """An open graph. `device` and `provider` are what actually runs it, not what was requested.

    `is_tf32` tells whether matrix products and convolutions round their operands to TF32, 10 bits of mantissa.
    """

    name: BackendName
    device: str
    provider: str
    is_tf32: bool

    def run(self, inputs: Array) -> Array:
        """Run inputs, float32 (N, *shape), and return outputs, float32 (N, K). Thread-safe."""
        ...


def choose_backends(manifest: AnyManifest, wanted: str) -> list[BackendName]:
    """Return the backends to try for a model, best first; empty if none of its artifacts can run here.

    `wanted` is "auto" or a backend's name. "auto" prefers ONNX, then TorchScript, then a program of torch.export, then
    quantized weights, among the artifacts the model has. "onnx-int8" falls back to the plain ONNX graph.
    """
    available: list[BackendName] = [name for name in manifest.artifacts if is_installed(name)]
    if wanted == "onnx-int8":
        return [name for name in ("onnx-int8", "onnx") if name in available]
    if wanted != "auto":
        available = [name for name in available if name == wanted]
    return sorted(available, key=("onnx", *TORCH_BACKENDS, "onnx-int8").index)


def is_installed(name: BackendName) -> bool:
    """Return whether a backend's package is installed."""
    return find_spec("torch" if name in TORCH_BACKENDS else "onnxruntime") is not None


def check_backend(wanted: str) -> None:
    """Check that a backend requested by name is installed.

    Raises:
        StartError: It is not installed; the message says what to install.
    """
    if wanted in TORCH_BACKENDS and not is_installed("torchscript"):
        raise StartError(f"--backend {wanted} needs torch, which is not installed: pip install '.[torch]'")


def open_backend(
    name: BackendName, content: bytes, manifest: Manifest, device: str, threads: int, tf32: bool = False
) -> Backend:
    """Open an artifact on a device. On an accelerator, calls are padded to a few sizes; see `accelerator`.

    Args:
        name: The backend.
        content: The artifact's bytes, already verified against the manifest.
        manifest: The manifest, which names the input and output tensors.
        device: "cpu", "cuda", "cuda:N" or "mps".
        threads: CPU threads per call.
        tf32: Whether an NVIDIA GPU may round operands to TF32.

    Raises:
        ModelRefusedError: The graph does not load, or its tensors do not match the manifest.
        StartError: The backend cannot use the device.
    """
    backend: Backend
    if manifest.has_rows:
        from service.model.backends.rows import open_rows  # noqa: PLC0415 - as the others

        return open_rows(content, manifest, device, threads, name, tf32)
    if name not in TORCH_BACKENDS:
        from service.model.backends.onnx_runtime import open_onnx  # noqa: PLC0415 - each backend is optional

        backend = open_onnx(content, manifest, device, threads, name, tf32)
    elif name == "torchscript":
        from service.model.backends.torchscript import open_torchscript  # noqa: PLC0415 - torch is optional

        backend = open_torchscript(content, device, threads, tf32)
    else:
        from service.model.backends.exported_program import open_program  # noqa: PLC0415 - its imports take seconds

        backend = open_program(content, device, threads, tf32)
    if device == "cpu":
        return backend
    from service.model.backends.accelerator import AcceleratorBackend  # noqa: PLC0415 - it imports this module

    return AcceleratorBackend(backend, tuple(manifest.input.shape))


def as_rows(outputs: Array, count: int) -> Array:
    """Reshape a graph's outputs to (N, K).

    Raises:
        InferenceError: The outputs cannot be split into N rows.
    """
    if not count or outputs.size % count:
        shown = "one number" if not outputs.shape else f"an output of shape {list(outputs.shape)}"
        raise InferenceError(f"the graph gives {shown} for {count} instances; its first dimension must be the batch")
    return outputs.reshape(count, -1)


def choose_device(wanted: str, name: BackendName, preferred: str = "cuda:0") -> str:
    """Return the device to open a backend on.

    "auto" chooses `preferred` if the backend can use it, then the backend's first accelerator, then "cpu". "cuda"
    chooses in the same way among the GPUs.

    Raises:
        StartError: The backend cannot use the device named by `wanted`.
    """
    if wanted == "cpu":
        return "cpu"
    accelerators = list_accelerators(name)
    if wanted == "auto":
        return preferred if preferred in accelerators else [*accelerators, "cpu"][0]
    fitting = [device for device in accelerators if wanted in (device, device.partition(":")[0])]
    if fitting:
        return preferred if preferred in fitting else fitting[0]
    usable = ", ".join(["cpu", *accelerators])
    raise StartError(f"device {wanted} is not usable by the {name} backend here; usable: {usable}")


def list_accelerators(name: BackendName) -> list[str]:
    """Return the accelerators a backend can use, best first, such as ["cuda:0", "cuda:1"]."""
    if name == "onnx-int8" or not has_accelerator() or not is_installed(name):
        return []  # int8 gains nothing on a GPU
    if name == "onnx":
        from service.model.backends.onnx_runtime import list_devices  # noqa: PLC0415
    else:
        from service.model.backends.torchscript import list_devices  # noqa: PLC0415
    return list_devices()


@cache
def has_accelerator() -> bool:
    """Return whether this machine may have an accelerator, without importing torch (seconds, 200 MB) to find out."""
    return sys.platform == "darwin" or has_nvidia_gpu()


def has_nvidia_gpu() -> bool:
    """Return whether the NVIDIA driver is installed here."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def describe_unused_gpu(wanted: str) -> str:
    """Return what to install where there is an NVIDIA GPU, but no installed backend can use one; else "".

    To be asked where `list_accelerators` has found none for the backends `wanted`: "auto", or one by name.
    """
    from service.model.backends.onnx_runtime import count_gpus  # noqa: PLC0415

    if wanted == "onnx-int8" or not has_nvidia_gpu() or not count_gpus():  # CUDA_VISIBLE_DEVICES may hide them all
        return ""
    cure = "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
    if wanted in TORCH_BACKENDS:
        cure = "install PyTorch's build for CUDA (https://pytorch.org/get-started/locally)"
    return f"this machine has an NVIDIA GPU, but no installed backend can use it; to use it: {cure}"
