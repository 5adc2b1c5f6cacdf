"""Load predictors: a version's manifest with an open backend, after the digest and golden checks have passed."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InferenceError, InvalidRequestError, ModelRefusedError, StartError
from service.model.backends import Array, Backend, check_backend, choose_backends, choose_device, open_backend
from service.model.backends.accelerator import AcceleratorBackend
from service.model.columns import build_inputs, split_rows
from service.model.cost import Cost, measure_cost
from service.model.golden import is_close
from service.model.manifest import AnyManifest, BackendName, Manifest, digest
from service.model.signature import check_signature
from service.model.tensor_model import TensorPredictor, open_tensor_model
from service.model.version_folder import load_any_manifest, load_artifact, load_manifest

logger = logging.getLogger("service")

ABSOLUTE_TOLERANCE = 1e-5
RELATIVE_TOLERANCE = 1e-4
# TF32 rounds each operand by up to 2**-11. With operands rounded so, probabilities of the published models are off by
# up to 2e-3, and outputs of an encoder of BERT-base's size by as much.
TF32_TOLERANCE = 1e-2  # absolute and relative
PROBABILITY_TOLERANCE = 1e-3  # rounding error allowed in a probability or in the sum of a row
_NOT_FINITE = "the model has no finite answer for these values; they may be too large"
_LOWEST, _HIGHEST = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)
_ALONE = 2  # instances that are also run on their own at each load,
_ALONE_SECONDS = 0.2  # and only the first of them where it takes so long
_ROUNDING = 10  # multiple of the tolerance: kernels for one row and for several round differently


@dataclass(frozen=True)
class Predictor:
    """One loaded version of a model with a task."""

    manifest: Manifest
    backend: Backend

    @cached_property
    def width(self) -> int:
        """K, the number of columns in the graph's outputs."""
        return self.manifest.output_width

    def predict(self, inputs: Array) -> Array:
        """Run the graph on inputs, float32 (N, *shape), and return its validated outputs, float32 (N, K).

        Raises:
            InferenceError: The graph failed, its outputs are not (N, K), or they are not probabilities although the
                manifest says so.
            InvalidRequestError: An output is not finite. The golden samples passed, so the inputs are at fault: they
                overflow float32 or are outside the graph's domain.
        """
        outputs = self.backend.run(inputs)
        if outputs.shape != (len(inputs), self.width):
            return self._check_rows(outputs, len(inputs))
        lowest, highest = np.minimum.reduce(outputs, None, initial=0), np.maximum.reduce(outputs, None, initial=0)
        if self.manifest.output.kind in ("probability", "probabilities"):
            lower, upper = -PROBABILITY_TOLERANCE, 1 + PROBABILITY_TOLERANCE
        else:
            lower, upper = _LOWEST, _HIGHEST
        if lower <= lowest and highest <= upper:  # false for NaN too
            return outputs
        if np.isfinite(outputs).all():
            raise InferenceError(f"the graph gave {lowest:g} to {highest:g} where its manifest says probabilities")
        raise InvalidRequestError(_NOT_FINITE)

    def _check_rows(self, outputs: Array, count: int) -> Array:
        """Return rows of named outputs, whose numbers must be finite."""
        if outputs.dtype.names is None or len(outputs) != count:
            raise self._wrong_shape(outputs, count)
        floats = [tensor for tensor in split_rows(outputs).values() if tensor.dtype.kind == "f"]
        if not all(np.isfinite(tensor).all() for tensor in floats):
            raise InvalidRequestError(_NOT_FINITE)
        return outputs

    def _wrong_shape(self, outputs: Array, count: int) -> InferenceError:
        wanted = (count, self.width)
        return InferenceError(f"the graph gave outputs of shape {outputs.shape}, expected {wanted}")

    def measure_cost(self, max_rows: int) -> Cost:
        """Measure the cost of backend calls with up to `max_rows` rows. See `service.model.cost.measure_cost`."""
        if isinstance(self.backend, AcceleratorBackend):
            self.backend.warm_up(max_rows)
        if self.manifest.input.kind == "columns":
            return measure_cost(lambda zeros: self.run(build_inputs(self.manifest, len(zeros))), (), max_rows)
        return measure_cost(self.run, self.manifest.input.shape, max_rows)  # outputs for zeros may not be finite

    def run(self, inputs: Array) -> Array:
        """Return the graph's outputs, float32 (N, K), checking their shape but not their values."""
        outputs = self.backend.run(inputs)
        if outputs.shape != (len(inputs), self.width) and (outputs.dtype.names is None or len(outputs) != len(inputs)):
            raise self._wrong_shape(outputs, len(inputs))
        return outputs


