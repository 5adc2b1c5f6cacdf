"""Write digits as the files that torchvision's MNIST reads, so that tests need no download."""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049  # http://yann.lecun.com/exdb/mnist, "THE IDX FILE FORMAT"


def write_mnist(root: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8], test_count: int) -> None:
    """Write `<root>/MNIST/raw/*-ubyte`, the last `test_count` instances as the test set.

    Args:
        root: what `--data-dir` will name.
        images: uint8 (N, 28, 28).
        labels: uint8 (N,), 0 to 9.
        test_count: instances held out.
    """
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, chosen in (("train", slice(None, -test_count)), ("t10k", slice(-test_count, None))):
        write_idx(raw / f"{part}-images-idx3-ubyte", IMAGES_MAGIC, images[chosen])
        write_idx(raw / f"{part}-labels-idx1-ubyte", LABELS_MAGIC, labels[chosen])


def write_idx(path: Path, magic: int, array: NDArray[np.uint8]) -> None:
    """Write one idx file: magic, sizes as big-endian 32-bit numbers, then the bytes."""
    header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
    path.write_bytes(header + np.ascontiguousarray(array).tobytes())
