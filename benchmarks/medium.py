"""`--cases medium`: models that take milliseconds, by this service, by FastAPI and by onnxruntime alone.

One table a model. What is compared is measured in turns, since the machine's speed drifts. Bars are this project's
own, for ResNet-50 on two cores.
"""

import argparse
import math
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.clients import MAX_IN_FLIGHT, OK, REFUSED, TIMED_OUT, Pool, Response, run_closed, run_open
from benchmarks.contenders import JSON, build_body, load_model
from benchmarks.load import Load, Wrk
from benchmarks.medium_contenders import CLIENTS, NAN, Contender, Raw, describe_fastapi, describe_ours
from benchmarks.medium_models import MediumModel, open_folder
from benchmarks.processes import Started

DIGIT_CONNECTIONS = 4
OVERLOAD = 4  # times the rate that 16 clients get
DEADLINE = 2.0  # seconds, of each request of the overload; at most half of what the requests in flight take
SENT = 0.9  # of the overload's rate; where fewer are sent, it is the load generator that can do no more
BARRED = "resnet50"


@dataclass(frozen=True)
class Digits:
    """Single digits on four connections, alone and beside 16 clients of the model, and what these got."""

    alone: Load
    beside: Load
    others: Pool

    def describe(self) -> dict[str, str]:
        """Return rows of the table."""
        return {
            "digits alone, p50 / p99 ms": f"{self.alone.p50:.2f} / {self.alone.p99:.2f}",
            "digits beside it, p50 / p99 ms": f"{self.beside.p50:.2f} / {self.beside.p99:.2f}",
            "digits/s alone, beside it": f"{self.alone.rate:,.0f}, {self.beside.rate:,.0f}",
            f"{CLIENTS} clients beside digits, requests/s": _show(self.others.rate),
            "failed digits": str(self.alone.failed + self.beside.failed),
        }


@dataclass(frozen=True)
class Overload:
    """The responses to `rate` requests a second over so many seconds, each with a deadline (seconds)."""

    rate: float
    seconds: float
    deadline: float
    responses: list[Response]

    def describe(self) -> dict[str, str]:
        """Return rows of the table."""
        sent = len(self.responses)
        refused = [each.milliseconds for each in self.responses if each.status == REFUSED]
        accepted = [each.milliseconds for each in self.responses if each.status == OK]
        late = sum(each > self.deadline * 1e3 for each in accepted)
        limit = "" if sent >= SENT * self.rate * self.seconds else ", all that the load generator can"
        timed_out = sum(each.status == TIMED_OUT for each in self.responses)
        slowest = f", slowest {max(accepted):,.0f} ms" if accepted else ""
        quickly = f"{np.percentile(refused, 50):.1f} / {np.percentile(refused, 99):.1f}" if refused else ""
        return {
            f"overload: sent of {self.rate:,.0f}/s": f"{sent / self.seconds:,.0f}/s{limit}",
            "overload: deadline, ms": f"{self.deadline * 1e3:,.0f}",
            "overload: refused 503": f"{len(refused) / max(1, sent):.0%}",
            "overload: refused, p50 / p99 ms": quickly,
            "overload: accepted, late": f"{len(accepted) / self.seconds:,.1f}/s, {late} late{slowest}",
            "overload: answered 504 / otherwise": f"{timed_out} / {sent - len(refused) - len(accepted) - timed_out}",
        }


def measure_medium(model: MediumModel, options: argparse.Namespace, progress: Callable[[str], None]) -> None:
    """Measure one model and print its table."""
    folder = open_folder(model)
    raw, fastapi = Raw(folder, model), describe_fastapi(model, folder)
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / model.name).symlink_to(folder)
        (Path(root) / "mnist").symlink_to((options.models_dir / "mnist").absolute())
        ours, eight = (describe_ours(model, Path(root), workers) for workers in (2, 8))
        progress(f"{model.name}: {fastapi.name}")
        with fastapi.serve() as server:  # alone: where two share code, each seems smaller
            fastapi.measure_start(server)
        progress(f"{model.name}: {eight.name}")
        with eight.serve() as server:
            eight.measure_start(server)
            eight.check(server, raw.expected)
            eight.load_one(server, options.seconds)
            eight.load_many(server, options.seconds, options.warm_up)
            eight.memory_after = server.memory_mb()
        progress(f"{model.name}: {ours.name}")
        with ours.serve() as server:
            ours.measure_start(server)
            ours.check(server, raw.expected)
            _compare(ours, server, fastapi, raw, options)
            progress(f"{model.name}: digits beside it, and overload")
            digits = _measure_digits(ours, server, options)
            overload = _measure_overload(ours, server, options.seconds + 3)
            ours.memory_after = server.memory_mb()
    progress("")
    _print_table(model, (ours, eight, fastapi), raw, digits, overload)


