"""Read programs of `torch.export` (.pt2), without unpickling what a hostile file may have in it."""

import io
import json
import zipfile

import torch

from service.errors import ModelRefusedError

_PICKLED = (
    "the .pt2 file has pickled parts, which could run code; save it with torch.export.save by PyTorch 2.9 or newer"
)


def load_program(content: bytes) -> torch.export.ExportedProgram:
    """Return the program in a .pt2 archive, whose weights must be plain arrays.

    Its example inputs, which are a pickle, are left out.

    Raises:
        ModelRefusedError: It is not such an archive, or has pickled parts.
    """
    try:
        archive = _without_examples(content)
        return torch.export.load(archive)
    except ModelRefusedError:
        raise
    except Exception as error:
        raise ModelRefusedError(f"torch cannot load the program: {str(error).splitlines()[0]}") from error


def _without_examples(content: bytes) -> io.BytesIO:
    cleaned = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(cleaned, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            part = source.read(entry)
            if "/sample_inputs/" in entry.filename:
                part = b""
            if entry.filename.endswith("_config.json") and "/data/" in entry.filename:
                _check_plain(json.loads(part))
            if "/constants/custom_obj" in entry.filename or "/constants/opaque" in entry.filename:
                raise ModelRefusedError(_PICKLED)
            target.writestr(entry, part)
    cleaned.seek(0)
    return cleaned


def _check_plain(config: dict[str, dict[str, dict[str, object]]]) -> None:
    for payload in config.get("config", {}).values():
        if payload.get("use_pickle") is not False or not str(payload.get("path_name", "")).startswith(
            ("weight_", "tensor_")
        ):
            raise ModelRefusedError(_PICKLED)
