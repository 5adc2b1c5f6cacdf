"""Run TorchScript graphs with PyTorch. The only module in the service that imports torch."""

import io
import warnings

import numpy as np
import torch

from service.errors import InferenceError, ModelRefusedError, StartError
from service.model.backends import Array, as_rows
from service.model.manifest import BackendName, Manifest


class TorchScriptBackend:
    """A scripted or traced module in evaluation mode."""

    name: BackendName = "torchscript"

    def __init__(self, module: torch.jit.ScriptModule, device: torch.device) -> None:
        self.device = str(device)
        self.provider = f"torch {torch.__version__}"
        self._module = module
        self._device = device

    def run(self, inputs: Array) -> Array:
        """Return the graph's outputs, float32 (N, K). See `Backend.run`."""
        try:
            with torch.inference_mode():
                outputs = self._module(torch.from_numpy(inputs).to(self._device))
                result = outputs.to("cpu", torch.float32).numpy() if isinstance(outputs, torch.Tensor) else None
        except Exception as error:  # a graph may raise anything
            raise InferenceError(f"torch: {str(error).strip().splitlines()[-1]}") from error  # skip the stack trace
        if result is None:
            kind = type(outputs).__name__
            raise InferenceError(f"the graph gives a {kind} where one tensor is read; return that tensor from forward")
        if result.ndim != 2:  # noqa: PLR2004 - (N,) is a column
            result = as_rows(result, len(inputs))
        return np.ascontiguousarray(result)


def list_devices() -> list[str]:
    """Return the accelerators this build of PyTorch can use."""
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def open_torchscript(content: bytes, manifest: Manifest, device: str, threads: int) -> TorchScriptBackend:
    """Open a TorchScript archive. See `open_backend`."""
    del manifest  # `forward` takes one tensor and returns one; the golden check covers the rest
    torch.set_num_threads(threads)
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except RuntimeError as error:
        raise StartError(f"torch cannot use device {device!r}") from error
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
    return TorchScriptBackend(module, target)
