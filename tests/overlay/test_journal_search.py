"""A killed session's journal is found by whoever comes next, or its loss is told; nothing is voided unread.

With real users where it matters, in children that have left root's rights behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import pytest
import trio

from qedfs.cli.commands.check import check
from qedfs.errors import InUse
from qedfs.host.runtime import RuntimeFolder, journal_folder, journal_places
from qedfs.overlay.create import create_overlay
from qedfs.overlay.journal import MOST_BYTES, Journal, read_journal
from qedfs.overlay.journal_search import note
from qedfs.overlay.open import open_overlay, open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import Session, read_header, read_record
from tests.fakes.storage import MemoryStorage
from tests.harness.alone import alone_with
from tests.harness.require import require_root
from tests.overlay.guest import no_fill
from tests.overlay.images import empty
from tests.overlay.scenario import read_all

CLUSTER = 4096
SESSION = "5" * 32
ALICE, BOB = 61_001, 61_002


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folders, none of which is there yet; what was on a tmpfs is a folder here."""
    for name in ("RUN", "USERS", "SHARED_MEMORY", "TEMPORARY"):
        monkeypatch.setattr(f"qedfs.host.runtime.{name}", tmp_path / name)
    monkeypatch.setattr("qedfs.host.runtime.filesystem_type", lambda _: "tmpfs")
    return tmp_path


async def killed(folder: Path | None, *, image: bytes | bytearray | None = None) -> bytearray:
    """The file of a mount that was killed after a write whose entry is in its journal only."""
    storage = MemoryStorage(image or empty(backing=b"").data, name="disk")
    overlay = await open_storage(storage, journal_folder=folder)
    await overlay.write(CLUSTER, b"1" * CLUSTER, no_fill)
    overlay._journal.close(remove=False)
    return storage.bytes


def journals(places: Path) -> list[Path]:
    return list(places.rglob("disk-*"))


async def seen(overlay: Overlay) -> bytes:
    """The first byte of the cluster that was written."""
    return bytes((await read_all(overlay, bytes(overlay.image_size)))[CLUSTER : CLUSTER + 1])


def with_note(image: bytes | bytearray, text: str) -> bytearray:
    """The overlay whose record tells of another journal."""
    storage = MemoryStorage(image)
    header = read_header(storage)[0]
    record = read_record(storage, header)
    assert record is not None
    Session(storage, header, record).begin(record.session, text)
    return storage.bytes


