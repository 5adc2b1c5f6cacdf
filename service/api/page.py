"""HTML pages: the playground at `/`, with each version's card and training plots, and Swagger UI at `/docs`."""

import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from service.api.operations import OrjsonResponse, compress_for, find_served
from service.errors import NotFoundError, StartError
from service.model.columns import read_row
from service.model.manifest import ColumnsInput, ImageInput, Manifest
from service.registry.registry import Registry
from service.registry.versions import LoadedVersion

FOLDER = Path(__file__).parents[1] / "playground"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_DOCS_HEADERS = HEADERS | {  # Swagger UI uses inline styles
    "Content-Security-Policy": HEADERS["Content-Security-Policy"].replace("style-src", "style-src 'unsafe-inline'")
}
_PROBES = re.compile(r"/health/(live|ready)|/v2/health/(live|ready)|/v2/models/[^/]+(/versions/[^/]+)?/ready")
_SAMPLES = 8
_MOST_PICTURES = 12
SAMPLES_FILE = "samples.npy"
_PLOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.png")


def is_page(path: str) -> bool:
    """Return whether a path is a page or one of its files. They need no key; the page asks the user for it."""
    return path in ("/", "/docs") or path.startswith(("/playground/", "/docs/"))


def is_open(path: str) -> bool:
    """Return whether a path needs no key: health checks, pages and their files."""
    return _PROBES.fullmatch(path) is not None or is_page(path)


class PageFiles(StaticFiles):
    """Static files sent with `HEADERS`."""

    def file_response(self, *args: Any, **more: Any) -> Response:  # noqa: ANN401 - the base class's arguments
        """Return the file, or 304 if it has not changed."""
        response = super().file_response(*args, **more)
        response.headers.update(HEADERS)
        return response


def build_page(registry: Registry, models_dir: Path) -> list[BaseRoute]:
    """Return the routes of the pages and of each version's card and plots.

    `/playground/revision` changes with what is served; it needs no key, and tells no name.

    Args:
        registry: The models being served.
        models_dir: The models folder.

    Raises:
        StartError: The package with Swagger UI's files is not installed.
    """

    async def answer_page(request: Request) -> Response:
        if "text/html" not in request.headers.get("accept", ""):  # KServe's first API asks here for a sign of life
            return OrjsonResponse({"status": "alive"}, headers={"Vary": "Accept"})
        return FileResponse(FOLDER / "index.html", headers=HEADERS | {"Vary": "Accept"})

    async def answer_docs(request: Request) -> Response:
        del request
        return FileResponse(FOLDER / "docs.html", headers=_DOCS_HEADERS)

    async def answer_card(request: Request) -> Response:
        served = find_served(registry, request)
        return compress_for(request, OrjsonResponse(describe_card(served, _folder(served, models_dir))))

    async def answer_plot(request: Request) -> Response:
        served = find_served(registry, request)
        file = request.path_params["file"]
        folder = _folder(served, models_dir)
        if file not in list_plots(folder):
            raise NotFoundError(f"version {served.manifest.version} of {served.manifest.name} has no such plot")
        return FileResponse(folder / file, headers=HEADERS, media_type="image/png")

    async def answer_revision(request: Request) -> Response:
        del request
        served = [(name, sorted(model.versions), sorted(model.refused)) for name, model in registry.models.items()]
        latest = [model.latest.manifest.version if model.latest else 0 for model in registry.models.values()]
        return OrjsonResponse({"revision": crc32(repr((served, latest)).encode())})

    return [
        Route("/", answer_page, methods=["GET"]),
        Route("/playground/revision", answer_revision, methods=["GET"]),
        Mount("/playground", PageFiles(directory=FOLDER)),
        Route("/docs", answer_docs, methods=["GET"]),
        Mount("/docs", StaticFiles(directory=_find_docs_assets())),
        Route("/v1/models/{name}/card", answer_card, methods=["GET"]),
        Route("/v1/models/{name}/versions/{version}/card", answer_card, methods=["GET"]),
        Route("/v1/models/{name}/versions/{version}/plots/{file}", answer_plot, methods=["GET"]),
    ]


def describe_card(served: LoadedVersion, folder: Path) -> dict[str, Any]:
    """Return a version's training details and golden samples from its manifest, and the names of its plots."""
    manifest = served.manifest
    training, samples = (
        (manifest.training, _list_samples(manifest, folder)) if isinstance(manifest, Manifest) else (None, None)
    )
    return {
        "name": manifest.name,
        "version": manifest.version,
        "training": training.model_dump(mode="json") if training else None,
        "golden": samples,
        "plots": list_plots(folder),
    }


def _list_samples(manifest: Manifest, folder: Path) -> dict[str, Any] | None:
    """Return the samples that the page offers: of `samples.npy`, else the first golden samples, flattened or by column.

    `samples.npy` has bytes, (N, numbers of an input), that stand for 0 to 1: for models of pictures, one of each class.
    """
    golden, pictures = manifest.golden_rows, _read_samples(folder / SAMPLES_FILE, manifest)
    if pictures is not None:
        return {"inputs": [[round(value / 255, 4) for value in row] for row in pictures.tolist()]}
    if golden is None:
        return None
    inputs, outputs = golden.inputs[:_SAMPLES], golden.outputs[:_SAMPLES]
    if isinstance(manifest.input, ColumnsInput):
        return {"inputs": [read_row(manifest.input, row) for row in inputs]}
    shown = {"inputs": inputs.reshape(len(inputs), -1)}
    return shown if outputs.dtype.names else shown | {"outputs": outputs}


def _read_samples(file: Path, manifest: Manifest) -> NDArray[np.uint8] | None:
    """Return the bytes of a samples file, (N, numbers of an input), or None if there is none that fits the input."""
    if not isinstance(manifest.input, ImageInput) or not file.is_file() or file.is_symlink():
        return None
    try:
        pictures = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    if pictures.dtype != np.uint8 or pictures.ndim != 2 or pictures.shape[1] != math.prod(manifest.input.shape):  # noqa: PLR2004
        return None
    return np.array(pictures[:_MOST_PICTURES])


def list_plots(folder: Path) -> list[str]:
    """Return the names of the PNG files in a version folder, excluding symlinks."""
    return sorted(
        path.name
        for path in folder.glob("*.png")
        if _PLOT.fullmatch(path.name) and path.is_file() and not path.is_symlink()
    )


def _folder(served: LoadedVersion, models_dir: Path) -> Path:
    folder = models_dir / served.manifest.name / str(served.manifest.version)
    return folder if folder.is_dir() else models_dir  # `models_dir` itself holds the version's files


def _find_docs_assets() -> Path:
    """Return the folder of Swagger UI's files, installed from PyPI so that /docs works offline."""
    package = find_spec("fastapi_offline")
    if package is None or package.origin is None:
        raise StartError("the package fastapi-offline, which holds the files of /docs, is not installed")
    return Path(package.origin).parent / "static"
