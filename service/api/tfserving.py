"""What TensorFlow Serving's REST API says of a model: the states of its versions, and its signature.

Source: https://www.tensorflow.org/tfx/serving/api_rest
"""

from typing import Any

from service.api.v1.tfserving import SIGNATURE
from service.api.v2.infer_request import input_specs, output_specs
from service.model.manifest import AnyManifest, Manifest
from service.registry.versions import LoadedVersion, Model

_OK = {"error_code": "OK", "error_message": ""}
_DTYPES = {"BOOL": "DT_BOOL", "FP16": "DT_HALF", "FP32": "DT_FLOAT", "FP64": "DT_DOUBLE", "BYTES": "DT_STRING"}


def list_status(model: Model, served: LoadedVersion | None = None) -> list[dict[str, Any]]:
    """Return the states of a model's versions, newest first, or of one that is being served."""
    if served is not None:
        return [{"version": str(served.manifest.version), "state": "AVAILABLE", "status": _OK}]
    found = {version: {"state": "AVAILABLE", "status": _OK} for version in model.versions}
    for key, reason in model.refused.items():
        if key.isdigit() and int(key) not in found:
            status = {"error_code": "FAILED_PRECONDITION", "error_message": reason}
            found[int(key)] = {"state": "END", "status": status}
    return [{"version": str(version), **found[version]} for version in sorted(found, reverse=True)]


def build_metadata(manifest: AnyManifest) -> dict[str, Any]:
    """Return the metadata of a version: its inputs, and what predictions in TensorFlow Serving's form have."""
    outputs = output_specs(manifest)
    if isinstance(manifest, Manifest) and manifest.output.kind != "tensors":
        outputs = {"outputs": outputs.get("probabilities") or next(iter(outputs.values()))}
    signature = {
        "inputs": _describe(input_specs(manifest)),
        "outputs": _describe(outputs),
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": manifest.name, "signature_name": "", "version": str(manifest.version)},
        "metadata": {"signature_def": {"signature_def": {SIGNATURE: signature}}},
    }


def _describe(specs: dict[str, tuple[str, list[int]]]) -> dict[str, Any]:
    return {
        name: {
            "name": name,
            "dtype": _DTYPES.get(datatype, f"DT_{datatype}"),
            "tensor_shape": {"dim": [{"size": str(size), "name": ""} for size in shape], "unknown_rank": False},
        }
        for name, (datatype, shape) in specs.items()
    }
