"""`python -m service` on a machine with two GPUs that are made up: `python -m tests.fake_gpu serve ...`.

What is opened on `cuda:N` runs on the CPU underneath. These variables say what the made-up hardware is like:
`FAKE_GPU_MS` and `FAKE_CPU_MS` are added to every call there, `FAKE_WRONG` names devices whose results are off by one,
and `FAKE_CRASH` devices on which every call ends the process. A row with the number `POISON` breaks the GPU for its
process, as a failed assertion in a kernel does.
"""

import os
import signal
import sys
import time
from typing import Any

import numpy as np
import onnxruntime as ort

from service.__main__ import main
from service.hosts import litserve
from service.model import backends, tensor_model
from service.model.backends import onnx_runtime

GPUS = ["cuda:0", "cuda:1"]
POISON = 666.0
lost: set[str] = set()


class FakeSession:
    """A session on the CPU that passes for one on a device."""

    def __init__(self, session: ort.InferenceSession, device: str) -> None:
        self._session = session
        self._device = device
        self._kind = device.partition(":")[0]
        self._seconds = float(os.environ.get(f"FAKE_{'CPU' if device == 'cpu' else 'GPU'}_MS", "0")) / 1e3

    def run(self, names: list[str], inputs: dict[str, Any]) -> list[Any]:
        """Run as the device would."""
        if any((np.asarray(each) == POISON).any() for each in inputs.values()) and self._kind == "cuda":
            lost.add(self._device)
        if self._device in lost:
            raise RuntimeError("/src/cuda_call.cc:146 CUDA failure 700: an illegal memory access ; GPU=0 ; hostname=x")
        if self._kind in os.environ.get("FAKE_CRASH", "").split():
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(self._seconds)
        outputs = self._session.run(names, inputs)
        return [each + 1 for each in outputs] if self._kind in os.environ.get("FAKE_WRONG", "").split() else outputs

    def get_providers(self) -> list[str]:
        """Return what a session on the device would say."""
        return ["CPUExecutionProvider"] if self._device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the session."""
        return getattr(self._session, name)


def install() -> None:
    """Have the service find the GPUs; before it forks."""
    real = onnx_runtime.open_session

    def open_session(content: bytes, device: str, threads: int, tf32: bool = False) -> Any:
        del tf32
        return FakeSession(real(content, "cpu", threads), device)

    def list_accelerators(name: str) -> list[str]:
        return GPUS if name == "onnx" else []

    backends.list_accelerators = litserve.list_accelerators = list_accelerators  # type: ignore[attr-defined]
    onnx_runtime.open_session = tensor_model.open_session = open_session  # type: ignore[attr-defined]
    onnx_runtime._is_alive = lambda device: device not in lost


if __name__ == "__main__":
    install()
    sys.exit(main())
