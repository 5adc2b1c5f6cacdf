"""The steps of `benchmarks.gpu` without HTTP: each proves or measures one thing and adds rows to its table."""

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import build_rows, load_model
from benchmarks.medium_models import LENGTH, SIDE, WORDS
from service.errors import ServiceError
from service.model.backends import list_accelerators
from service.model.manifest import Manifest
from service.model.predictor import Predictor, load_predictor, worst_excess
from service.model.version_folder import load_manifest
from service.settings import count_cores

MEDIUM = ("resnet50", "encoder")  # the large models
SIZES = (1, 2, 4, 8, 16, 32, 64)
WHOLE_TEST, SLACK = 10_000, 2.5  # digits; how many more or fewer may be recognised, by rounding
LEARNT = 0.9  # share of the test digits that a net recognises after one epoch, at least


class SkipError(Exception):
    """This machine cannot do a step, and need not."""


class FailedError(Exception):
    """A step has shown something that must not be."""


@dataclass
class Step:
    """What a step has to work with, and the rows of its table so far.

    Attributes:
        device: "cuda" or "cpu".
        models: the published models.
        made: the models of `benchmarks.gpu_models`.
        data: a folder with MNIST.
        quick: a rehearsal: less of everything.
        result: where the rows are kept.
    """

    device: str
    models: Path
    made: Path
    data: Path
    quick: bool
    result: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **row: Any) -> None:  # noqa: ANN401 - numbers and words
        """Add a row, and keep it even if the step is ended."""
        self.rows.append(row)
        self.result.write_text(json.dumps(self.rows))

    @property
    def medium(self) -> tuple[str, ...]:
        """The large models that have been made."""
        return tuple(name for name in MEDIUM if (self.made / name / "1" / "manifest.json").exists())


