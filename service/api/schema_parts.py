"""The small parts that JSON Schemas are built from."""

from typing import Any

Schema = dict[str, Any]

NUMBER: Schema = {"type": "number"}
TEXT: Schema = {"type": "string"}


def reference(name: str) -> Schema:
    """Return a reference to a schema in the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def object_of(properties: Schema, required: tuple[str, ...] | None = None) -> Schema:
    """Return the schema of an object with only these properties, all required unless `required` is given."""
    names = list(properties) if required is None else list(required)
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": names} if names else {})


def list_of(items: Schema, length: int) -> Schema:
    """Return the schema of an array of a fixed length."""
    return {"type": "array", "items": items, "minItems": length, "maxItems": length}