AnyPredictor = Predictor | TensorPredictor
Place = tuple[BackendName, str]  # backend and device


def load_predictor(
    folder: Path, backend: str = "auto", device: str = "auto", threads: int = 1, serve_as: str | None = None
) -> Predictor:
    """Load a model with a task. See `load_any_predictor`.

    Raises:
        ModelRefusedError: The version cannot be served, or the model has no task.
        StartError: `backend` or `device` was requested by name and cannot be used.
    """
    load_manifest(folder)
    predictor = load_any_predictor(folder, backend, device, threads, serve_as=serve_as)
    assert isinstance(predictor, Predictor)
    return predictor


def load_any_predictor(  # noqa: PLR0913, PLR0917 - what is opened, where, and why it is trusted
    folder: Path,
    backend: str = "auto",
    device: str = "auto",
    threads: int = 1,
    preferred: str = "cuda:0",
    serve_as: str | None = None,
    tf32: bool = False,
    verified: str = "",
    public_key: str = "",
) -> AnyPredictor:
    """Read, verify and open a version folder.

    The returned predictor has passed the digest and golden checks.

    Args:
        folder: The version folder, `<name>/<version>`.
        backend: "auto", "onnx", "torchscript", "torch-export" or "onnx-int8".
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        threads: CPU threads per backend call.
        preferred: The accelerator that "auto" and "cuda" choose when there are several.
        serve_as: Model name for a folder that is not laid out as `<name>/<version>`, such as a KServe mount.
        tf32: Whether an NVIDIA GPU may round operands to TF32; golden outputs may then be off by `TF32_TOLERANCE`.
        verified: The digest of the manifest whose graphs have passed the golden check in another process, on the same
            kind of device; the check is not repeated, nor is that of its signature.
        public_key: The file of the key by which the version must be signed, if it must be.

    Raises:
        ModelRefusedError: The version cannot be served; the message says why.
        StartError: `backend` or `device` was requested by name and cannot be used.
    """
    check_backend(backend)
    signed = check_signature(folder, Path(public_key)) if public_key and not verified else ""
    manifest = load_named_manifest(folder, serve_as, signed)
    if verified and digest_manifest(manifest) != verified:
        raise ModelRefusedError("its manifest was replaced while it was opened")
    names = choose_backends(manifest, backend)
    if not names:
        raise ModelRefusedError(_no_backend(manifest, backend))
    places = _choose_places(names, device, preferred)
    # Verify every artifact, including those that are not run here: one damaged file makes the version invalid.
    contents = {each: load_artifact(folder, artifact) for each, artifact in manifest.artifacts.items()}
    for place, (name, where) in pairwise(places):
        try:
            return _open(contents, manifest, place, threads, tf32, bool(verified))
        except StartError as error:  # a build may list a device whose libraries fail to load
            _warn_once(f"{error}; models run by {name} on {where} instead")
    return _open(contents, manifest, places[-1], threads, tf32, bool(verified))


def load_named_manifest(folder: Path, serve_as: str | None = None, sha256: str = "") -> AnyManifest:
    """Read a version folder's manifest, of that digest if one is given, renaming the model to `serve_as` if given.

    Raises:
        ModelRefusedError: The manifest cannot be used, or does not match the folder's name and version.
    """
    manifest = load_any_manifest(folder, sha256)
    if serve_as is not None:
        return manifest.model_copy(update={"name": serve_as})
    if (folder.parent.name, folder.name) != (manifest.name, str(manifest.version)):
        raise ModelRefusedError(
            f"the manifest is of {manifest.name}/{manifest.version}, not of {folder.parent.name}/{folder.name}"
        )
    return manifest


def digest_manifest(manifest: AnyManifest) -> str:
    """Return the digest of a manifest's content, which covers the digests of its artifacts."""
    return digest(manifest.model_dump_json().encode())


def _open(
    contents: Mapping[BackendName, bytes],
    manifest: AnyManifest,
    place: Place,
    threads: int,
    tf32: bool,
    is_verified: bool,
) -> AnyPredictor:
    name, device = place
    if not isinstance(manifest, Manifest):
        return open_tensor_model(contents["onnx"], manifest, device, threads, tf32)
    predictor = Predictor(manifest, open_backend(name, contents[name], manifest, device, threads, tf32))
    if not is_verified:
        check_golden(predictor)
    return predictor


@cache
def _warn_once(sentence: str) -> None:
    logger.warning("%s", sentence)


