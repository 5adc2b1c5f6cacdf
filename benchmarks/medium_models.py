"""The models of `--cases medium`, with random weights, made here and kept in a cache folder: nothing is downloaded.

ResNet-50 and MobileNetV3-small as torchvision builds them, and an encoder of BERT-base's size. torch makes them in a
process of its own: `python -m benchmarks.medium_models NAME FILE`.
"""

import io
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.model.manifest import (
    AnyManifest,
    Artifact,
    ImageInput,
    ImageSpec,
    Manifest,
    Output,
    TensorManifest,
    TensorSpec,
    digest,
)
from service.model.version_folder import MANIFEST_FILE

if TYPE_CHECKING:
    from torch import Tensor, nn

SIDE, LABELS = 224, 1000
WORDS, LENGTH, WIDTH = 30_000, 128, 768
PICTURE = (500, 375)  # pixels, the usual size in ImageNet
_EDITION = "1"  # of the cache; another one where the graphs change


@dataclass(frozen=True)
class MediumModel:
    """A model to make: its name, and whether it takes pictures (or the numbers of words)."""

    name: str
    title: str
    is_image: bool = True

    @property
    def datatype(self) -> str:
        """The datatype of its input in the words of the Open Inference Protocol."""
        return "FP32" if self.is_image else "INT64"

    def build_inputs(self, rows: int) -> NDArray[Any]:
        """Return random inputs: float32 (rows, 3, 224, 224) in [0, 1), or int64 (rows, 128) below 30,000."""
        random = np.random.default_rng(0)
        if self.is_image:
            return random.random((rows, 3, SIDE, SIDE), dtype=np.float32)
        return random.integers(WORDS, size=(rows, LENGTH))

    def describe(self, content: bytes) -> AnyManifest:
        """Return the manifest for the graph's bytes; golden samples of pictures would make it too large."""
        about: dict[str, Any] = {"name": self.name, "version": 1, "title": self.title}
        about["artifacts"] = {"onnx": Artifact(file="model.onnx", sha256=digest(content), bytes=len(content))}
        if self.is_image:
            image = ImageSpec(width=SIDE, height=SIDE, channels=3, polarity="as-is", fitting="stretch")
            return Manifest(
                task="multiclass",
                input=ImageInput(kind="image", shape=(3, SIDE, SIDE), image=image),
                output=Output(kind="logits", labels=tuple(f"label {number}" for number in range(LABELS))),
                **about,
            )
        ids = TensorSpec(name="inputs", datatype="INT64", shape=(-1, LENGTH))
        pooled = TensorSpec(name="outputs", datatype="FP32", shape=(-1, WIDTH))
        return TensorManifest(task="tensors", inputs=(ids,), outputs=(pooled,), **about)


MODELS = (
    MediumModel("resnet50", "ResNet-50"),
    MediumModel("mobilenet-v3-small", "MobileNetV3-small"),
    MediumModel("bert-base", "An encoder of BERT-base's size", is_image=False),
)


def open_cache() -> Path:
    """Return the folder in which models that were made are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "model-service-bench" / _EDITION


def open_folder(model: MediumModel) -> Path:
    """Return the model's folder in the cache, with version 1; it is made if need be, its manifest always.

    Raises:
        SystemExit: torch cannot make it here.
    """
    cache = open_cache()
    version = cache / model.name / "1"
    version.mkdir(parents=True, exist_ok=True)
    graph, making = version / "model.onnx", version / ".making"
    if not graph.exists():
        print(f"making {model.name} with random weights in {cache}", file=sys.stderr)
        command = [sys.executable, "-m", "benchmarks.medium_models", model.name, str(making)]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"{model.name} cannot be made here; pip install -e '.[train]'")
        making.rename(graph)
    manifest = model.describe(graph.read_bytes())
    (version / MANIFEST_FILE).write_text(manifest.model_dump_json(exclude_none=True))
    return version.parent


def build_jpeg() -> bytes:
    """Return a JPEG file with the size and the detail of a photo."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(PICTURE)
    noise = random.normal(0, 12, (PICTURE[1], PICTURE[0], 3))
    pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def build_net(name: str) -> "nn.Module":
    """Return a model's net in evaluation mode, with random weights of seed 0."""
    import torch  # noqa: PLC0415 - only the process that makes a model needs it
    from torch import nn  # noqa: PLC0415
    from torchvision import models  # noqa: PLC0415

    class Encoder(nn.Module):
        """12 layers of 12 heads, and the mean over the words."""

        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(WORDS, WIDTH)
            self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) / 50)
            layer = nn.TransformerEncoderLayer(WIDTH, 12, 4 * WIDTH, activation="gelu", batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)

        def forward(self, ids: "Tensor") -> "Tensor":
            """Map int64 (N, 128) to float32 (N, 768)."""
            encoded: Tensor = self.layers(self.words(ids) + self.places)
            return encoded.mean(1)

    torch.manual_seed(0)
    if name == "bert-base":
        return Encoder().eval()
    net: nn.Module = models.get_model(name.replace("-", "_"))
    with torch.no_grad():  # statistics for the batch normalisation, or the outputs of some nets vanish
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None
        net.train()(torch.rand(16, 3, SIDE, SIDE))
    return net.eval()


def make(name: str, path: Path) -> None:
    """Write a model's ONNX graph: one file, any number of rows, input "inputs" and output "outputs"."""
    import torch  # noqa: PLC0415

    torch.backends.mha.set_fastpath_enabled(False)  # its fused layers have no ONNX
    model = next(each for each in MODELS if each.name == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(
            build_net(name),
            (torch.from_numpy(model.build_inputs(2)),),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["inputs"],
            output_names=["outputs"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    path.write_bytes(program.model_proto.SerializeToString())


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
