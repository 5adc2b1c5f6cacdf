"""Disks that are full, slow or fail, and models folders that are replaced, unmounted or half copied."""

import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from tests import fakes
from tests.chaos.rig import Rig, Row, find_program, mounted

FAULT_SECONDS = 3.0
CALLS = "openat,newfstatat,getdents64,statx"


def full(folder: Path) -> Iterator[Row]:
    """Fill the disk of the runtime folder, and that of the log; kill a worker and publish a version meanwhile."""
    with mounted(folder / "run") as run:
        place = {"XDG_RUNTIME_DIR": str(run), "TMPDIR": str(run), "XDG_SESSION_ID": "1"}
        with Rig(folder, environment=place) as rig:
            yield rig.suffer("full disk: runtime folder", partial(_live_on, rig, run, 2), lambda: rig.serves(2))
    shutil.rmtree(folder / "models")
    with mounted(folder / "log") as log:
        before, tempfile.tempdir = tempfile.tempdir, str(log)
        try:
            rig = Rig(folder)
        finally:
            tempfile.tempdir = before
        with rig:
            yield rig.suffer("full disk: log", partial(_live_on, rig, log, 2), lambda: rig.serves(2))


def _live_on(rig: Rig, disk: Path, version: int) -> None:
    with suppress(OSError), (disk / "large").open("ab", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    rig.find("worker-0").kill()
    rig.find("engine-cpu").kill()
    rig.publish(version)


def slow(folder: Path) -> Iterator[Row]:
    """Let the models' disk be slow, fail, and be stale as NFS may be, by injection into each process's system calls."""
    strace = find_program("strace", "strace")
    with Rig(folder) as rig:
        for version, (title, what) in enumerate(
            (("slow disk: 0.2 s a call", "delay_enter=200000"), ("failing disk: EIO", "error=EIO"),
             ("stale NFS: ESTALE", "error=ESTALE")), 2,
        ):  # fmt: skip
            act = partial(_inject, strace, rig, what, version)
            yield rig.suffer(title, act, lambda version=version: rig.serves(version))  # type: ignore[misc]


def _inject(strace: str, rig: Rig, what: str, version: int) -> None:
    """Have calls on the models' files fail or wait for a while, in which a version is published."""
    paths = [rig.root, *rig.root.rglob("*"), rig.root / "doubler" / str(version)]
    pids = [argument for each in rig.server.members() for argument in ("-p", str(each.pid))]
    given = [argument for path in paths for argument in ("-P", str(path))]
    command = [strace, "-f", "-qq", "-o", "/dev/null", "-e", f"trace={CALLS}", "-e", f"inject={CALLS}:{what}"]
    tracer = subprocess.Popen([*command, *given, *pids], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(FAULT_SECONDS / 2)
        rig.publish(version)
        time.sleep(FAULT_SECONDS / 2)
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait()


def clock(folder: Path) -> Iterator[Row]:
    """Set the clock forward and back by an hour, and publish a version and kill a worker each time."""
    library, setting = folder / "clock.so", folder / "clock"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([find_program("cc", "gcc"), "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    setting.write_bytes(struct.pack("=q", 0))
    environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(setting)}
    with Rig(folder, environment=environment) as rig:
        for version, (title, offset) in enumerate((("forward", 3600), ("back", -3600)), 2):

            def act(version: int = version, offset: int = offset) -> None:
                with setting.open("r+b") as file:
                    file.write(struct.pack("=q", offset))
                rig.publish(version)
                rig.find("worker-0").kill()

            yield rig.suffer(f"clock {title} an hour", act, lambda version=version: rig.serves(version))  # type: ignore[misc]


def models(folder: Path) -> Iterator[Row]:
    """Replace the models folder, unmount it, and copy versions into it slowly."""
    disk = folder / "disk"
    with Rig(disk):
        pass  # only for its models
    with mounted(folder / "models", "--bind", str(disk / "models")), Rig(folder) as rig:
        yield rig.suffer("models folder unmounted for a while", partial(_unmount, rig, disk / "models"))
        rig.publish(2)
        yield rig.suffer("version published after that", lambda: None, lambda: rig.serves(2))
    with Rig(disk) as rig:
        yield rig.suffer("models folder renamed away, another put there", partial(_replace, rig), lambda: rig.serves(3))
        for version, is_first in ((4, True), (5, False)):
            title = f"version copied slowly, manifest {'first' if is_first else 'last'}"
            act = partial(_copy_slowly, rig, version, is_first)
            yield rig.suffer(title, act, lambda version=version: rig.serves(version))  # type: ignore[misc]


def _unmount(rig: Rig, source: Path) -> None:
    subprocess.run(["umount", "-l", str(rig.root)], check=True)
    time.sleep(FAULT_SECONDS)
    assert rig.is_well(), "what was served is not served any more"
    subprocess.run(["mount", "--bind", str(source), str(rig.root)], check=True)


def _replace(rig: Rig) -> None:
    rig.root.rename(rig.root.with_name("before"))
    time.sleep(1.0)
    assert rig.is_well(), "what was served is not served any more"
    shutil.copytree(rig.root.with_name("before"), rig.root.with_name("after"))
    rig.root.with_name("after").rename(rig.root)
    rig.publish(3)


def _copy_slowly(rig: Rig, version: int, is_manifest_first: bool) -> None:
    """Copy a version a file at a time, each in pieces."""
    with _written_elsewhere(
        lambda root: fakes.write_version(root, fakes.doubler(version=version).only("onnx"))
    ) as source:
        target = rig.root / "doubler" / str(version)
        target.mkdir()
        for path in sorted(source.iterdir(), key=lambda each: (each.suffix == ".json") != is_manifest_first):
            content = path.read_bytes()
            with (target / path.name).open("wb", buffering=0) as file:
                for start in range(0, len(content), len(content) // 4 + 1):
                    file.write(content[start : start + len(content) // 4 + 1])
                    time.sleep(0.3)


@contextmanager
def _written_elsewhere(write: Callable[[Path], Path]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as root:
        yield write(Path(root))
