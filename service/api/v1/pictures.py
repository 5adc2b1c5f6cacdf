"""Decode images from request bodies: raw image bytes, multipart files, and `{"b64": …}` instances in JSON."""

import base64
import binascii
from email.message import Message
from typing import Any, NamedTuple

import numpy as np

from service.api.json_values import kind_of
from service.api.limits import ReadLimits
from service.api.v1.instances import read_instances
from service.errors import InvalidRequestError
from service.model.backends import Array
from service.model.manifest import ImageInput, Manifest

MAX_PARTS = 1024
_FORM_FIELDS = ("files", "parameters")
_MAX_HEADER = 2**12  # bytes of a content type, or of a part's header


class Part(NamedTuple):
    """One part of a multipart body: its field name, its content, and whether it is a file."""

    name: str
    content: bytes
    is_file: bool = True


def is_picture(content_type: bytes) -> bool:
    """Return whether a content type is an image or a multipart form."""
    return content_type[:6].lower() == b"image/" or is_multipart(content_type)


def is_multipart(content_type: bytes) -> bool:
    """Return whether a content type is a multipart form."""
    return content_type.partition(b";")[0].strip().lower() == b"multipart/form-data"


def read_pictures(body: bytes, spec: ImageInput, content_type: bytes, limits: ReadLimits) -> tuple[Array, bytes | None]:
    """Decode an image or form body into inputs, float32 (N, *shape), and the form's parameters.

    In a form, the part named "parameters" is JSON and is returned undecoded; the parts named "files", and files under
    any other name, are images.

    Raises:
        InvalidRequestError: The form or an image cannot be read, or it has an unknown field.
        TooLargeError: It has too many images.
    """
    from service.model.preprocess import read_image, read_images  # noqa: PLC0415 - import Pillow only for images

    if not is_multipart(content_type):
        return read_image(body, spec), None
    parts = split_form(body, content_type)
    for part in parts:
        if not part.is_file and part.name not in _FORM_FIELDS:
            shown = part.name[:60].encode("ascii", "replace").decode()
            raise InvalidRequestError(f"the form has an unknown field {shown!r}; send files, and parameters as JSON")
    pictures = [part.content for part in parts if part.name != "parameters"]
    parameters = next((part.content for part in parts if part.name == "parameters"), None)
    if not pictures:
        raise InvalidRequestError("the form has no file; send at least one picture")
    limits.check_rows(len(pictures))
    return read_images(pictures, spec, [f"file {index}" for index in range(len(pictures))], limits.check), parameters


def split_form(body: bytes, content_type: bytes) -> list[Part]:
    """Return the parts of a multipart/form-data body (RFC 7578), in order.

    Raises:
        InvalidRequestError: The boundary is missing or invalid, the closing boundary is missing, there are too many
            parts, or a part is malformed.
    """
    boundary = _parse_header(content_type[:_MAX_HEADER].decode("latin-1")).get_boundary()
    if not boundary or not boundary.isascii() or len(boundary) > 70:  # noqa: PLR2004 - RFC 2046, section 5.1.1
        raise InvalidRequestError("the form's Content-Type has no usable boundary")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("ascii"), MAX_PARTS + 2)
    ends = [index for index, piece in enumerate(pieces) if index and piece.startswith(b"--")]
    if not ends:
        many = len(pieces) > MAX_PARTS + 2
        raise InvalidRequestError(f"the form has over {MAX_PARTS} parts" if many else "the form is cut short")
    return [_read_part(piece) for piece in pieces[1 : ends[0]]]


def _read_part(piece: bytes) -> Part:
    _, _, piece = piece.partition(b"\r\n")
    head, blank, content = (b"", b"\r\n", piece[2:]) if piece[:2] == b"\r\n" else piece.partition(b"\r\n\r\n")
    if not blank:
        raise InvalidRequestError("a part of the form has no empty line between its header and its content")
    if len(head) > _MAX_HEADER:
        raise InvalidRequestError(f"a part of the form has a header of over {_MAX_HEADER} bytes")
    for line in head.split(b"\r\n"):
        field, _, value = line.decode("latin-1").partition(":")
        if field.strip().lower() == "content-disposition":
            disposition = _parse_header(value.strip())
            name = disposition.get_param("name", "", "content-type")
            is_file = disposition.get_param("filename", None, "content-type") is not None
            return Part(name if isinstance(name, str) else "", content, is_file or not name)
    return Part("", content)


def _parse_header(value: str) -> Message:
    """Parse a header value with parameters, using the standard library's email parser."""
    message = Message()
    message["content-type"] = value.replace("\r", " ").replace("\n", " ")
    return message


def read_encoded(instances: list[Any], manifest: Manifest, limits: ReadLimits) -> Array:
    """Return the inputs float32 (N, *shape) of decoded JSON instances, some or all of them `{"b64": …}`.

    Raises:
        InvalidRequestError: An instance is not base64, has other fields, or its image or values cannot be read.
    """
    from service.model.preprocess import read_images  # noqa: PLC0415 - import Pillow only for images

    spec = manifest.input
    assert isinstance(spec, ImageInput)
    places = [index for index, instance in enumerate(instances) if isinstance(instance, dict)]
    names = [f"instances[{index}].b64" for index in places]
    contents = [_decode_b64(instances[index], f"instances[{index}]") for index in places]
    inputs = np.empty((len(instances), *spec.shape), np.float32)
    inputs[places] = read_images(contents, spec, names, limits.check)
    for index in set(range(len(instances))).difference(places):
        inputs[index : index + 1] = read_instances([instances[index]], manifest, index)
    return inputs


def _decode_b64(instance: dict[str, object], where: str) -> bytes:
    for name in instance:
        if name != "b64":
            raise InvalidRequestError(f'{where} has an unknown field {name[:60]!r}; expected {{"b64": "…"}}')
    text = instance.get("b64")
    if not isinstance(text, str):
        found = kind_of(text) if "b64" in instance else "not there"
        raise InvalidRequestError(f"{where}.b64 is {found}, expected a picture's bytes as a base64 string")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"{where}.b64 is not base64 (RFC 4648, without a data: prefix)") from error