async def test_without_a_descriptor_to_look_for_it_it_is_not_taken_for_lost(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (places / "SHARED_MEMORY").mkdir()
    left = await killed(journal_folder())

    def no_descriptor() -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr("qedfs.overlay.journal_search.boot_id", no_descriptor)
        with pytest.raises(InUse, match="Too many open files"):
            await open_storage(MemoryStorage(left, name="disk"), journal_folder=journal_folder())
    again = await open_storage(MemoryStorage(left, name="disk"), journal_folder=journal_folder())
    assert await seen(again) == b"1"
    await again.close()


@pytest.mark.parametrize("name", ["RUN", "SHARED_MEMORY", "TEMPORARY"])
async def test_it_is_found_where_any_session_can_have_put_it(places: Path, name: str) -> None:
    """The next one has a better place for its own."""
    require_root()
    (places / name).mkdir()
    left = await killed(journal_folder())
    for other in ("RUN", "SHARED_MEMORY", "TEMPORARY"):
        (places / other).mkdir(exist_ok=True)
    again = await open_storage(MemoryStorage(left, name="disk"), journal_folder=journal_folder())
    assert (await seen(again), again.journal_remark) == (b"1", "")
    await again.close()
    assert journals(places) == []


async def test_a_lost_journal_is_told_once(places: Path) -> None:
    (places / "SHARED_MEMORY").mkdir()
    folder = journal_folder()
    assert folder is not None
    left = await killed(folder)
    shutil.rmtree(folder)
    reader = MemoryStorage(left, name="disk", writable=False)
    assert f"its journal is no longer in {places}" in (await open_storage(reader)).journal_remark
    storage = MemoryStorage(left, name="disk")
    again = await open_storage(storage, journal_folder=journal_folder())
    assert "writes that were acknowledged just before, and not flushed, may be lost" in again.journal_remark
    await again.close()
    assert (await open_storage(MemoryStorage(storage.bytes, name="disk"))).journal_remark == ""


async def test_a_copy_is_told_to_lack_what_was_not_flushed(places: Path) -> None:
    """Made while the original was in use, or after it was killed: nobody can tell, and its journal is not for it."""
    (places / "SHARED_MEMORY").mkdir()
    left = await killed(journal_folder())
    storage = MemoryStorage(left, name="another")
    copy = await open_storage(storage, journal_folder=journal_folder())
    told = r"it is a copy, made while it was mounted by .+; writes that"
    assert re.search(told, copy.journal_remark)
    assert await seen(copy) == b"\0"
    await copy.close()
    assert (await open_storage(MemoryStorage(storage.bytes, name="another"))).journal_remark == ""
    again = await open_storage(MemoryStorage(left, name="disk"), journal_folder=journal_folder())
    assert await seen(again) == b"1"


@pytest.mark.parametrize("kind", ["without a journal", "another boot", "looked at while it runs", "closed"])
async def test_nothing_is_told_where_nothing_was_lost(places: Path, kind: str) -> None:
    (places / "SHARED_MEMORY").mkdir()
    left = await killed(None if kind == "without a journal" else journal_folder())
    reader = MemoryStorage(left, name="disk", writable=False)
    if kind == "another boot":
        reader = MemoryStorage(with_note(left, f"{os.getuid()}.disk.00000000"), name="disk", writable=False)
    elif kind == "closed":
        storage = MemoryStorage(left, name="disk")
        await (await open_storage(storage, journal_folder=journal_folder())).close()
        reader = MemoryStorage(storage.bytes, name="disk", writable=False)
    reader.locked = kind != "looked at while it runs"
    shutil.rmtree(places / "SHARED_MEMORY")
    assert (await open_storage(reader)).journal_remark == ""


async def test_a_journal_that_was_lost_in_time_is_not_missed(
    tmp_path: Path, places: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As at a logout: from then on a write waits for its commit, and the next session has all of it."""
    folder = tmp_path / "journals"
    folder.mkdir()
    storage = MemoryStorage(empty(backing=b"").data, name="disk")
    overlay = await open_storage(storage, journal_folder=folder)
    shutil.rmtree(folder)
    await overlay.write(CLUSTER, b"1" * CLUSTER, no_fill)
    again = await open_storage(MemoryStorage(storage.bytes, name="disk"))
    assert (await seen(again), again.journal_remark) == (b"1", "")
    assert "No such file" in caplog.text


@pytest.mark.parametrize("content", [b"", b"qedfsj\0\x7f" + bytes(200), b"larger"])
async def test_what_cannot_be_read_is_not_voided(places: Path, content: bytes) -> None:
    (places / "SHARED_MEMORY").mkdir()
    folder = journal_folder()
    assert folder is not None
    left = await killed(folder)
    (journal,) = folder.glob("disk-*")
    if content == b"larger":
        os.truncate(journal, MOST_BYTES + 4096)
    elif content:
        journal.write_bytes(content)
    else:
        journal.unlink()
        journal.mkdir()
    storage = MemoryStorage(left, name="disk")
    with pytest.raises(InUse, match=r"mount it once as that user.*or give them up with qedfs check --drop-journal"):
        await open_storage(storage, journal_folder=journal_folder())
    assert storage.bytes == left
    assert journal.exists()
    reader = await open_storage(MemoryStorage(left, name="disk", writable=False))
    assert "may be missing here" in reader.journal_remark


async def test_the_journal_of_one_who_does_not_own_the_overlay_is_not_believed(places: Path) -> None:
    left = with_note(await killed(None), note("disk").replace(f"{os.getuid()}.", "77.", 1))
    with pytest.raises(InUse, match="a mount of it by user 77 was killed, and the journal of a user"):
        await open_storage(MemoryStorage(left, name="disk"))
    storage = MemoryStorage(left, name="disk")
    storage.owner_number = 77
    assert "by user 77 was killed, and its journal is no longer in" in (await open_storage(storage)).journal_remark


@pytest.mark.parametrize("written_since", [False, True])
async def test_the_disk_is_asked_where_another_program_has_written_since(places: Path, written_since: bool) -> None:
    """An unread journal keeps the page cache as it is, for whom may read it; not where it is void anyway."""
    left = with_note(await killed(None), note("disk").replace(f"{os.getuid()}.", "77.", 1))
    if written_since:
        header = read_header(MemoryStorage(left))[0]
        left[: len(header.encode())] = dataclasses.replace(header, autoclear_features=0).encode()
    storage = MemoryStorage(left, name="disk", writable=False)
    await open_storage(storage)
    assert storage.operations["refresh"] == written_since


async def test_check_names_a_journal_that_nobody_vouches_for_and_gives_it_up(
    tmp_path: Path, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "disk.qed"
    overlay.write_bytes(await killed(None))
    image = with_note(overlay.read_bytes(), f"77.{overlay.stat().st_ino:x}.{note('disk').rpartition('.')[2]}")
    overlay.write_bytes(image)
    check.main([str(overlay)], standalone_mode=False)
    assert "a mount of it by user 77 was killed, and the journal of a user" in capsys.readouterr().out
    with pytest.raises(InUse, match="by user 77"):
        await open_overlay(str(overlay), writable=True)
    check.main([str(overlay), "--drop-journal"], standalone_mode=False)
    assert "user 77" not in capsys.readouterr().out
    again = await open_overlay(str(overlay), writable=True)
    assert again.journal_remark == ""
    await again.close()


def journal_of(folder: Path, user: int) -> Path:
    """A journal in `folder`, both of which belong to this user."""
    journal = Journal.create(folder, "disk", SESSION, 0)
    journal.append([(1, 8192)])
    journal.close(remove=False)
    for path in (folder, journal.path):
        os.chown(path, user, user)
    return journal.path


def test_another_user_s_journal_is_read_from_a_folder_of_theirs_only(tmp_path: Path) -> None:
    require_root()
    folder = tmp_path / "qedfs-1"
    folder.mkdir(mode=0o700)
    path = journal_of(folder, ALICE)
    place = RuntimeFolder(tmp_path, ("qedfs-1",), ALICE)

    def read(place: RuntimeFolder) -> int:
        left = read_journal(place, "disk", SESSION, 0, locked=True)
        assert left is not None
        return len(list(left.pairs))

    assert read(place) == 1
    with pytest.raises(FileNotFoundError):
        read(RuntimeFolder(tmp_path, ("qedfs-1",), BOB))
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(FileNotFoundError):
        read(RuntimeFolder(tmp_path, ("link",), ALICE))
    folder.chmod(0o770)
    with pytest.raises(FileNotFoundError):
        read(place)
    folder.chmod(0o700)
    os.chown(path, BOB, BOB)
    with pytest.raises(OSError, match="is no journal of that user"):
        read(place)
    path.unlink()
    os.mkfifo(path)
    os.chown(path, ALICE, ALICE)
    with pytest.raises(OSError, match="is no journal of that user"):
        read(place)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="is no journal of that user"):
        read(place)


# With real users.


def run_as(user: int, environment: Mapping[str, str], work: Callable[[], Awaitable[bytes]]) -> bytes:
    """What `work` returns, in a child that is this user; b"" if it kills itself. An error comes as its text."""
    read_fd, write_fd = os.pipe()
    with warnings.catch_warnings():
        # Threads that wait for work stay behind, and trio knows that the child has none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            os.environ.pop("XDG_RUNTIME_DIR", None)
            os.environ.update(environment)
            try:
                os.write(write_fd, trio.run(work))
            except Exception as exc:
                os.write(write_fd, f"{type(exc).__name__}: {exc}".encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user can look into; the journals of the users are cleared away."""
    require_root()
    with (
        alone_with("journals-of-users"),
        tempfile.TemporaryDirectory(prefix="qedfs-", dir="/dev/shm") as folder,
    ):
        os.chmod(folder, 0o755)
        try:
            yield Path(folder)
        finally:
            for user in (ALICE, BOB):
                for place in journal_places(user):
                    if place.user == user:
                        with contextlib.suppress(OSError):
                            shutil.rmtree(place.path)


def overlay_of(folder: Path, user: int) -> str:
    path = folder / "disk.qed"
    create_overlay(str(path), image_size=16 * CLUSTER, backing=None, cluster_size=CLUSTER)
    os.chown(path, user, user)
    return str(path)


async def write_and_die(path: str) -> bytes:
    overlay = await open_overlay(path, writable=True, journal_folder=journal_folder())
    assert overlay._journal.takes_entries
    await overlay.write(CLUSTER, b"1" * CLUSTER, no_fill)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


async def look(path: str) -> bytes:
    overlay = await open_overlay(path, writable=True, journal_folder=journal_folder())
    found = await seen(overlay)
    await overlay.close()
    return found


WITH_XDG, WITHOUT = True, False


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((ALICE, WITH_XDG), (ALICE, WITHOUT)),
        ((ALICE, WITHOUT), (ALICE, WITH_XDG)),
        ((ALICE, WITH_XDG), (0, WITHOUT)),
        ((ALICE, WITHOUT), (0, WITH_XDG)),
        ((0, WITH_XDG), (0, WITHOUT)),
    ],
)
def test_no_returned_write_is_lost(shared: Path, first: tuple[int, bool], second: tuple[int, bool]) -> None:
    """A user with and without a session, then cron, ssh, sudo."""
    path = overlay_of(shared, ALICE)
    xdg = shared / "xdg"
    xdg.mkdir(mode=0o700)
    os.chown(xdg, ALICE, ALICE)

    def environment(has: bool) -> dict[str, str]:
        return {"XDG_RUNTIME_DIR": str(xdg)} if has else {}

    assert run_as(first[0], environment(first[1]), lambda: write_and_die(path)) == b""
    assert run_as(second[0], environment(second[1]), lambda: look(path)) == b"1"
    assert run_as(first[0], environment(first[1]), lambda: look(path)) == b"1"


def test_nobody_voids_what_they_may_not_read(shared: Path) -> None:
    path = overlay_of(shared, ALICE)
    assert run_as(0, {}, lambda: write_and_die(path)) == b""
    before = Path(path).read_bytes()
    told = run_as(ALICE, {}, lambda: look(path))
    assert b"InUse" in told
    assert b"a mount of it by root was killed" in told
    assert Path(path).read_bytes() == before
    assert run_as(0, {}, lambda: look(path)) == b"1"
    assert run_as(ALICE, {}, lambda: look(path)) == b"1"
