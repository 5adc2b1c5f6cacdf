"""Check the .pt2 archives of `torch.export.save`, so that reading one runs no code that is in it. Needs no torch.

`torch.export.load` unpickles, evaluates expressions, calls whatever a graph names below `torch`, and compiles Python
that has names from the file in it. What passes here has no pickle, no names but plain ones, and only aten operators.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

from service.errors import ModelRefusedError

_GRAPH = "models/model.json"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_EXAMPLES = "data/sample_inputs/model.pt"  # a pickle, which nobody needs
_PLAIN = re.compile(
    r"archive_format|archive_version|byteorder|\.data/version|data/weights/weight_\d+|data/constants/tensor_\d+"
)
_DROPPED = re.compile(r"\.data/serialization_id|\.format_version|\.storage_alignment|extra/.*")
_TARGET = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|_operator\.(?:add|sub|mul|neg|pow|mod|floordiv|truediv|getitem|eq|ne|lt|le|gt|ge)",
    re.ASCII,
)
_EXPRESSION = re.compile(
    r"(?:Symbol\('[su]\d+'(?:, [a-z]+=(?:True|False))*\)"
    r"|(?:Integer|Add|Mul|Max|Min|FloorDiv|Mod|PythonMod|CleanDiv|PowByNatural)\(|[-\d(), ])+",
    re.ASCII,
)
_TEXT = re.compile(r"[\w.,> +-]*", re.ASCII)  # of an argument, such as an equation of einsum
_NAME = re.compile(r"[\w.+]*", re.ASCII)
_TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict")


def clean_archive(content: bytes) -> bytes:
    """Return a program's archive without its example inputs, stack traces and build numbers.

    Equal programs give equal bytes.

    Raises:
        ModelRefusedError: It is not such an archive, or has a part that could run code.
    """
    try:
        parts = dict(_read_parts(content))
        graph = _drop_metadata(json.loads(parts[_GRAPH]))
        configs = {name: json.loads(parts[name]) for name in _CONFIGS}
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError) as error:
        raise ModelRefusedError(
            "the file is not a program of torch.export; write one with torch.export.save of PyTorch 2.9 or newer"
        ) from error
    for config in configs.values():
        for payload in config["config"].values():
            if payload["use_pickle"] is not False:
                raise ModelRefusedError("the program has pickled weights, which could run code; save plain tensors")
    for part in (graph, *configs.values()):
        _check(part, "")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        written = {name: json.dumps(part).encode() for name, part in {_GRAPH: graph, **configs}.items()}
        for name, part in (parts | written | {_EXAMPLES: b""}).items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), part)  # its time is 1980-01-01
    return buffer.getvalue()


def _read_parts(content: bytes) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if not any(name.endswith(f"/{_GRAPH}") for name in archive.namelist()):
            raise KeyError(_GRAPH)
        for entry in archive.infolist():
            name = entry.filename.partition("/")[2]  # without the archive's own folder
            if name == _EXAMPLES or _DROPPED.fullmatch(name):
                continue
            if name not in (_GRAPH, *_CONFIGS) and not _PLAIN.fullmatch(name):
                raise ModelRefusedError(f"the program has a part that is not read, because it could run code: {name}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ModelRefusedError("the program's archive is compressed; torch.export.save writes it plainly")
            yield name, archive.read(entry)


def _drop_metadata(part: Any) -> Any:  # noqa: ANN401 - JSON
    """Return a graph without what is only for people: stack traces, and the modules that nodes came from."""
    if isinstance(part, dict):
        return {name: {} if name == "metadata" else _drop_metadata(value) for name, value in part.items()}
    return [_drop_metadata(value) for value in part] if isinstance(part, list) else part


def _check(part: Any, key: str) -> None:  # noqa: ANN401 - JSON
    """Check every text in a part, by the key that it has."""
    if isinstance(part, dict):
        for name, value in part.items():
            _check(name, "")
            _check(value, name)
    elif isinstance(part, list):
        for value in part:
            _check(value, key)
    elif isinstance(part, str) and key in ("in_spec", "out_spec"):
        _check_tree(part)
    elif isinstance(part, str):
        allowed = {"target": _TARGET, "as_operator": _TARGET, "expr_str": _EXPRESSION, "as_string": _TEXT}
        if not allowed.get(key, _NAME).fullmatch(part):
            what = "calls an operator" if key == "target" else "has a text"
            raise ModelRefusedError(f"the program {what} that is not allowed, because it could run code: {part[:80]!r}")


def _check_tree(text: str) -> None:
    """Check how arguments are nested: tuples, lists and dicts without keys."""
    nodes = json.loads(text)[1:]
    while nodes:
        node = nodes.pop()
        if node["type"] not in _TREES or node["context"] not in (None, "null", "[]"):
            raise ModelRefusedError(f"the program takes or gives {node['type']}; only tensors are served")
        nodes.extend(node["children_spec"])
