"""A classifier of the user's own pictures, a folder for each class."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from service.model.version_folder import load_manifest
from tests.servers import Server
from training.__main__ import main
from training.errors import DataError
from training.images import Jitter, SmallCnn, list_warnings, load_pictures
from training.nets import fold_norms


def draw(path: Path, kind: str, number: int, colour: bool = True) -> None:
    """Write a picture with stripes across or down, of its own size, brightness and noise."""
    random = np.random.default_rng([number, kind == "across"])
    height, width = random.integers(20, 60, 2)
    waves = np.sin(np.arange(height if kind == "across" else width) * random.uniform(0.6, 0.9) + random.uniform(0, 6))
    plane = np.broadcast_to(waves[:, None] if kind == "across" else waves, (height, width))
    pixels = 120 + random.uniform(40, 80) * plane + random.normal(0, 10, (height, width))
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture.convert("RGB") if colour and number % 2 else picture).save(path)


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures of each of two kinds."""
    root = tmp_path_factory.mktemp("images") / "stripes"
    for kind in ("across", "down"):
        for number in range(60):
            draw(root / kind / f"{number}.{'jpg' if number % 3 else 'png'}", kind, number)
    return root


def test_pictures_are_trained_on_and_served(stripes: Path, tmp_path: Path) -> None:
    """From a folder to a served model that tells new pictures apart, sent as files."""
    models = tmp_path / "models"
    told = ["images", str(stripes), "--size", "24", "--epochs", "10", "--models-dir", str(models)]
    assert main(told) == 0
    folder = models / "stripes" / "1"
    manifest = load_manifest(folder)
    assert manifest.output.labels == ("across", "down")
    assert manifest.metrics["accuracy"] > 0.9
    assert "- too few pictures" not in (folder / "README.md").read_text()
    assert (folder / "pictures.png").is_file()
    with Server(models, "--workers", "1") as server:
        for kind in ("across", "down"):
            draw(tmp_path / f"{kind}.png", kind, 1000)
            content = (tmp_path / f"{kind}.png").read_bytes()
            answer = server.post(
                "/v1/models/stripes:predict", data=content, headers={"Content-Type": "image/png"}
            ).json()
            assert answer["predictions"][0]["label"] == kind


def test_copies_stay_in_one_split(tmp_path: Path) -> None:
    """A file that is there twice is not trained on and tested."""
    for kind in ("across", "down"):
        for number in range(20):
            draw(tmp_path / kind / f"{number}.png", kind, number, colour=False)
            (tmp_path / kind / f"copy{number}.png").write_bytes((tmp_path / kind / f"{number}.png").read_bytes())
    pictures = load_pictures(tmp_path, 16)
    assert pictures.spec.shape == (1, 16, 16)
    splits = pictures.splits
    assert splits.validation is not None
    seen = [{row.tobytes() for row in each.inputs.numpy()} for each in (splits.train, splits.validation, splits.test)]
    assert not seen[0] & seen[2]
    assert not seen[0] & seen[1]


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    """One class is none, and a file that is no picture is named."""
    draw(tmp_path / "across" / "1.png", "across", 1)
    with pytest.raises(DataError, match="has pictures in 1 folders; give one folder for each"):
        load_pictures(tmp_path, 16)
    (tmp_path / "down").mkdir()
    (tmp_path / "down" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png is not a PNG"):
        load_pictures(tmp_path, 16)


def test_jitter_changes_pictures_in_training_only() -> None:
    """In evaluation, and so in the exported graph, nothing moves."""
    images = torch.rand(4, 3, 16, 16)
    jitter = Jitter(mirror=True)
    assert not torch.equal(jitter(images), images)
    assert torch.equal(jitter.eval()(images), images)


def test_norms_are_folded() -> None:
    """The net without batch norms gives the same logits."""
    net = SmallCnn(3, 5, mirror=False).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(net(images), fold_norms(net)(images), atol=1e-4)


def test_warnings_name_the_class() -> None:
    """Few pictures, and few beside the others, are said."""
    assert list_warnings({"cat": 100, "dog": 100}) == []
    assert [each.split(":")[0] for each in list_warnings({"cat": 400, "dog": 40})] == [
        "too few pictures",
        "class imbalance",
    ]
