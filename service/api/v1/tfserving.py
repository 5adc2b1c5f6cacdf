"""TensorFlow Serving's words for predictions: `inputs` by column, `signature_name`, and answers of bare numbers.

Source: https://www.tensorflow.org/tfx/serving/api_rest
"""

from typing import Any

import numpy as np

from service.api.json_values import kind_of
from service.errors import InvalidRequestError
from service.model import postprocess
from service.model.backends import Array
from service.model.columns import split_rows
from service.model.manifest import ColumnsInput, Manifest, TabularInput

SIGNATURE = "serving_default"
BY_ROW, BY_COLUMN = "predictions", "outputs"  # what holds the numbers of an answer


def read_form(fields: dict[str, Any], manifest: Manifest) -> str:
    """Turn what only TensorFlow Serving's requests have into `instances`, in place.

    Returns:
        `BY_ROW` or `BY_COLUMN`, or nothing for a request that has none of it.

    Raises:
        InvalidRequestError: there is no such signature or format, or `inputs` cannot be read.
    """
    form = ""
    for name, known in (("signature_name", SIGNATURE), ("format", "tfserving")):
        if name in fields:
            form = BY_ROW
            if fields.pop(name) not in (known, ""):
                raise InvalidRequestError(f"{name} is not {known}, which is the only one; leave it out or send that")
    if "inputs" in fields and "instances" not in fields:
        form = BY_COLUMN
        fields["instances"] = _list_instances(fields.pop("inputs"), manifest)
    return form


def unwrap(instances: list[Any], manifest: Manifest) -> list[Any]:
    """Return instances that are objects with the graph's only input as the content of that."""
    spec = manifest.input
    if isinstance(spec, ColumnsInput) or not instances or type(instances[0]) is not dict:
        return instances
    name = spec.tensor or "inputs"
    if isinstance(spec, TabularInput) and name in [feature.name for feature in spec.features]:
        return instances
    return [
        instance[name] if type(instance) is dict and instance.keys() == {name} else instance for instance in instances
    ]


def _list_instances(inputs: object, manifest: Manifest) -> object:
    """Return what the column form has for each instance."""
    if isinstance(inputs, list):
        return inputs
    if not isinstance(inputs, dict) or not inputs:
        raise InvalidRequestError(f"inputs is {kind_of(inputs)}, expected a list of instances, or an object of lists")
    if not isinstance(manifest.input, ColumnsInput) and inputs.keys() == {manifest.input.tensor or "inputs"}:
        return next(iter(inputs.values()))
    for name, values in inputs.items():
        if not isinstance(values, list):
            raise InvalidRequestError(f"inputs.{name[:60]} is {kind_of(values)}, expected a list, by instance")
    if len(set(map(len, inputs.values()))) > 1:
        raise InvalidRequestError("the lists of inputs have several lengths; send equally many values in each")
    columns = [
        [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]
        for values in inputs.values()
    ]
    return [dict(zip(inputs, row, strict=True)) for row in zip(*columns, strict=True)]


def build_answer(outputs: Array, manifest: Manifest, form: str) -> dict[str, Any]:
    """Return the answer to a request of that form: the probabilities of classes, or else the graph's outputs."""
    if manifest.output.kind != "tensors":
        has_classes = manifest.task in ("binary", "multiclass", "multilabel")
        return {form: postprocess.interpret(outputs, manifest) if has_classes else outputs}
    tensors = {
        name: tensor.tolist() if tensor.dtype == object else np.ascontiguousarray(tensor)
        for name, tensor in split_rows(outputs).items()
    }
    if len(tensors) == 1:
        return {form: next(iter(tensors.values()))}
    if form == BY_COLUMN:
        return {form: tensors}
    return {form: [{name: tensor[index] for name, tensor in tensors.items()} for index in range(len(outputs))]}
