"""Implementations of the `python -m service` commands."""

import json
import logging
import signal
import sys
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np

from service.api.headers import RequestHeaders
from service.api.v1.decode import decode
from service.api.v1.encode import encode
from service.errors import InvalidRequestError, ModelRefusedError, NotFoundError, ServiceError, UnavailableError
from service.model.backends import is_installed
from service.model.manifest import Artifact, Manifest
from service.model.predictor import Predictor, load_any_predictor, load_predictor, worst_excess
from service.model.version_folder import load_any_manifest, load_artifact
from service.registry.model_folder import VersionFolder, list_versions
from service.runtime_folder import RuntimeFolder, find_access
from service.settings import Settings

_PARITY_ROWS = 256
_CALL_SECONDS = 60


def serve(settings: Settings, flags: dict[str, Any]) -> int:
    """Serve until stopped by a signal."""
    del flags
    # PID 1 in a container ignores SIGTERM unless it has a handler; the supervisor installs its own later.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with RuntimeFolder() as folder:
        # Delay SIGTERM until the imports are done: SystemExit raised inside native code may become another error.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        from service.hosts import litserve as litserve_host  # noqa: PLC0415 - only this command needs a web server
        from service.telemetry import log  # noqa: PLC0415

        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        log.configure(settings.log_format)
        litserve_host.serve(settings, folder)
    return 0


def predict(settings: Settings, flags: dict[str, Any]) -> int:
    """Run one request body from a file or standard input, as the service would."""
    logging.disable()
    source: str = flags["input"]
    try:
        body = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"{source} cannot be read: {error.strerror}") from error
    name, _, version = flags["model"].partition("/")
    folder = find_version(settings.models_dir, name, version)
    predictor = load_predictor(folder.path, settings.backend, settings.device, serve_as=folder.serve_as)
    call = decode(body, predictor.manifest, RequestHeaders(b""))
    print(encode(predictor.predict(call.inputs), predictor.manifest, call)[1].decode())
    return 0


def find_version(root: Path, name: str, version: str = "") -> VersionFolder:
    """Return a version's folder, or the newest version's if `version` is empty.

    Raises:
        NotFoundError: There is no such version.
    """
    folders = list_versions(root)
    found = [each for each in folders if each.name == name and version in ("", str(each.version))]
    if not found:
        known = ", ".join(sorted({folder.name for folder in folders})) or "(none)"
        raise NotFoundError(f"there is no {name}{'/' if version else ''}{version} in {root}; there are {known}")
    return found[-1]


