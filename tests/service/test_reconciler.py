"""Tests of service.registry.reconciler: folder, coordination and registry together, without a server."""

import asyncio
import contextlib
import errno
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from service.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelRefusedError,
    NotFoundError,
    UnavailableError,
)
from service.registry import loading
from service.registry import reconciler as reconciler_module
from service.registry.coordination import Coordination, GroupMember, SingleProcess, WorkerGroup, WorkerStatus
from service.registry.loading import Change
from service.registry.model_folder import SETTINGS_FILE, VersionFolder
from service.registry.reconciler import Reconciler
from service.registry.registry import Registry
from service.registry.versions import LoadedVersion
from service.settings import Settings
from tests import fakes

Talk = Callable[[Reconciler], Coroutine[Any, Any, None]]


@pytest.fixture
def group() -> WorkerGroup:
    """A group of three workers; here they are all in one process."""
    return WorkerGroup(3)


def build(root: Path, coordination: Coordination | None = None, interval: float = 0) -> Reconciler:
    """Return a reconciler of the models in a folder."""
    settings = Settings(models_dir=root, device="cpu", backend="onnx", reload_interval=interval)
    coordination = coordination or SingleProcess()
    registry = Registry(settings)
    registry.load(coordination.read_state().unloaded)
    return Reconciler(registry, settings, coordination)


def run_all(*reconcilers: Reconciler, talk: Talk) -> None:
    """Run reconcilers while talking to the first."""

    async def run() -> None:
        tasks = [asyncio.create_task(each.run()) for each in reconcilers]
        try:
            async with asyncio.timeout(20):
                await talk(reconcilers[0])
        finally:
            for task in tasks:
                task.cancel()

    asyncio.run(run())


def versions(reconciler: Reconciler, name: str = "doubler") -> list[int]:
    """Return the versions of a model that a reconciler's registry serves."""
    model = reconciler.registry.models.get(name)
    return sorted(model.versions) if model else []


def test_load_and_unload(empty_dir: Path) -> None:
    """What is unloaded is not served until it is loaded again; what appears in the folder is served by a load."""
    fakes.write_version(empty_dir, fakes.doubler())
    reconciler = build(empty_dir)

    async def talk(reconciler: Reconciler) -> None:
        await reconciler.unload("doubler")
        assert versions(reconciler) == []
        assert [(each.name, each.version) for each in reconciler.list_unloaded()] == [("doubler", 1)]
        fakes.write_version(empty_dir, fakes.doubler(version=2))
        await reconciler.load("doubler")
        assert versions(reconciler) == [1, 2]
        assert reconciler.list_unloaded() == []
        with pytest.raises(NotFoundError, match="Request for unknown model"):
            await reconciler.load("nosuch")
        with pytest.raises(NotFoundError, match="Request for unknown model"):
            await reconciler.unload("nosuch")

    run_all(reconciler, talk=talk)


def test_load_of_a_broken_model_says_why(empty_dir: Path) -> None:
    """A load that serves nothing is the caller's to know, with the reason."""
    fakes.write_version(empty_dir, fakes.doubler())
    reconciler = build(empty_dir)

    async def talk(reconciler: Reconciler) -> None:
        fakes.write_version(empty_dir, fakes.liar())
        with pytest.raises(InvalidRequestError, match="failed to load 'liar': its onnx graph"):
            await reconciler.load("liar")
        assert versions(reconciler) == [1]

    run_all(reconciler, talk=talk)


