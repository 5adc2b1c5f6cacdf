"""Prove the GPU path and measure it, in at most nine minutes and without a network; `--device cpu` rehearses it.

    python -m benchmarks.gpu --data-dir data --out gpu.json

Each step runs in a process of its own with a limit of its own. One that fails, hangs or crashes is written down with
what it had found so far, and the others go on. `docs/gpu.md` says what each shows.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks import gpu_serving, gpu_steps
from benchmarks.gpu_steps import FailedError, SkipError, Step
from service.settings import count_cores

GRACE_SECONDS = 5.0  # for a step to stop its servers
SKIPPED, FAILED = 3, 4  # exit codes of a step


class Plan(NamedTuple):
    """A step: what it does and how many seconds it may take."""

    title: str
    run: Callable[[Step], None]
    seconds: float


TOTAL_SECONDS = 530.0  # less than nine minutes, with the last step's grace
PLANS = {
    "models": Plan("Models with random weights", gpu_steps.make_models, 90),
    "outputs": Plan("Golden outputs, test digits and the CPU's outputs", gpu_steps.check_outputs, 50),
    "devices": Plan("Where models say that they run", gpu_serving.show_devices, 40),
    "sizes": Plan("Batch sizes, without HTTP", gpu_steps.measure_sizes, 40),
    "kill": Plan("The engine is killed", gpu_serving.kill_engine, 25),
    "poison": Plan("A kernel fails an assertion", gpu_serving.poison_device, 35),
    "memory": Plan("More memory is asked for than there is", gpu_serving.exhaust_memory, 25),
    "training": Plan("One epoch of mnist-cnn", gpu_steps.train_epoch, 30),
    "digits": Plan("Single digits over HTTP, 64 clients", gpu_serving.measure_digits, 90),
    "medium": Plan("Large models over HTTP, 32 clients", gpu_serving.measure_medium, 105),
}


def main() -> int:
    """Run every step, print its table, and write all of them to a file; return 1 if one has failed."""
    options = _parse()
    if options.step:
        return _run_here(options)
    report: dict[str, Any] = {"machine": _describe_machine(), "device": options.device, "steps": {}}
    print("\n".join(f"{key}: {value}" for key, value in report["machine"].items()), flush=True)
    patience = 5 if options.quick else 1  # a rehearsal may meet a busy machine
    until = time.perf_counter() + patience * TOTAL_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or PLANS:
            seconds = min(patience * PLANS[name].seconds, until - time.perf_counter())
            report["steps"][name] = found = _run_apart(name, seconds, options, Path(folder))
            _print_table(PLANS[name].title, found)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(found["outcome"].startswith("failed") for found in report["steps"].values()))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu rehearses (default: cuda)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder with MNIST/raw (default: data)")
    parser.add_argument("--models-dir", type=Path, default=Path("models"), help="published models (default: models)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "model-service-bench" / "gpu-1"
    parser.add_argument("--made-dir", type=Path, default=cache, help=f"where models are made (default: {cache})")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="result file (default: gpu.json)")
    parser.add_argument("--quick", action="store_true", help="less of everything, and no large models")
    parser.add_argument("--only", nargs="+", choices=PLANS, metavar="STEP", help=f"of {', '.join(PLANS)}")
    parser.add_argument("--step", choices=PLANS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_apart(name: str, seconds: float, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a step in another process for so many seconds, and return its rows, its outcome and its seconds."""
    result, log = folder / f"{name}.json", folder / f"{name}.log"
    flags = [f"--{flag}={getattr(options, flag.replace('-', '_'))}" for flag in ("device", "data-dir", "models-dir")]
    flags += [f"--made-dir={options.made_dir}", *(["--quick"] if options.quick else [])]
    command = [sys.executable, "-m", "benchmarks.gpu", "--step", name, "--result", str(result), *flags]
    began = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            code = process.wait(max(seconds, 0))
            outcome = {0: "done", SKIPPED: "skipped", FAILED: "failed"}.get(code, f"failed with exit code {code}")
        except subprocess.TimeoutExpired:
            outcome = f"failed: not done after {seconds:.0f} s"
        finally:
            _end(process)
    lines = log.read_text(errors="replace").strip().splitlines()
    if outcome in ("skipped", "failed"):
        outcome += f": {lines[-1]}"
    elif outcome != "done":
        outcome += f" ({' | '.join(lines[-3:])})" if lines else ""
    rows = json.loads(result.read_text()) if result.exists() else []
    return {"outcome": outcome, "seconds": time.perf_counter() - began, "rows": rows}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a step and what it has started, which may be in other sessions."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGINT)  # it stops its servers
    psutil.wait_procs(family, GRACE_SECONDS)
    for each in family:
        if each.is_running():
            each.kill()
    process.wait()


def _run_here(options: argparse.Namespace) -> int:
    """Run a step in this process; the last line that it prints says why it was skipped or has failed."""
    step = Step(options.device, options.models_dir, options.made_dir, options.data_dir, options.quick, options.result)
    try:
        PLANS[options.step].run(step)
    except SkipError as reason:
        print(reason)
        return SKIPPED
    except FailedError as reason:
        print(" ".join(str(reason).split()))
        return FAILED
    return 0


def _describe_machine() -> dict[str, str]:
    found = {"cores": str(count_cores()), "python": platform.python_version()}
    for package in ("torch", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        found["gpu"] = "; ".join(subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines())
    return {"gpu": "none"} | found


def _print_table(title: str, found: dict[str, Any]) -> None:
    print(f"\n### {title}: {found['outcome']} ({found['seconds']:.0f} s)\n")
    columns = list(dict.fromkeys(key for row in found["rows"] for key in row))
    if columns:
        print(_format_row(columns))
        print("|" + "---|" * len(columns))
    for row in found["rows"]:
        print(_format_row(_show(row.get(column)) for column in columns))
    sys.stdout.flush()


def _format_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _show(value: Any) -> str:  # noqa: ANN401 - a number, words or nothing
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004 - three digits
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
