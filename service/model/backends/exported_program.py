"""Run programs of `torch.export` (.pt2) with PyTorch."""

import io
import logging
import warnings
from collections.abc import Callable

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.export.passes import move_to_device_pass

from service.errors import ModelRefusedError
from service.model.backends import Array
from service.model.backends.program_archive import clean_archive
from service.model.backends.torchscript import TorchBackend, open_device

logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it logs a traceback beside the exception


def open_program(content: bytes, device: str, threads: int, tf32: bool = False) -> TorchBackend:
    """Open a program that takes one tensor and returns one. See `open_backend`."""
    target = open_device(device, threads, tf32)
    program = load_program(content)
    if target.type != "cpu":
        program = move_to_device_pass(program, target)
    return TorchBackend("torch-export", _build_call(program), target, tf32 and target.type == "cuda")


def load_program(content: bytes) -> ExportedProgram:
    """Return the program in a .pt2 archive, after checking that reading it runs no code; see `clean_archive`.

    Raises:
        ModelRefusedError: It is not such an archive, has a part that could run code, or does not load.
    """
    cleaned = io.BytesIO(clean_archive(content))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch about itself
            return torch.export.load(cleaned)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelRefusedError(f"torch cannot load the program: {reason}") from error


def convert_program(content: bytes) -> tuple[bytes, Callable[[Array], Array] | None]:
    """Convert a program to ONNX; also return what runs the program itself, None if it has several outputs.

    Raises:
        ModelRefusedError: As for `load_program`.
        ImportError: The package onnxscript is not installed.
    """
    program = load_program(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False)
    assert graph is not None
    outputs = [spec for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    run = TorchBackend("torch-export", _build_call(program), torch.device("cpu")).run if len(outputs) == 1 else None
    return graph.model_proto.SerializeToString(), run


def _build_call(program: ExportedProgram) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that runs the program's graph.

    `ExportedProgram.module` checks shapes at each call, which takes longer than a small graph; the service has checked
    them.

    Raises:
        ModelRefusedError: The program does not take one tensor and return one.
    """
    weights = program.state_dict | program.constants
    inputs = program.graph_signature.input_specs
    outputs = program.graph_signature.output_specs
    asked = [index for index, spec in enumerate(inputs) if spec.kind is InputKind.USER_INPUT]
    answered = [index for index, spec in enumerate(outputs) if spec.kind is OutputKind.USER_OUTPUT]
    if len(asked) != 1 or len(answered) != 1:
        raise ModelRefusedError(
            f"the program takes {len(asked)} inputs and gives {len(answered)} outputs; one of each is served"
        )
    arguments = [None if index == asked[0] else weights[str(spec.target)] for index, spec in enumerate(inputs)]
    before, after, answer = arguments[: asked[0]], arguments[asked[0] + 1 :], answered[0]
    run = program.graph_module.forward
    return lambda rows: run(*before, rows, *after)[answer]