def test_roll_back(empty_dir: Path) -> None:
    """Rolling back pins the version before the latest, or the one asked for, and goes on from there."""
    for version in (1, 2, 3):
        fakes.write_version(empty_dir, fakes.doubler(version=version))
    reconciler = build(empty_dir)

    async def talk(reconciler: Reconciler) -> None:
        asked: object
        for asked, latest in ((None, 2), (None, 1), ("3", 3), (2, 2)):
            await reconciler.roll_back("doubler", asked)
            assert reconciler.registry.get("doubler").manifest.version == latest
        await reconciler.roll_back("doubler", 1)
        with pytest.raises(InvalidRequestError, match="has no served version before 1"):
            await reconciler.roll_back("doubler")
        unknown: object
        for unknown in (9, {}, True):
            with pytest.raises(NotFoundError):
                await reconciler.roll_back("doubler", unknown)
        assert versions(reconciler) == [1, 2, 3]
        (empty_dir / "doubler" / SETTINGS_FILE).write_text("{")
        with pytest.raises(InvalidRequestError, match="cannot be rolled back: settings"):
            await reconciler.roll_back("doubler", 2)

    run_all(reconciler, talk=talk)


def test_change_waits_for_every_worker(empty_dir: Path, group: WorkerGroup) -> None:
    """A change returns when all workers follow it, and says so if one does not."""
    fakes.write_version(empty_dir, fakes.doubler())
    one, other = build(empty_dir, group.join(0)), build(empty_dir, group.join(1))

    async def talk(reconciler: Reconciler) -> None:
        await reconciler.unload("doubler")
        assert versions(one) == versions(other) == []
        group.join(2).report(WorkerStatus())  # a living process that never follows
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reconciler_module, "CHANGE_SECONDS", 0.3)
            with pytest.raises(DeadlineExceededError, match="not every worker applied the change within"):
                await reconciler.load("doubler")

    run_all(one, other, talk=talk)


