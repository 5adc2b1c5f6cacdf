"""Run TorchScript graphs with PyTorch."""

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from service.errors import DeviceLostError, InferenceError, ModelRefusedError, StartError
from service.model.backends import Array, as_rows
from service.model.manifest import BackendName


class TorchBackend:
    """A function of one tensor, such as a TorchScript module in evaluation mode."""

    def __init__(
        self, name: BackendName, module: Callable[[torch.Tensor], Any], device: torch.device, is_tf32: bool = False
    ) -> None:
        self.name = name
        self.device = str(device)
        self.provider = f"torch {torch.__version__}"
        self.is_tf32 = is_tf32
        self._module = module
        self._device = device

    def run(self, inputs: Array) -> Array:
        """Return the graph's outputs, float32 (N, K). See `Backend.run`."""
        try:
            with torch.inference_mode():
                outputs = self._module(torch.from_numpy(inputs).to(self._device))
                result = outputs.to("cpu", torch.float32).numpy() if isinstance(outputs, torch.Tensor) else None
        except Exception as error:  # a graph may raise anything
            raise self._describe_failure(error) from error
        if result is None:
            kind = type(outputs).__name__
            raise InferenceError(f"the graph gives a {kind} where one tensor is read; return that tensor from forward")
        if result.ndim != 2:  # noqa: PLR2004 - (N,) is a column
            result = as_rows(result, len(inputs))
        return np.ascontiguousarray(result)

    def _describe_failure(self, error: Exception) -> InferenceError:
        """Return what to raise for an exception of the graph: a DeviceLostError if the device works no more.

        After an error such as a failed assertion in a kernel, every CUDA call of the process fails; so a call that
        cannot fail otherwise tells whether it was one.
        """
        lines = str(error).strip().splitlines() or [type(error).__name__]
        cuda = [line for line in lines if "CUDA error" in line or "CUDA out of memory" in line]  # before its advice
        sentence = f"torch: {(cuda or lines)[-1]}"  # the lines before are the stack
        is_lost = self._device.type == "cuda" and not isinstance(error, torch.OutOfMemoryError) and not self._is_alive()
        return DeviceLostError(sentence) if is_lost else InferenceError(sentence)

    def _is_alive(self) -> bool:
        try:
            torch.zeros(1, device=self._device).cpu()
        except torch.OutOfMemoryError:
            return True
        except RuntimeError:
            return False
        return True


def list_devices() -> list[str]:
    """Return the accelerators this build of PyTorch can use."""
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def open_device(device: str, threads: int, tf32: bool) -> torch.device:
    """Return a device after setting threads and TF32 for the whole process.

    Raises:
        StartError: PyTorch cannot use it.
    """
    torch.set_num_threads(threads)
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:  # the latter from a build without CUDA
        raise StartError(f"torch cannot use device {device!r}") from error
    if target.type == "cuda":  # settings of the whole process, but all its models are opened alike
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    return target


def open_torchscript(content: bytes, device: str, threads: int, tf32: bool = False) -> TorchBackend:
    """Open a TorchScript archive whose `forward` takes one tensor and returns one. See `open_backend`."""
    target = open_device(device, threads, tf32)
    try:
        with warnings.catch_warnings():
            # torch.jit is deprecated but still works, and this project requires it.
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*torch.jit.*")
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.jit.*")
            module = torch.jit.load(io.BytesIO(content), map_location=target).eval()  # type: ignore[no-untyped-call]
    except Exception as error:
        if content[:1] == b"\x80" or (b"data.pkl" in content and b"constants.pkl" not in content):  # from `torch.save`
            raise ModelRefusedError(
                "the file has pickled weights or a pickled net and is not TorchScript;"
                " save it with torch.jit.script(net.eval()).save(path)"
            ) from error
        raise ModelRefusedError(f"torch cannot load the graph: {str(error).splitlines()[0]}") from error
    return TorchBackend("torchscript", module, target, tf32 and target.type == "cuda")
