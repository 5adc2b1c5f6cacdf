"""Run ONNX graphs with onnxruntime (https://onnxruntime.ai/docs/api/python/api_summary.html)."""

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from service.errors import DeviceLostError, InferenceError, ModelRefusedError, StartError
from service.model.backends import Array, as_rows
from service.model.manifest import BackendName, Manifest

_FLOAT = "tensor(float)"
# The protobuf bytes before the name of an external data file, and the length of that name.
_LOCATION = re.compile(rb"\n\x08location\x12(.)", re.DOTALL)
_EXTERNAL_DATA = b"j"  # tag of `TensorProto.external_data`; a length of one or two bytes follows it
_NO_FOLDER = "/nonexistent"
# What CUDA and its libraries say, between a C++ signature and the source line; "CUDA failure 2" is out of memory.
_CUDA_FAILURE = re.compile(r"\b(?:CUDA|CUDNN|CUDNN_FE|CUBLAS|CUFFT) (?:failure|error)[^;\n]*")
_NO_MEMORY = re.compile(r"out of memory|Failed to allocate memory for requested buffer of size \d+|bad_alloc")
_SOURCE = re.compile(r"Load model from \S+ failed: ?")
_FATAL = 4  # onnxruntime's own messages bypass the log format; errors are raised as exceptions anyway
ort.set_default_logger_severity(_FATAL)


class OnnxBackend:
    """An onnxruntime session."""

    def __init__(
        self,
        session: ort.InferenceSession,
        tensors: tuple[str, str],
        device: str,
        name: BackendName = "onnx",
        is_tf32: bool = False,
    ) -> None:
        input_name, output_name = tensors
        self.name = name
        self.device = device
        self.provider: str = session.get_providers()[0]
        self.is_tf32 = is_tf32
        self._session = session
        self._input_name = input_name
        self._output_names = [output_name]

    def run(self, inputs: Array) -> Array:
        """Return the graph's outputs, float32 (N, K). See `Backend.run`."""
        try:
            outputs = self._session.run(self._output_names, {self._input_name: inputs})[0]
        except Exception as error:  # onnxruntime raises about a dozen exception types
            raise describe_failure(error, self.device) from error
        if outputs.ndim != 2:  # noqa: PLR2004 - (N,) is a column
            outputs = as_rows(outputs, len(inputs))
        return np.ascontiguousarray(outputs, dtype=np.float32)


def list_devices() -> list[str]:
    """Return the GPUs this build of onnxruntime can use, by CUDA device number."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return []
    return [f"cuda:{index}" for index in range(count_gpus())]


def count_gpus(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> int:
    """Return how many GPUs are visible to this process, without loading CUDA; 1 if that is unknown.

    onnxruntime has no API for this: `OrtHardwareDevice.device_id` identifies the kind of device, not its number.
    """
    nodes = len([path for path in (root / "dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    known = len(list((root / "proc/driver/nvidia/gpus").glob("*")))
    count = min((found for found in (nodes, known) if found), default=0)  # a container may see only some of them
    if "CUDA_VISIBLE_DEVICES" not in environment:
        return count or 1
    seen = 0
    for entry in map(str.strip, environment["CUDA_VISIBLE_DEVICES"].split(",")):
        is_number = entry.isdecimal() and (not count or int(entry) < count)
        if not is_number and not entry.startswith(("GPU-", "MIG-")):
            break  # like CUDA, stop at the first invalid entry
        seen += 1
    return seen


def open_onnx(
    content: bytes, manifest: Manifest, device: str, threads: int, name: BackendName = "onnx", tf32: bool = False
) -> OnnxBackend:
    """Open a single-file ONNX graph. See `open_backend`."""
    session = open_session(content, device, threads, tf32)
    return OnnxBackend(session, _choose_tensors(session, manifest), device, name, tf32 and device.startswith("cuda"))


def open_session(content: bytes, device: str, threads: int, tf32: bool = False) -> ort.InferenceSession:
    """Open an onnxruntime session on a device.

    Raises:
        ModelRefusedError: The graph does not load, or its weights are in another file.
        StartError: onnxruntime cannot use the device.
    """
    check_self_contained(content)
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # it keeps 1 MB and the memory of the largest batch, and gains no time
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Spinning idle threads would each occupy a core.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # By default, paths to external weights are resolved against the working directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NO_FOLDER)
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        _preload_cuda()
        providers.insert(0, ("CUDAExecutionProvider", choose_cuda_options(device, tf32)))
    try:
        with _open_as_file(content) as source:
            # With its own fallback, onnxruntime would move a session to the CPU without a word when a call fails.
            session = ort.InferenceSession(source, options, providers=providers, enable_fallback=False)
    except Exception as error:
        if device != "cpu" and _NO_MEMORY.search(str(error)):
            raise ModelRefusedError(f"its ONNX graph does not fit into the memory of {device}") from error
        if found := _CUDA_FAILURE.search(str(error)):
            raise StartError(f"onnxruntime cannot use {device}: {found[0].strip()}") from error
        reason = _SOURCE.sub("", _first_line(error))
        raise ModelRefusedError(f"onnxruntime cannot load the graph: {reason}") from error
    if device != "cpu" and session.get_providers()[0] == "CPUExecutionProvider":
        raise StartError(f"onnxruntime fell back to the CPU where {device} was asked for")
    return session


@contextlib.contextmanager
def _open_as_file(content: bytes) -> Iterator[str | bytes]:
    """Yield what a session can be opened from: a file in memory where there is /proc, since it would keep bytes."""
    if not Path("/proc/self/fd").is_dir():
        yield content
        return
    with open(os.memfd_create("graph"), "wb", buffering=0) as file:
        view = memoryview(content)
        while view:
            view = view[file.write(view) :]
        yield f"/proc/self/fd/{file.fileno()}"


def choose_cuda_options(device: str, tf32: bool) -> dict[str, str]:
    """Return the CUDA provider's options (https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider)."""
    return {
        "device_id": device.partition(":")[2] or "0",
        "use_tf32": str(int(tf32)),  # on by default, and then golden outputs are missed
        "cudnn_conv_algo_search": "HEURISTIC",  # the default tries every algorithm, for each size of a batch
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles the arena whenever it has to grow
    }