def test_waiting_worker_rereads_nothing(empty_dir: Path, group: WorkerGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """While others are waited for, their status is read after a notification, and once a second besides."""
    fakes.write_version(empty_dir, fakes.doubler())
    reconciler = build(empty_dir, group.join(0))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        silent = group.join(1)
        silent._pid = other.pid
        silent.report(WorkerStatus())  # it never follows
        reads = 0
        real = GroupMember.read_statuses

        def count(coordination: GroupMember) -> Iterable[WorkerStatus]:
            nonlocal reads
            reads += 1
            return real(coordination)

        monkeypatch.setattr(GroupMember, "read_statuses", count)

        async def talk(reconciler: Reconciler) -> None:
            unloading = asyncio.create_task(reconciler.unload("doubler"))
            await asyncio.sleep(0.5)
            assert 0 < reads < 10
            assert versions(reconciler) == [1]
            other.communicate(b"\n")  # a worker that dies notifies nobody
            async with asyncio.timeout(5):
                await unloading
            assert versions(reconciler) == []

        run_all(reconciler, talk=talk)


def test_workers_swap_at_one_moment(empty_dir: Path, group: WorkerGroup) -> None:
    """A worker that could serve a new version goes on with the old one until the others can, too."""
    fakes.write_version(empty_dir, fakes.doubler())
    quick, slow = build(empty_dir, group.join(0), interval=0.02), build(empty_dir, group.join(1), interval=0.02)
    may_go_on = threading.Event()
    prepare = slow.registry.prepare

    def prepare_slowly(*arguments: Any) -> Change:
        may_go_on.wait()
        return prepare(*arguments)

    slow.registry.prepare = prepare_slowly  # type: ignore[method-assign,assignment]
    observer = group.join(2)

    async def talk(_: Reconciler) -> None:
        fakes.write_version(empty_dir, fakes.doubler(version=2))
        while not observer.read_state().generation:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        assert (versions(quick), versions(slow)) == ([1], [1])
        may_go_on.set()
        while versions(quick) != [1, 2] or versions(slow) != [1, 2]:
            await asyncio.sleep(0)

    try:
        run_all(quick, slow, talk=talk)
    finally:
        may_go_on.set()


def test_version_that_one_worker_refuses_serves_nowhere(empty_dir: Path, group: WorkerGroup) -> None:
    """What fails its checks in one worker is refused in all; a load tries it again though its files are the same."""
    fakes.write_version(empty_dir, fakes.doubler())
    good, bad = build(empty_dir, group.join(0)), build(empty_dir, group.join(1))
    opens = bad.registry.loader.open_version

    def refuse(folder: VersionFolder, *more: Any) -> LoadedVersion:
        raise ModelRefusedError("out of memory")

    async def talk(reconciler: Reconciler) -> None:
        bad.registry.loader.open_version = refuse  # type: ignore[method-assign,assignment]
        fakes.write_version(empty_dir, fakes.doubler(version=2))
        await reconciler.load("doubler")
        for each in (good, bad):
            assert versions(each) == [1]
            assert each.registry.models["doubler"].refused == {"2": "out of memory"}
        bad.registry.loader.open_version = opens  # type: ignore[method-assign]
        await reconciler.load("doubler")
        for each in (good, bad):
            assert versions(each) == [1, 2]
            assert each.registry.models["doubler"].refused == {}

    run_all(good, bad, talk=talk)


def test_version_pending_in_one_worker_is_tried_again(empty_dir: Path, group: WorkerGroup) -> None:
    """What is only half there for one worker waits in all of them, and serves in all once it is whole."""
    fakes.write_version(empty_dir, fakes.doubler())
    early, late = build(empty_dir, group.join(0), interval=0.02), build(empty_dir, group.join(1), interval=0.02)
    opens = early.registry.loader.open_version

    def fail_once(folder: VersionFolder, *more: Any) -> LoadedVersion:
        early.registry.loader.open_version = opens  # type: ignore[method-assign]
        (empty_dir / "doubler" / "2" / "note.txt").write_text("still being copied")
        raise ModelRefusedError("half there")

    async def talk(_: Reconciler) -> None:
        early.registry.loader.open_version = fail_once  # type: ignore[method-assign,assignment]
        fakes.write_version(empty_dir, fakes.doubler(version=2))
        while versions(early) != [1, 2] or versions(late) != [1, 2]:
            assert not early.registry.models["doubler"].refused
            await asyncio.sleep(0.01)

    run_all(early, late, talk=talk)


def test_version_that_appears_between_two_scans_is_served_everywhere(empty_dir: Path, group: WorkerGroup) -> None:
    """What is published after one worker has scanned the folder and before another has is served by both."""
    fakes.write_version(empty_dir, fakes.doubler())
    leader, other = build(empty_dir, group.join(0), interval=0.02), build(empty_dir, group.join(1), interval=0.02)
    prepare, prepare_other = leader.registry.prepare, other.registry.prepare
    other_is_prepared = threading.Event()

    def prepare_first(*arguments: Any) -> Change:
        change = prepare_other(*arguments)
        other_is_prepared.set()
        return change

    def prepare_second(*arguments: Any) -> Change:
        leader.registry.prepare = prepare  # type: ignore[method-assign]
        assert other_is_prepared.wait(10)
        fakes.write_version(empty_dir, fakes.doubler(version=3))
        return prepare(*arguments)

    leader.registry.prepare = prepare_second  # type: ignore[method-assign,assignment]
    other.registry.prepare = prepare_first  # type: ignore[method-assign,assignment]

    async def talk(_: Reconciler) -> None:
        fakes.write_version(empty_dir, fakes.doubler(version=2))
        async with asyncio.timeout(5):
            while versions(leader) != [1, 2, 3] or versions(other) != [1, 2, 3]:
                await asyncio.sleep(0.01)

    run_all(leader, other, talk=talk)


def test_change_while_preparing_is_not_skipped(empty_dir: Path, group: WorkerGroup) -> None:
    """A worker that finds a new version while another is told to unload a model does both."""
    fakes.write_version(empty_dir, fakes.doubler())
    fakes.write_version(empty_dir, fakes.coin())
    reconciler = build(empty_dir, group.join(0), interval=0.02)
    prepare = reconciler.registry.prepare

    def prepare_and_meet(*arguments: Any) -> Change:
        reconciler.registry.prepare = prepare  # type: ignore[method-assign]
        change = prepare(*arguments)
        group.join(1).change(lambda unloaded: unloaded | {"coin"})
        return change

    reconciler.registry.prepare = prepare_and_meet  # type: ignore[method-assign,assignment]

    async def talk(reconciler: Reconciler) -> None:
        fakes.write_version(empty_dir, fakes.doubler(version=2))
        while not (group.join(1).read_state().generation == 2 and group.join(1).is_committed(2)):
            await asyncio.sleep(0.01)
        assert versions(reconciler) == [1, 2]
        assert versions(reconciler, "coin") == []

    run_all(reconciler, talk=talk)


def test_change_while_starting_is_not_missed(empty_dir: Path, group: WorkerGroup) -> None:
    """A worker that has loaded a model which was unloaded meanwhile unloads it before the change counts as reached."""
    fakes.write_version(empty_dir, fakes.doubler())
    coordination = group.join(0)
    coordination.report(WorkerStatus())
    settings = Settings(models_dir=empty_dir, device="cpu", reload_interval=0)
    registry = Registry(settings)
    registry.load(coordination.read_state().unloaded)
    generation = coordination.change(lambda unloaded: unloaded | {"doubler"})
    reconciler = Reconciler(registry, settings, coordination)
    assert not coordination.is_prepared(generation)

    async def talk(reconciler: Reconciler) -> None:
        while not coordination.is_committed(generation):
            await asyncio.sleep(0.01)
        assert versions(reconciler) == []

    run_all(reconciler, talk=talk)


def test_half_a_copy_is_nothing_yet(empty_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While files of a new model are still coming it is not there at all; if they stop half-way, it is refused."""
    fakes.write_version(empty_dir, fakes.doubler())
    reconciler = build(empty_dir)
    registry = reconciler.registry
    whole = fakes.write_version(empty_dir.parent / "elsewhere", fakes.coin())
    folder = empty_dir / "coin" / "1"
    folder.mkdir(parents=True)
    shutil.copy(whole / "manifest.json", folder)
    content = (whole / "model.onnx").read_bytes()
    for size in (0, 10, len(content) - 1):
        (folder / "model.onnx").write_bytes(content[:size])
        registry.commit(registry.prepare(debounce=True))
        assert sorted(registry.models) == ["doubler"]
        assert registry.problem == ""
    assert not caplog.records
    registry.commit(registry.prepare(debounce=True))
    assert registry.problem.startswith("coin: model.onnx has ")
    (folder / "model.onnx").write_bytes(content)
    shutil.copy(whole / "model.pt", folder)
    registry.commit(registry.prepare(debounce=True))
    assert registry.problem == ""
    assert versions(reconciler, "coin") == [1]


def test_single_version_whose_manifest_breaks_goes_on(empty_dir: Path) -> None:
    """Where the folder is one version's own, a manifest that cannot be read any more takes nothing away."""
    folder = fakes.write_version(empty_dir, fakes.doubler(version=3))
    reconciler = build(folder)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text("{")
    reconciler.registry.commit(reconciler.registry.prepare())
    assert versions(reconciler) == [3]
    assert "manifest" in reconciler.registry.models["doubler"].refused["3"]
    (folder / "manifest.json").write_text(manifest)
    reconciler.registry.commit(reconciler.registry.prepare())
    assert (versions(reconciler), reconciler.registry.models["doubler"].refused) == ([3], {})


def test_worker_that_could_not_prepare_tries_again(empty_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A change that a worker failed to follow is tried until it succeeds; the same trouble is logged once."""
    fakes.write_version(empty_dir, fakes.doubler())
    reconciler = build(empty_dir, interval=0.02)
    prepare = reconciler.registry.prepare
    tries = 0

    def fail_often(*arguments: Any) -> Change:
        nonlocal tries
        tries += 1
        if tries <= 3:
            raise RuntimeError("out of threads")
        return prepare(*arguments)

    reconciler.registry.prepare = fail_often  # type: ignore[method-assign,assignment]

    async def talk(_: Reconciler) -> None:
        fakes.write_version(empty_dir, fakes.doubler(version=2))
        while versions(reconciler) != [1, 2]:
            await asyncio.sleep(0.01)

    run_all(reconciler, talk=talk)
    assert len([each for each in caplog.records if "cannot be reloaded" in each.getMessage()]) == 1


def test_worker_that_cannot_listen_tries_again(
    empty_dir: Path, group: WorkerGroup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that cannot watch its pipe says so, and follows changes once it can."""
    fakes.write_version(empty_dir, fakes.doubler())
    coordination = group.join(0)
    reconciler = build(empty_dir, coordination)
    failures = iter([OSError("too many open files")])
    real = coordination.listen

    def listen_at_last(*arguments: Any) -> contextlib.AbstractContextManager[None]:
        for failure in failures:
            raise failure
        return real(*arguments)

    monkeypatch.setattr(coordination, "listen", listen_at_last)
    monkeypatch.setattr(reconciler_module, "RETRY_SECONDS", 0.01)

    async def talk(reconciler: Reconciler) -> None:
        await reconciler.unload("doubler")
        assert versions(reconciler) == []

    run_all(reconciler, talk=talk)
    assert [each.getMessage() for each in caplog.records] == ["cannot listen to the other workers; retrying"]


def test_folder_that_vanishes_takes_nothing_away(empty_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A models folder that is gone for a while, as a network mount may be, leaves what is served as it is."""
    fakes.write_version(empty_dir, fakes.doubler())
    reconciler = build(empty_dir, interval=0.02)
    gone = empty_dir.with_name("away")

    async def talk(reconciler: Reconciler) -> None:
        empty_dir.rename(gone)
        await asyncio.sleep(0.3)
        assert versions(reconciler) == [1]
        assert [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()] != []
        assert len(caplog.records) == 1
        shutil.rmtree(gone / "doubler")
        gone.rename(empty_dir)
        while versions(reconciler):
            await asyncio.sleep(0.01)

    run_all(reconciler, talk=talk)


def test_unmounted_folder_takes_nothing_away(empty_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The empty folder that an unmount leaves in its place is no reason to stop; an emptied one, the same, is."""
    fakes.write_version(empty_dir, fakes.doubler())
    reconciler = build(empty_dir, interval=0.02)
    disk = empty_dir.with_name("disk")

    async def talk(reconciler: Reconciler) -> None:
        empty_dir.rename(disk)
        empty_dir.mkdir()  # what the disk was mounted on
        await wait_for(lambda: "as after an unmount" in caplog.text)
        await asyncio.sleep(0.1)
        assert versions(reconciler) == [1]
        fakes.write_version(disk, fakes.doubler(version=2))
        empty_dir.rmdir()
        disk.rename(empty_dir)
        await wait_for(lambda: versions(reconciler) == [1, 2])
        shutil.rmtree(empty_dir / "doubler")
        await wait_for(lambda: not versions(reconciler))

    run_all(reconciler, talk=talk)
    assert caplog.text.count("as after an unmount") == 1


async def wait_for(is_done: Callable[[], object]) -> None:
    """Wait until something is true; `run_all` gives up in the end."""
    while not is_done():
        await asyncio.sleep(0.01)


def test_change_that_cannot_read_the_folder_is_made_later(empty_dir: Path) -> None:
    """A caller is told that the folder cannot be read, and the change is made once it can be."""
    fakes.write_version(empty_dir, fakes.doubler())
    reconciler = build(empty_dir, interval=0.02)

    async def talk(reconciler: Reconciler) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "scan", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
            with pytest.raises(UnavailableError, match=r"waits until the models folder can be read: .*Input"):
                await reconciler.unload("doubler")
            assert versions(reconciler) == [1]
        while versions(reconciler):
            await asyncio.sleep(0.01)

    run_all(reconciler, talk=talk)