def check_golden(predictor: Predictor) -> None:
    """Run the golden inputs and compare the outputs; without golden samples, run random inputs and check the shape.

    Raises:
        ModelRefusedError: An output is off by more than 1e-5 + 1e-4·|expected| (with TF32: 1e-2 + 1e-2·|expected|)
            plus the artifact's own tolerance, or depends on the other instances in the batch.
    """
    manifest = predictor.manifest
    golden = manifest.golden_rows
    if golden is None and manifest.input.kind == "columns":
        inputs = build_inputs(manifest, 2)
    elif golden is None:
        inputs = np.random.default_rng(0).random((2, *manifest.input.shape), dtype=np.float32)
    else:
        inputs = golden.inputs
    if len(inputs) == 1:  # `check_alone` needs a batch to compare with
        inputs = np.concatenate([inputs, inputs if inputs.dtype.names else inputs / 2])
    try:
        outputs = predictor.run(inputs)
    except InferenceError as error:
        kind = "random" if golden is None else "golden"
        raise ModelRefusedError(f"its {predictor.backend.name} graph fails on {kind} inputs: {error}") from error
    if golden is not None:
        allowed = manifest.artifacts[predictor.backend.name].tolerance or 0.0
        expected = golden.outputs
        worst = worst_excess(outputs[: len(expected)], expected, *_choose_tolerances(predictor)) - allowed
        if worst > 0:
            raise ModelRefusedError(
                f"its {predictor.backend.name} graph on {predictor.backend.device}"
                f" misses a golden output by {worst:.2g} more than the tolerance"
            )
    check_alone(predictor, inputs, outputs)


def check_alone(predictor: Predictor, inputs: Array, outputs: Array) -> None:
    """Check that an instance gets the same output alone as in a batch, since callers share batches.

    Raises:
        ModelRefusedError: The outputs differ, as they do for a net traced in training mode.
    """
    name = predictor.backend.name
    absolute, relative = (_ROUNDING * tolerance for tolerance in _choose_tolerances(predictor))
    allowed = absolute + (predictor.manifest.artifacts[name].tolerance or 0.0)
    until = time.perf_counter() + _ALONE_SECONDS
    for row, together in zip(inputs[:_ALONE, None], outputs, strict=False):
        try:
            alone = predictor.run(row)[0]
        except InferenceError as error:
            raise ModelRefusedError(
                f"its {name} graph fails on one instance alone, as a net in training mode does: {error}"
            ) from error
        if not is_close(alone, together, relative, allowed):
            raise ModelRefusedError(
                f"its {name} graph gives an instance another answer beside others than alone; export the net in"
                " evaluation mode: net.eval()"
            )
        if time.perf_counter() > until:
            break


def _choose_tolerances(predictor: Predictor) -> tuple[float, float]:
    """Return the absolute and the relative error that a predictor's outputs may have."""
    return (TF32_TOLERANCE, TF32_TOLERANCE) if predictor.backend.is_tf32 else (ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE)


def worst_excess(
    actual: NDArray[Any],
    expected: NDArray[Any],
    absolute: float = ABSOLUTE_TOLERANCE,
    relative: float = RELATIVE_TOLERANCE,
) -> float:
    """Return how far |actual - expected| exceeds absolute + relative·|expected|: <= 0 if they agree, inf for NaN."""
    if actual.dtype.names:
        return max(worst_excess(actual[name], expected[name], absolute, relative) for name in actual.dtype.names)
    if actual.dtype.kind in "bO":
        return 0.0 if np.array_equal(actual, expected) else float("inf")
    excess = np.abs(actual - expected) - (absolute + relative * np.abs(expected))
    worst = float(excess.max())
    return worst if np.isfinite(worst) else float("inf")


def _choose_places(names: list[BackendName], device: str, preferred: str) -> list[Place]:
    """Return the places to try, best first. For "auto": each backend's accelerator, then the CPU."""
    if device == "auto":
        places = [(name, choose_device(device, name, preferred)) for name in names]
        return [*(place for place in places if place[1] != "cpu"), (names[0], "cpu")]
    problems = []
    for name in names:
        try:
            return [(name, choose_device(device, name, preferred))]
        except StartError as error:
            problems.append(str(error))
    raise StartError("; ".join(problems))


def _no_backend(manifest: AnyManifest, wanted: str) -> str:
    has = " and ".join(manifest.artifacts)
    if wanted != "auto" and wanted not in manifest.artifacts:
        return f"it has {has}, not the {wanted} artifact that --backend asks for"
    return f"it has {has}, which cannot run here; install the torch extra: pip install '.[torch]'"