def _compare(ours: Contender, server: Started, fastapi: Contender, raw: Raw, options: argparse.Namespace) -> None:
    """Measure in turns; a load's seconds are shared out among the rounds."""
    seconds = options.seconds / options.rounds
    with fastapi.serve() as other:
        fastapi.check(other, raw.expected)
        raw.choose_batch(seconds)
        for _ in range(options.rounds):
            raw.load_one(seconds)
            ours.load_one(server, seconds)
            fastapi.load_one(other, seconds)
        for _ in range(options.rounds):
            raw.load_many(seconds)
            ours.load_many(server, seconds, options.warm_up)
            fastapi.load_many(other, seconds, options.warm_up)
        fastapi.memory_after = other.memory_mb()


def _measure_digits(ours: Contender, server: Started, options: argparse.Namespace) -> Digits:
    _, manifest = load_model(options.models_dir, "mnist")
    body, url = build_body(manifest, 1), f"http://127.0.0.1:{server.port}/v1/models/mnist:predict"
    Wrk(url, body, DIGIT_CONNECTIONS, options.warm_up, JSON).finish()
    alone = Wrk(url, body, DIGIT_CONNECTIONS, options.seconds, JSON).finish()
    others = Pool()
    saturate = threading.Thread(
        target=run_closed,
        args=(server.port, ours.tensor.encode(), CLIENTS, options.seconds, options.warm_up, others),
    )
    saturate.start()
    time.sleep(options.warm_up)
    beside = Wrk(url, body, DIGIT_CONNECTIONS, options.seconds, JSON).finish()
    saturate.join()
    return Digits(alone, beside, others)


def _measure_overload(ours: Contender, server: Started, seconds: float) -> Overload:
    deadline = min(DEADLINE, MAX_IN_FLIGHT / ours.many.rate / 2)  # else the limit would keep all within it
    request = ours.tensor.encode({"X-Request-Timeout": f"{deadline:g}"})
    rate = OVERLOAD * ours.many.rate
    return Overload(rate, seconds, deadline, run_open(server.port, request, rate, seconds))


def _print_table(
    model: MediumModel, contenders: tuple[Contender, ...], raw: Raw, digits: Digits, overload: Overload
) -> None:
    """Print a row for each figure, with the bar that this service has to clear."""
    one, best = raw.one.percentile(50), raw.many.rate
    of_raw = f"onnxruntime, batches of {raw.batch}"
    bars = {
        "ready after, s": "≤ 4",
        "memory after loading, MB": "≤ 500; ≤ 550 with 8 workers",
        "one client, tensor, p50 ms": f"≤ {1.1 * one:.1f}, 1.1 × onnxruntime",
        f"{CLIENTS} clients, requests/s": f"≥ {0.95 * best:.1f}, 0.95 × onnxruntime",
        "digits beside it, p50 / p99 ms": "p99 ≤ 50",
        "overload: refused, p50 / p99 ms": "p99 ≤ 20",
        "overload: accepted, late": "0 late",
        "overload: answered 504 / otherwise": "0 / 0",
    }
    print(f"\n### medium: {model.title}\n")
    print(f"| | {' | '.join(each.name for each in contenders)} | {of_raw} | bar |")
    print("|---|" + "---|" * (len(contenders) + 2))
    rows: list[tuple[str, list[float], float]] = [
        ("ready after, s", [each.ready for each in contenders], raw.ready),
        ("memory after loading, MB", [each.memory for each in contenders], NAN),
        ("memory after the loads, MB", [each.memory_after for each in contenders], NAN),
        ("one client, tensor, p50 ms", [each.one.percentile(50) for each in contenders], one),
        ("one client, JPEG, p50 ms", [each.one_picture.percentile(50) for each in contenders], NAN),
        (f"{CLIENTS} clients, requests/s", [each.many.rate for each in contenders], best),
        (f"{CLIENTS} clients, p50 ms", [each.many.percentile(50) for each in contenders], NAN),
        ("failed requests", [each.failed for each in contenders], NAN),
    ]
    texts = {label: [_show(value) for value in (*values, alone)] for label, values, alone in rows}
    for label, text in (digits.describe() | overload.describe()).items():
        texts[label] = [text] + [""] * len(contenders)
    for label, cells in texts.items():
        bar = bars.get(label, "") if model.name == BARRED else ""
        print(f"| {label} | {' | '.join(cells)} | {bar} |")


def _show(value: float) -> str:
    """Return a figure with three digits or more, nothing for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"