def verify(settings: Settings, flags: dict[str, Any]) -> int:
    """Check every version on every installed backend; return 1 if any check fails."""
    del flags
    root = settings.models_dir
    folders = list_versions(root)
    if not folders:
        raise NotFoundError(f"there is no model in {root}")
    header = ("model", "version", "backend", "device", "digest", "golden", "parity")
    rows = [header, *(row for folder in folders for row in _verify_version(folder, settings.device))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
    skipped, failed = (
        sum(any(cell.startswith(word) for cell in row) for row in rows) for word in ("skipped", "FAILED")
    )
    print(f"{len(rows) - 1} checks of {len(folders)} versions, {skipped} skipped, {failed} failed")
    return 1 if failed else 0


def _verify_version(folder: VersionFolder, device: str) -> list[tuple[str, ...]]:
    """Return a table row for each backend of a version."""
    label = (folder.name, str(folder.version))
    try:
        manifest = load_any_manifest(folder.path)
    except ModelRefusedError as error:
        return [(*label, "-", "-", f"FAILED: {error}", "-", "-")]
    rows: list[tuple[str, ...]] = []
    opened: list[Predictor] = []
    damaged = {
        name: reason for name, artifact in manifest.artifacts.items() if (reason := _check_file(folder.path, artifact))
    }
    for name in manifest.artifacts:
        if damaged or not is_installed(name):
            reason = "another file of it is damaged" if damaged else "install '.[torch]' to run it"
            failure = (damaged[name], "-", "-") if name in damaged else ("ok", "-", f"skipped: {reason}")
            rows.append((*label, name, "-", *failure))
            continue
        try:
            predictor = load_any_predictor(folder.path, name, device, serve_as=folder.serve_as)
        except ServiceError as error:
            rows.append((*label, name, "-", f"FAILED: {error}", "-", "-"))
            continue
        golden, parity = "none", "-"
        if isinstance(predictor, Predictor):
            opened.append(predictor)
            samples = predictor.manifest.golden_rows
            golden = f"{len(samples.inputs)} ok" if samples else "none"
            parity = _verify_parity(predictor.manifest, opened)
        rows.append((*label, name, predictor.backend.device, "ok", golden, parity))
    return rows


def _check_file(folder: Path, artifact: Artifact) -> str:
    """Return what is wrong with an artifact's size or digest, or "". Needs no backend."""
    try:
        load_artifact(folder, artifact)
    except ModelRefusedError as error:
        return f"FAILED: {error}"
    return ""


def _verify_parity(manifest: Manifest, opened: list[Predictor]) -> str:
    """Compare the last opened backend with the first on random inputs, unless its weights are quantized."""
    if len(opened) == 1:
        return "-"
    if manifest.artifacts[opened[-1].backend.name].tolerance:
        return "rounded: golden only"
    inputs = np.random.default_rng(0).random((_PARITY_ROWS, *manifest.input.shape), dtype=np.float32)
    first, last = opened[0].run(inputs), opened[-1].run(inputs)
    difference = float(np.abs(first - last).max())
    verdict = "FAILED: " if worst_excess(last, first) > 0 else ""
    return f"{verdict}{difference:.1e} from {opened[0].backend.name}"


def models(settings: Settings, flags: dict[str, Any]) -> int:
    """List the models of a running service, or load, unload or roll back one of them."""
    what, model = flags["what"], flags["model"]
    url = (flags["url"] or f"http://127.0.0.1:{settings.port}").rstrip("/")
    if what == "list":
        for row in _call(settings, f"{url}/v2/repository/index", {}):
            names = (["latest"] if row.get("latest") else []) + row.get("labels", [])
            print("  ".join(filter(None, (row["name"], row["version"], row["state"], ", ".join(names), row["reason"]))))
        return 0
    if not model:
        raise InvalidRequestError(f"models {what} needs the name of a model")
    body = {"parameters": {"version": flags["to"]}} if flags["to"] else {}
    answer = _call(settings, f"{url}/v2/repository/models/{quote(model, safe='')}/{what}", body)
    print(f"{model}: serving {', '.join(answer['versions']) or 'nothing'}; latest {answer['latest'] or 'none'}")
    return 0


def _call(settings: Settings, url: str, body: dict[str, Any]) -> Any:  # noqa: ANN401 - decoded JSON
    access = find_access(url)
    key = settings.admin_key or (access.token if access else settings.api_key.partition(",")[0])
    headers = {"Content-Type": "application/json"} | ({"X-API-Key": key} if key else {})
    try:
        request = Request(url, json.dumps(body).encode(), headers)
        with urlopen(request, timeout=_CALL_SECONDS) as answer:
            return json.load(answer)
    except HTTPError as error:
        raise InvalidRequestError(_read_sentence(error)) from error
    except (ValueError, HTTPException) as error:
        raise UnavailableError(f"no model service answers at {url}: {error}") from error
    except OSError as error:
        raise UnavailableError(f"no service answers at {url}: {getattr(error, 'reason', error)}") from error


def _read_sentence(error: HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, LookupError, TypeError, HTTPException, OSError):  # such as a proxy's error page
        return f"{error.url} answers {error.code} {error.reason}"


def package(settings: Settings, flags: dict[str, Any]) -> int:
    """Add a user's model to the models folder, with a manifest."""
    from service.packaging.package import package_model  # noqa: PLC0415 - only this command needs it

    folder = package_model(settings.models_dir, flags)
    print(f"packaged {folder}; it is served as {folder.parent.name} version {folder.name}")
    manifest = load_any_manifest(folder)
    features = manifest.input.features if isinstance(manifest, Manifest) and manifest.input.kind == "tabular" else ()
    if any(feature.minimum is None for feature in features):
        print("the features' ranges are unknown, so its page has no sliders; --samples rows.csv tells them")
    return 0
