"""Golden samples as arrays: `golden.npz` beside the artifacts, with its digest in the manifest.

The file has an array for each tensor, `inputs/<name>` and `outputs/<name>`, each (N, ...), written without pickle; a
graph's only input and output may be called `inputs` and `outputs`. Text is an array of Unicode strings.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import ModelRefusedError
from service.model.columns import join_tensors, split_rows
from service.model.manifest import Artifact, ColumnsInput, Golden, GoldenRows, Manifest, digest

GOLDEN_FILE = "golden.npz"
MAX_BYTES = 2**28  # of all arrays, unpacked
_INPUTS, _OUTPUTS = "inputs/", "outputs/"


def write_golden(folder: Path, manifest: Manifest, rows: GoldenRows) -> Manifest:
    """Write golden samples into a version folder, and return the manifest with them, of schema version 2."""
    arrays: dict[str, Any] = {}
    for prefix, name, side in (
        (_INPUTS, _input_name(manifest), rows.inputs),
        (_OUTPUTS, _output_name(manifest), rows.outputs),
    ):
        for key, tensor in (split_rows(side) if side.dtype.names else {name: side}).items():
            arrays[prefix + key] = tensor.astype(np.str_) if tensor.dtype == object else tensor
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    content = buffer.getvalue()
    (folder / GOLDEN_FILE).write_bytes(content)
    golden = Golden(file=GOLDEN_FILE, sha256=digest(content), bytes=len(content))
    return manifest.model_copy(update={"schema_version": 2}).with_golden_rows(golden, rows)


def parse_golden(content: bytes, manifest: Manifest) -> GoldenRows:
    """Return the golden samples that a file's bytes, already verified, have for a manifest.

    Raises:
        ModelRefusedError: It is not such a file, or an array is missing or has another shape.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            if sum(each.file_size for each in arrays.zip.infolist()) > MAX_BYTES:
                raise ModelRefusedError(f"its arrays have over {MAX_BYTES} bytes; a few samples are enough")
            inputs = _read(arrays, _INPUTS, manifest)
            outputs = _read(arrays, _OUTPUTS, manifest)
    except KeyError as error:
        raise ModelRefusedError(f"{GOLDEN_FILE} has no array {error}") from error
    except Exception as error:  # zipfile and numpy raise about ten exception types
        raise ModelRefusedError(f"{GOLDEN_FILE} is not golden samples of this model: {error}") from error
    if len(inputs) != len(outputs) or not len(inputs):
        raise ModelRefusedError(f"{GOLDEN_FILE} has {len(inputs)} inputs and {len(outputs)} outputs")
    return GoldenRows(inputs, outputs)


def golden_artifact(golden: Golden) -> Artifact:
    """Return the file of golden samples as an artifact, by which it is read and verified."""
    assert golden.file is not None
    assert golden.sha256 is not None
    assert golden.bytes is not None
    return Artifact(file=golden.file, sha256=golden.sha256, bytes=golden.bytes)


def is_close(actual: NDArray[Any], expected: NDArray[Any], relative: float, absolute: float) -> bool:
    """Return whether outputs agree, field by field if they are rows: numbers within a tolerance, the rest exactly."""
    actual, expected = np.asarray(actual), np.asarray(expected)  # one of a row's fields may be a plain value
    if actual.dtype.names:
        return all(is_close(actual[name], expected[name], relative, absolute) for name in actual.dtype.names)
    if actual.dtype.kind in "bOU":
        return np.array_equal(actual, expected)
    return np.allclose(actual, expected, relative, absolute, equal_nan=True)


def _read(arrays: Any, prefix: str, manifest: Manifest) -> NDArray[Any]:  # noqa: ANN401 - an NpzFile
    """Return one side as the graph takes or gives it."""
    side = manifest.input if prefix == _INPUTS else manifest.output
    if isinstance(side, ColumnsInput) or side.kind == "tensors":
        dtype = side.row_dtype if isinstance(side, ColumnsInput) else manifest.output.row_dtype
        names = dtype.names or ()
        return join_tensors({name: _as_objects(arrays[prefix + name]) for name in names}, dtype)
    plain: NDArray[Any] = arrays[prefix + (_input_name(manifest) if prefix == _INPUTS else _output_name(manifest))]
    shape = manifest.input.shape if prefix == _INPUTS else (manifest.output_width,)
    if plain.shape[1:] != tuple(shape):
        raise ModelRefusedError(f"{prefix[:-1]} have shape {list(plain.shape)}, expected {['N', *shape]}")
    return plain.astype(np.float32)


def _as_objects(tensor: NDArray[Any]) -> NDArray[Any]:
    return tensor.astype(object) if tensor.dtype.kind == "U" else tensor


def _input_name(manifest: Manifest) -> str:
    return manifest.input.tensor or "inputs"


def _output_name(manifest: Manifest) -> str:
    return manifest.output.tensor or "outputs"
