"""The image, and the files that describe what is run."""

from itertools import chain, combinations

import pytest

from tests.compose import engine
from tests.compose.engine import docker, inspect
from tests.servers import ROOT

MOST_ADDED = 260e6  # bytes over the base
PROFILES = ("train", "monitoring", "proxy")
GPU = ("-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml")


def run(image: str, program: str) -> str:
    """Run a Python program in a container of the image."""
    return docker("run", "--rm", "--network=none", "--entrypoint=python", image, "-c", program).strip()


def test_image_is_small(image: str) -> None:
    """It adds little to its base; the figure is printed."""
    added = inspect(image)["Size"] - inspect(engine.BASE)["Size"]
    print(f"the image for CPUs adds {added / 1e6:.0f} MB to its base")
    assert added <= MOST_ADDED


def test_image_says_what_it_is(image: str) -> None:
    """A numeric user that is not root, labels, a health check, a program that gets signals itself."""
    config = inspect(image)["Config"]
    assert config["User"] == "10001:10001"
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    assert labels.keys() >= {"title", "description", "licenses", "version", "revision"}
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["Entrypoint"] == ["python", "-m", "service"]


def test_image_has_nothing_to_build_with(image: str) -> None:
    """No compiler, no pip beside the packages, no cache, and nothing that its user can change."""
    program = (
        "import importlib.util, os, shutil\n"
        "print([name for name in ('cc', 'gcc', 'g++', 'make', 'git') if shutil.which(name)])\n"
        "print([name for name in ('pip', 'torch', 'training') if importlib.util.find_spec(name)])\n"
        "walk = [os.path.join(folder, file) for root in ('/app', '/opt/venv')\n"
        "        for folder, _, files in os.walk(root) for file in files]\n"
        "print(len(walk) > 1000, [path for path in walk if os.access(path, os.W_OK)][:3])\n"
        "print(os.path.exists('/root/.cache'), os.getuid())\n"
    )
    assert run(image, program).splitlines() == ["[]", "[]", "True []", "False 10001"]


def test_lock_is_what_is_installed(image: str) -> None:
    """Every package of the image is in the lock file, at that version."""
    program = (
        "from importlib.metadata import distributions\n"
        "for found in distributions(): print(found.name.lower().replace('_', '-') + '==' + found.version)"
    )
    locked = {line.split(" ")[0] for line in (ROOT / "deploy/requirements.lock").read_text().splitlines()}
    installed = {name for name in run(image, program).splitlines() if not name.startswith(("pip==", "setuptools=="))}
    assert installed
    assert installed <= locked


@pytest.mark.parametrize("files", [(), GPU], ids=["cpu", "gpu"])
def test_every_combination_of_profiles_is_valid(files: tuple[str, ...]) -> None:
    """`docker compose config` has nothing to say to any of them, with and without the GPU's file."""
    for chosen in chain.from_iterable(combinations(PROFILES, count) for count in range(len(PROFILES) + 1)):
        flags = [part for profile in chosen for part in ("--profile", profile)]
        assert docker("compose", *files, *flags, "config", "--quiet") == ""


def test_gpu_is_an_override() -> None:
    """It picks the target, reserves the GPU and refuses to fall back."""
    text = docker("compose", "--env-file", "/dev/null", *GPU, "config")
    for line in ("target: gpu", "driver: nvidia", "SERVICE_DEVICE: cuda"):
        assert line in text