@cache
def _preload_cuda() -> None:
    """Load CUDA's libraries from their PyPI packages, where the dynamic linker does not look for them."""
    if hasattr(ort, "preload_dlls"):  # since 1.21
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; opening will fail then
            ort.preload_dlls()


def describe_failure(error: Exception, device: str) -> InferenceError:
    """Return what to raise for an exception of `InferenceSession.run`: a DeviceLostError if the device works no more.

    After an error such as an illegal memory access, every CUDA call of the process fails; so a call that cannot fail
    otherwise tells whether it was one.
    """
    text = str(error)
    if _NO_MEMORY.search(text):
        return InferenceError(f"it needs more memory for this input than {device} has left")
    found = _CUDA_FAILURE.search(text)
    sentence = f"onnxruntime: {found[0].strip() if found else _first_line(error)}"
    if device.startswith("cuda") and not _is_alive(device):
        return DeviceLostError(sentence)
    return InferenceError(sentence)


def _is_alive(device: str) -> bool:
    try:
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", int(device.partition(":")[2] or 0)).numpy()
    except Exception as error:  # onnxruntime raises about a dozen exception types
        return _NO_MEMORY.search(str(error)) is not None
    return True


def check_self_contained(content: bytes) -> None:
    """Check that a graph has no external weights, which no digest would cover.

    Scans the bytes once and does not need the onnx package.

    Raises:
        ModelRefusedError: Some weights are in another file.
    """
    for found in _LOCATION.finditer(content):
        if _EXTERNAL_DATA in content[max(0, found.start() - 3) : found.start() - 1]:
            file = content[found.end() : found.end() + found[1][0]].decode(errors="replace")
            raise ModelRefusedError(
                f"the graph keeps its weights in {file}; export it with external_data=False, or inline them:"
                " onnx.save(onnx.load(path), path)"
            )


def _choose_tensors(session: ort.InferenceSession, manifest: Manifest) -> tuple[str, str]:
    input_name = choose_input(session, manifest)
    outputs = {node.name: node for node in session.get_outputs()}
    output_name = manifest.output.tensor or (next(iter(outputs)) if len(outputs) == 1 else "")
    if output_name not in outputs:
        raise ModelRefusedError(
            f"the graph's outputs are {', '.join(outputs)}; name one with --output-tensor, in a manifest output.tensor"
        )
    if (found := outputs[output_name].type) != _FLOAT:
        cure = '; export it with to_onnx(…, options={"zipmap": False})' if found.startswith("seq(map(") else ""
        raise ModelRefusedError(f"the graph's output {output_name} is {found}, expected {_FLOAT}{cure}")
    return input_name, output_name


def choose_input(session: ort.InferenceSession, manifest: Manifest) -> str:
    """Return the name of the graph's input, float32 (N, *shape).

    Raises:
        ModelRefusedError: There is none such, or several.
    """
    inputs = {node.name: node for node in session.get_inputs()}
    input_name = manifest.input.tensor or (next(iter(inputs)) if len(inputs) == 1 else "")
    if input_name not in inputs:
        raise ModelRefusedError(
            f"the graph's inputs are {', '.join(inputs)}; name one with --input-tensor, in a manifest input.tensor"
        )
    node = inputs[input_name]
    if node.type != _FLOAT:
        raise ModelRefusedError(f"the graph's input {input_name} is {node.type}, expected {_FLOAT}")
    fixed = tuple(node.shape[1:])
    if any(isinstance(have, int) and have != want for have, want in zip(fixed, manifest.input.shape, strict=False)):
        raise ModelRefusedError(f"the graph takes {list(fixed)} per instance, the manifest says {manifest.input.shape}")
    if node.shape and isinstance(node.shape[0], int):
        raise ModelRefusedError(f"the graph's batch size is fixed at {node.shape[0]}; export it with a dynamic batch")
    return input_name


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
