"""`make bench`: every contender on every case, interleaved over rounds, as one table per case."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import requests

from benchmarks.contenders import (
    CASES,
    CONTENDERS,
    JSON,
    Case,
    Contender,
    build_binary,
    build_body,
    build_rows,
    build_v2,
    load_model,
)
from benchmarks.load import Load, Wrk, check_wrk
from benchmarks.many import measure_many
from benchmarks.medium import measure_medium
from benchmarks.medium_models import MODELS
from benchmarks.processes import Started, start
from service.model.manifest import Manifest

IDLE_SECONDS = 5.0


@dataclass
class Measured:
    """All rounds of one contender on one case; `cpu` in µs a request of the whole process tree."""

    loads: list[Load] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: float = 0.0
    cold_start: list[float] = field(default_factory=list)
    idle: float = 0.0


def main() -> int:
    """Measure and print."""
    options = _parse()
    check_wrk()
    contenders = [each for each in CONTENDERS if each.installed and _is_wanted(each.name, options.contenders)]
    if options.against:
        contenders = [CONTENDERS[0], replace(CONTENDERS[0], name=f"{options.against}", folder=options.against)]
    for missing in [each for each in CONTENDERS if not each.installed]:
        print(f"not installed: {missing.name} (pip install -r benchmarks/requirements.txt)")
    print(_machine())
    for case in [each for each in CASES if _is_wanted(each.name, options.cases)]:
        folder, manifest = load_model(options.models_dir, case.model)
        results: dict[str, Measured] = {each.name: Measured() for each in contenders}
        for number in range(options.rounds):
            for contender in contenders:
                _progress(f"{case.name}: round {number + 1} of {options.rounds}: {contender.name}")
                _measure(contender, case, folder, manifest, options, results[contender.name])
        _progress("")
        _print_table(case, results)
    if _is_wanted("mixed", options.cases):
        _print_mixed(options)
    if _is_wanted("many", options.cases):
        measure_many(options, _progress)
    for model in MODELS[: 1 if options.quick else None]:
        if _is_wanted("medium", options.cases) or _is_wanted(model.name, options.cases):
            measure_medium(model, options, _progress)
    return 0


def _measure(
    contender: Contender, case: Case, folder: Path, manifest: Manifest, options: argparse.Namespace, into: Measured
) -> None:
    body, headers = build_body(manifest, case.rows), JSON
    path = contender.path.format(model=case.model)
    if case.v2:
        if not contender.v2_path:
            return
        path = contender.v2_path.format(model=case.model)
        body = build_v2(manifest, case.rows)
    if case.binary:
        body, headers = build_binary(manifest, case.rows)
    try:
        server = _start(contender, path, folder, body, headers, options.models_dir)
    except RuntimeError as error:
        print(f"\n{contender.name}: {error}", file=sys.stderr)
        return
    try:
        url = f"http://127.0.0.1:{server.port}{path}"
        _check_answer(url, body, headers, folder, manifest, case.rows, contender.name)
        Wrk(url, body, case.connections, options.warm_up, headers).finish()
        before = server.cpu_seconds()
        load = Wrk(url, body, case.connections, options.seconds, headers).finish()
        into.cpu.append((server.cpu_seconds() - before) / max(1, load.requests) * 1e6)
        into.loads.append(load)
        into.cold_start.append(server.cold_start)
        into.memory = max(into.memory, server.memory_mb())
        if case.name == "digit" and not into.idle:
            into.idle = _idle_share(server)
    finally:
        server.stop()


def _start(
    contender: Contender, path: str, folder: Path, body: bytes, headers: dict[str, str], models_dir: Path
) -> Started:
    environment = {"BENCH_MODEL": str(folder), "SERVICE_MODELS_DIR": str(models_dir), "BENTOML_DO_NOT_TRACK": "True"}
    command = list(contender.command)
    return start(command, environment | contender.environment, path, body, headers, contender.folder)


def _check_answer(
    url: str, body: bytes, headers: dict[str, str], folder: Path, manifest: Manifest, rows: int, name: str
) -> None:
    """Refuse to measure a server that answers anything but what onnxruntime itself gives."""
    session = ort.InferenceSession(str(folder / "model.onnx"))
    inputs = build_rows(manifest, rows)
    expected: Any = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    if expected.shape[1] == 1:
        expected = np.concatenate([1 - expected, expected], axis=1)
    answer = requests.post(url, data=body, headers=headers, timeout=30)
    if headers is JSON and "outputs" in answer.json():
        got = np.array(answer.json()["outputs"][0]["data"]).reshape(rows, -1)
    elif headers is JSON:
        got = np.array([prediction["probabilities"] for prediction in answer.json()["predictions"]])
    else:
        length = int(answer.headers["Inference-Header-Content-Length"])
        got = np.frombuffer(answer.content, np.float32, offset=length).reshape(rows, -1)
    if got.shape != expected.shape or np.abs(got - expected).max() > 1e-5:  # noqa: PLR2004 - float32 on another batch size
        raise SystemExit(f"{name} answers otherwise than onnxruntime")


def _idle_share(server: Started) -> float:
    """Return the share of one core the tree uses when nothing is asked of it."""
    time.sleep(1)
    before = server.cpu_seconds()
    time.sleep(IDLE_SECONDS)
    return (server.cpu_seconds() - before) / IDLE_SECONDS


def _print_table(case: Case, results: dict[str, Measured]) -> None:
    ours = _median([load.rate for load in results.get("this service", Measured()).loads])
    print(f"\n### {case.name}: {case.rows} instance(s) of {case.model} a request, {case.connections} connection(s)\n")
    print("| server | requests/s (min–max) | ours is × | p50 ms | p99 ms | CPU µs | MB | cold start s | idle % |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, measured in results.items():
        if not measured.loads and case.v2:
            continue
        if not measured.loads:
            print(f"| {name} | did not run | | | | | | | |")
            continue
        rates = [load.rate for load in measured.loads]
        failed = sum(load.failed for load in measured.loads)
        cells = [
            name + (f" ({failed} FAILED)" if failed else ""),
            f"{_median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f})",
            f"{ours / _median(rates):.2f}",
            f"{_median([load.p50 for load in measured.loads]):.2f}",
            f"{_median([load.p99 for load in measured.loads]):.2f}",
            f"{_median(measured.cpu):,.0f}",
            f"{measured.memory:.0f}",
            f"{_median(measured.cold_start):.2f}",
            f"{measured.idle * 100:.1f}" if measured.idle or case.name == "digit" else "",
        ]
        print(f"| {' | '.join(cells)} |")


def _print_mixed(options: argparse.Namespace) -> None:
    """Show what one client that sends 256 digits a request does to 16 that send one."""
    folder, manifest = load_model(options.models_dir, "mnist")
    one, many = build_body(manifest, 1), build_body(manifest, 256)
    print("\n### mixed: single digits on 16 connections, without and with one client of 256 digits a request\n")
    print("| server | p50 ms alone | p99 ms alone | p50 ms beside | p99 ms beside | p99 grew × |")
    print("|---|---|---|---|---|---|")
    for contender in CONTENDERS[:1]:
        path = contender.path.format(model="mnist")
        server = _start(contender, path, folder, one, JSON, options.models_dir)
        try:
            url = f"http://127.0.0.1:{server.port}{path}"
            Wrk(url, one, 16, options.warm_up, JSON).finish()
            alone = Wrk(url, one, 16, options.seconds, JSON).finish()
            large = Wrk(url, many, 1, options.seconds + 1, JSON)
            beside = Wrk(url, one, 16, options.seconds, JSON).finish()
            large.finish()
        finally:
            server.stop()
        figures = [alone.p50, alone.p99, beside.p50, beside.p99, beside.p99 / alone.p99]
        print(f"| {contender.name} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one short round of the main case (of medium: the main model)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="of each measured load")
    parser.add_argument("--warm-up", type=int, default=1, help="seconds of load before each measured one")
    parser.add_argument(
        "--cases", default="", help="names or patterns, comma-separated: " + _names(CASES) + ", mixed, many, medium"
    )
    parser.add_argument("--contenders", default="", help="names or patterns, comma-separated")
    parser.add_argument("--against", type=Path, help="another checkout of this project, measured in turn with this one")
    parser.add_argument("--models-dir", type=Path, default=Path("models").absolute())
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.cases = 1, 3, options.cases or "digit"
    return options


def _is_wanted(name: str, wanted: str) -> bool:
    return not wanted or any(fnmatch(name, part.strip()) for part in wanted.split(","))


def _names(cases: tuple[Case, ...]) -> str:
    return ", ".join(case.name for case in cases)


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def _machine() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    cores = len(os.sched_getaffinity(0))
    about = {"cpu": cpu, "cores": cores, "python": platform.python_version(), "commit": commit.stdout.strip() or "?"}
    return json.dumps(about)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
