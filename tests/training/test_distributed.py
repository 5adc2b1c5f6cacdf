"""Several processes train the same net as one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tests.servers import clean_environment
from training import distributed
from training.__main__ import main
from training.data import IndexBatches, Split
from training.errors import DeviceError
from training.progress import Epoch

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m training` on two ranks."""
    return subprocess.run(
        [*TORCHRUN, "-m", "training", *arguments],
        env=clean_environment({"CUDA_VISIBLE_DEVICES": ""}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def read_weights(models: Path) -> dict[str, np.ndarray]:
    """Return the weights of a published graph."""
    graph = onnx.load(str(models / "mnist" / "1" / "model.onnx")).graph
    return {each.name: numpy_helper.to_array(each) for each in graph.initializer}


def test_two_processes_train_what_one_does(mnist_dir: Path, tmp_path: Path) -> None:
    """Two ranks publish one version, reported once, whose weights are those of one process up to rounding."""
    shared = ("mnist", "--epochs", "1", "--device", "cpu", "--data-dir", str(mnist_dir))
    assert main([*shared, "--models-dir", str(tmp_path / "one")]) == 0
    done = launch(*shared, "--models-dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("published") == 1
    assert done.stderr.count("epoch 1/1") + done.stdout.count("epoch 1/1") == 1
    assert [path.name for path in (tmp_path / "two" / "mnist").iterdir()] == ["1"]
    one, two = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-4)


def test_recipe_for_one_process_is_refused(tmp_path: Path) -> None:
    """A recipe whose random numbers ranks would not share fails with one line on each rank."""
    done = launch("linear", "--models-dir", str(tmp_path))
    assert done.returncode != 0
    assert "error: linear cannot be trained by several processes, only mnist can" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_failure_of_one_is_one_line_of_each(mnist_dir: Path, tmp_path: Path) -> None:
    """The first process says why it failed; the others, which wait for it, end with one line too."""
    (tmp_path / "mnist" / "1").mkdir(parents=True)
    done = launch("mnist", "--version", "1", "--data-dir", str(mnist_dir), "--models-dir", str(tmp_path))
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert any("versions are never overwritten" in line for line in ours)
    assert any("another process failed" in line for line in ours)
    assert "training/run.py" not in done.stderr  # no traceback of ours; torchrun adds its own


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_processes_that_cannot_join_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, or no variables of torchrun: one sentence."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": None, "MASTER_ADDR": None}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)

    def refuse(*_: object) -> None:
        raise RuntimeError("Found no NVIDIA driver\nand more")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(DeviceError, match="cannot join") as refused, distributed.launched(["mnist"], device):
        pass
    assert "\n" not in str(refused.value)


def test_one_process_is_unaffected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun nothing is shared, averaged or waited for."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.launched(["linear"], "cuda:3") as device:
        assert device == "cuda:3"
        assert distributed.is_first()
        batch, net = torch.arange(5), nn.Linear(2, 1)
        assert distributed.share(batch) is batch
        distributed.average_gradients(net, 5)
        epoch = Epoch(1.0, 0.5)
        assert distributed.average_epoch(epoch, 5) is epoch
        assert distributed.first_alone(lambda: 7) == 7


def test_device_of_one_is_refused_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks cannot all train on cuda:0."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match="cuda:0"), distributed.launched(["mnist"], "cuda:0"):
        pass


@pytest.mark.parametrize(("count", "sizes"), [(7, (4, 3)), (2, (1, 1)), (1, (1, 1))])
def test_shares_are_the_batch(count: int, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instance goes to one rank; a batch too small to share goes to all."""
    shares = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        split = Split(torch.arange(count).float().reshape(-1, 1), torch.arange(count))
        ((_, targets),) = IndexBatches(split, 8, torch.Generator().manual_seed(0))
        shares.append(targets.tolist())
    assert tuple(map(len, shares)) == sizes
    assert sorted({target for each in shares for target in each}) == list(range(count))
