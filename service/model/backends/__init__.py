"""Backends run a graph: float32 (N, *shape) in, float32 (N, K) out. They know nothing of models, tasks or HTTP."""

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


class Backend(Protocol):
    """One opened graph. `device` and `provider` are what really runs it, never what was asked for."""

    name: BackendName
    device: str
    provider: str

    def run(self, inputs: Array) -> Array:
        """Return the graph's outputs float32 (N, K) for inputs float32 (N, *shape). Safe to call from any thread."""
        ...


def choose_backends(manifest: AnyManifest, wanted: str) -> list[BackendName]:
    """Return the backends to try for a model, best first; empty when none of its artifacts can be run here.

    `wanted` is "auto", "onnx", "torchscript" or "onnx-int8". "auto" prefers ONNX unless only PyTorch can reach the
    device, and rounded weights last; a model that has only one artifact is served by that one. "onnx-int8" takes the
    plain ONNX graph of a model that has no other.
    """
    available: list[BackendName] = [name for name in manifest.artifacts if is_installed(name)]
    if wanted == "onnx-int8":
        return sorted(set(available) - {"torchscript"}, key=("onnx-int8", "onnx").index)
    if wanted != "auto":
        available = [name for name in available if name == wanted]
    return sorted(available, key=("onnx", "torchscript", "onnx-int8").index)


def is_installed(name: BackendName) -> bool:
    """Tell whether the package behind a backend can be imported here."""
    return find_spec("torch" if name == "torchscript" else "onnxruntime") is not None


def check_backend(wanted: str) -> None:
    """Refuse a backend that was asked for by name and whose package is not installed.

    Raises:
        StartError: it cannot be imported; the sentence says what to install.
    """
    if wanted == "torchscript" and not is_installed("torchscript"):
        raise StartError("--backend torchscript needs torch, which is not installed: pip install '.[torch]'")


def open_backend(name: BackendName, content: bytes, manifest: Manifest, device: str, threads: int) -> Backend:
    """Open an artifact's bytes on a device.

    Args:
        name: which backend.
        content: the artifact's bytes, already checked against the manifest.
        manifest: says which tensors of the graph to use.
        device: "cpu", "cuda", "cuda:N" or "mps".
        threads: CPU threads one call may use.

    Raises:
        ModelRefusedError: the graph does not load or has other tensors than the manifest says.
        StartError: the backend cannot use that device.
    """
    if name != "torchscript":
        from service.model.backends.onnx_runtime import open_onnx  # noqa: PLC0415 - each backend is optional

        return open_onnx(content, manifest, device, threads, name)
    from service.model.backends.torchscript import open_torchscript  # noqa: PLC0415 - torch is not always installed

    return open_torchscript(content, manifest, device, threads)


def as_rows(outputs: Array, count: int) -> Array:
    """Return a graph's outputs of any shape as (N, K).

    Raises:
        InferenceError: there are no N rows in them.
    """
    if not count or outputs.size % count:
        shown = "one number" if not outputs.shape else f"an output of shape {list(outputs.shape)}"
        raise InferenceError(f"the graph gives {shown} for {count} instances; its first dimension must be the batch")
    return outputs.reshape(count, -1)


def choose_device(wanted: str, name: BackendName, preferred: str = "cuda:0") -> str:
    """Return the device a backend will be opened on.

    For "auto" that is `preferred` where the backend can use it, else its first accelerator, else "cpu"; for "cuda"
    likewise, of the GPUs alone.

    Raises:
        StartError: `wanted` names a device that this backend cannot use here.
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
    """Return the accelerators this backend can use here, best first, such as ["cuda:0", "cuda:1"]."""
    if name == "onnx-int8" or not has_accelerator() or not is_installed(name):
        return []  # a GPU gains nothing from it
    if name == "onnx":
        from service.model.backends.onnx_runtime import list_devices  # noqa: PLC0415
    else:
        from service.model.backends.torchscript import list_devices  # noqa: PLC0415
    return list_devices()


@cache
def has_accelerator() -> bool:
    """Tell whether this machine may have one; saves importing torch (seconds, 200 MB) to learn that it has not."""
    return sys.platform == "darwin" or Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
