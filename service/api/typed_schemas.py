"""JSON Schemas of columns, and of what tasks other than classification answer."""

from service.api.schema_parts import NUMBER, TEXT, Schema, list_of, object_of
from service.model.manifest import Column, ColumnsInput, Datatype, Manifest, OutputValue

_TYPES = {"number": "number", "integer": "integer", "boolean": "boolean", "text": "string", "datetime": "string"}


def columns_schema(spec: ColumnsInput) -> Schema:
    """Return the schema of an instance of columns: an object, a list of the values in order, or one column's value."""
    properties = {column.name: _column_schema(column) for column in spec.columns}
    required = tuple(column.name for column in spec.columns if column.default is None and not column.nullable)
    size = len(properties)
    row = {"type": "array", "prefixItems": list(properties.values()), "items": {}, "minItems": size, "maxItems": size}
    row["description"] = f"the columns in order: {', '.join(properties)}"
    alone = list(properties.values()) if size == 1 else []
    return {"anyOf": [object_of(properties, required), row, *alone]}


def _column_schema(column: Column) -> Schema:
    if column.type == "category":
        kind = "integer" if isinstance(column.values[0], int) else "string"
        schema: Schema = {"enum": [*column.values, *([None] if column.nullable else [])]}
    else:
        kind, schema = _TYPES[column.type], {}
    schema["type"] = [kind, "null"] if column.nullable else kind
    if column.type == "datetime":
        schema["format"] = "date-time"
    if column.type == "integer" and column.choose_datatype("columns") == "INT64":
        schema |= {"minimum": -(2**63), "maximum": 2**63 - 1}
    if column.default is not None or column.nullable:
        schema["default"] = column.default
    return schema | {"description": _describe(column)}


def _describe(column: Column) -> str:
    about = f"{column.description or column.name}{_unit(column.unit)}"
    if column.minimum is not None and column.maximum is not None:
        about += f"; the training data covered {column.minimum:g} to {column.maximum:g}"
    return about


def _unit(unit: str | None) -> str:
    return f" in {unit}" if unit else ""


def output_schema(manifest: Manifest) -> Schema:
    """Return the schema of a prediction of a regression, multilabel, embedding or outputs model."""
    output = manifest.output
    if manifest.task == "multilabel":
        return _multilabel_schema(output.labels)
    if manifest.task == "embedding":
        numbers = list_of(NUMBER, manifest.output_width)
        encoded = TEXT | {"contentEncoding": "base64", "description": "if parameters.encoding is base64"}
        return object_of({"embedding": {"anyOf": [numbers, encoded]}})
    if manifest.task == "outputs":
        named = {each.name: _nested(each.datatype, each.shape) | _about(each) for each in output.outputs}
        return object_of({"outputs": object_of(named)})
    if output.kind == "values":
        return object_of({"prediction": object_of({each.name: NUMBER | _about(each) for each in output.values})})
    properties = {"prediction": NUMBER | {"description": f"{output.name}{_unit(output.unit)}"}}
    if output.kind == "interval":
        share = f" of {output.level:.0%}" if output.level else ""
        properties["interval"] = list_of(NUMBER, 2) | {"description": f"lower and upper end of an interval{share}"}
    return object_of(properties)


def _multilabel_schema(labels: tuple[str, ...]) -> Schema:
    probability: Schema = {"type": "number", "minimum": 0, "maximum": 1}
    return object_of(
        {
            "prediction": list_of({"type": "integer", "enum": [0, 1]}, len(labels))
            | {"description": f"whether {', '.join(labels)} apply"},
            "labels": {"type": "array", "items": {"type": "string", "enum": list(labels)}},
            "probabilities": list_of(probability, len(labels)) | {"description": f"of {', '.join(labels)}"},
        }
    )


def _about(value: OutputValue) -> Schema:
    return {"description": f"{value.description or value.name}{_unit(value.unit)}"}


def _nested(datatype: Datatype, shape: tuple[int, ...]) -> Schema:
    kind = {"BOOL": "boolean", "BYTES": "string"}.get(datatype, "number" if datatype[:2] == "FP" else "integer")
    nested: Schema = {"type": kind}
    for size in reversed(shape):
        nested = list_of(nested, size)
    return nested