def build_inputs(name: str, rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return random inputs of a model in `MEDIUM`: float32 (rows, 3, 224, 224), or (rows, 128) of whole numbers."""
    random = np.random.default_rng(0)
    if name == "encoder":
        return random.integers(WORDS, size=(rows, LENGTH)).astype(np.float32)
    return random.random((rows, 3, SIDE, SIDE), dtype=np.float32)


def make_models(step: Step) -> None:
    """Write the models that are not published."""
    from benchmarks.gpu_models import write_hungry, write_lookup, write_medium  # noqa: PLC0415 - only this needs torch

    for write in (write_lookup, write_hungry):
        write(step.made)
    for name in () if step.quick else MEDIUM:
        began = time.perf_counter()
        write_medium(step.made, name)
        step.add(model=name, seconds=time.perf_counter() - began)
    step.add(model="lookup, hungry", seconds=0.0)


def check_outputs(step: Step) -> None:
    """Open every artifact on the device, which checks its golden outputs, and compare it with the CPU.

    Raises:
        FailedError: One is refused, answers otherwise, or recognises another share of the digits than was published.
    """
    test = None
    failures = 0
    paths = sorted(step.models.glob("*/*/manifest.json"))
    for path in [*paths, *(step.made / name / "1" / "manifest.json" for name in step.medium)]:
        manifest, name = load_manifest(path.parent), path.parent.parent.name
        for backend in manifest.artifacts:
            if backend == "onnx-int8" or not _reaches(backend, step.device):
                continue
            row: dict[str, Any] = {"model": name, "backend": backend}
            try:
                predictor = load_predictor(path.parent, backend, step.device)
                row |= {"device": predictor.backend.device, "provider": predictor.backend.provider}
                if manifest.input.kind == "image" and path in paths:
                    test = test or _load_test_set(step)
                    row |= _compare(predictor, load_predictor(path.parent, backend, "cpu"), test[0])
                    row["hits"] = int((predictor.run(test[0]).argmax(1) == test[1]).sum())
                    _check_accuracy(row, manifest, len(test[1]))
                else:
                    inputs = build_inputs(name, 4) if name in MEDIUM else build_rows(manifest, 8)
                    row |= _compare(predictor, load_predictor(path.parent, backend, "cpu"), inputs)
            except (ServiceError, FailedError) as error:
                row["failed"] = str(error)
                failures += 1
            step.add(**row)
    if failures or not step.rows:
        raise FailedError(f"{failures} of {len(step.rows)} artifacts failed" if failures else "no backend reaches it")


def _reaches(backend: Any, device: str) -> bool:  # noqa: ANN401 - a BackendName
    return device == "cpu" or any(each.startswith(device) for each in list_accelerators(backend))


def _load_test_set(step: Step) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return MNIST's test images, float32 (10,000, 784) in [0, 1], and labels; the first 500 in a rehearsal."""
    from training.data import as_floats, load_digits  # noqa: PLC0415 - as above

    test = load_digits(step.data).test
    count = 500 if step.quick else len(test)
    return as_floats(test.inputs[:count]).numpy(), test.targets[:count].numpy()


def _compare(predictor: Predictor, reference: Predictor, inputs: np.ndarray[Any, Any]) -> dict[str, float]:
    """Return how far outputs are from the CPU's.

    Raises:
        FailedError: Further than the service allows between backends.
    """
    mine, theirs = predictor.run(inputs), reference.run(inputs)
    difference = float(np.abs(mine - theirs).max())
    if worst_excess(mine, theirs, 1e-4, 1e-3) > 0:
        raise FailedError(f"outputs differ from the CPU's by {difference:.2g}")
    return {"off by": difference}


def _check_accuracy(row: dict[str, Any], manifest: Manifest, count: int) -> None:
    published = manifest.metrics.get("accuracy")
    if published is not None and count >= WHOLE_TEST and abs(row["hits"] - published * count) > SLACK:
        raise FailedError(f"it recognises {row['hits']} of {count} digits; published: {published:.2%}")


def measure_sizes(step: Step) -> None:
    """Time calls of each size on the device and on the CPU, without HTTP."""
    names = ["mnist", "mnist-cnn", *step.medium]
    for device in dict.fromkeys((step.device, "cpu")):
        for name in names:
            path = (step.made / name / "1") if name in MEDIUM else load_model(step.models, name)[0]
            predictor = load_predictor(path, "auto", device, count_cores())
            predictor.measure_cost(SIZES[-1])  # warms up
            row: dict[str, Any] = {"model": name, "device": predictor.backend.device, "by": predictor.backend.name}
            for size in SIZES if device != "cpu" or name not in MEDIUM else SIZES[:4]:
                inputs = build_inputs(name, size) if name in MEDIUM else build_rows(predictor.manifest, size)
                seconds = _time(predictor, inputs, 0.05 if step.quick else 0.3)
                row |= {f"{size}: ms": seconds * 1e3, f"{size}: rows/s": size / seconds}
            step.add(**row)


def _time(predictor: Predictor, inputs: np.ndarray[Any, Any], seconds: float) -> float:
    """Return the median seconds of a call."""
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:  # noqa: PLR2004 - a median of something
        began = time.perf_counter()
        predictor.run(inputs)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def train_epoch(step: Step) -> None:
    """Train `mnist-cnn` for one epoch as its recipe says and in float32: seconds and accuracy of each.

    Raises:
        FailedError: The net has not learnt, or the recipe does not use mixed precision on a GPU.
    """
    import torch  # noqa: PLC0415 - as above

    from training.data import load_digits  # noqa: PLC0415
    from training.mnist import CNN, DEVIATION, MEAN_PIXEL  # noqa: PLC0415
    from training.nets import DigitsCnn  # noqa: PLC0415
    from training.trainer import Trainer  # noqa: PLC0415

    splits = load_digits(step.data)
    count, tests = (512, 100) if step.quick else (len(splits.train), len(splits.test))
    device = torch.device(step.device)
    train, test = (
        type(part)(part.inputs[:limit], part.targets[:limit]).to(device)
        for part, limit in ((splits.train, count), (splits.test, tests))
    )
    for is_mixed in (True, False):
        torch.manual_seed(0)
        net = DigitsCnn(MEAN_PIXEL, DEVIATION).to(memory_format=torch.channels_last)
        trainer = Trainer(net, "multiclass", replace(CNN, epochs=1, mixed_precision=is_mixed), train)
        began = time.perf_counter()
        trainer.fit("mnist-cnn")
        seconds = time.perf_counter() - began
        accuracy = trainer.validate(test).accuracy or 0.0
        used = "bfloat16" if is_mixed and device.type == "cuda" else "float32"
        step.add(precision=used, images=count, seconds=seconds, accuracy=accuracy)
        if not step.quick and accuracy < LEARNT:
            raise FailedError(f"one epoch in {used} gives an accuracy of {accuracy:.2%}")
        if device.type != "cuda":
            return
