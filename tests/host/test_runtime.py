"""Places for sockets and journals: the next one where the first cannot be had, and nothing is left for good."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from qedfs.errors import Inaccessible
from qedfs.host import runtime
from qedfs.host.runtime import (
    KEPT_ENDED,
    LOG_NAME,
    SOCKET_NAME,
    RuntimeFolder,
    held_folder,
    journal_folder,
    mount_folder,
    mount_places,
    remove_unless_served,
    serving_folder,
)
from tests.harness.require import require_root

ALICE = 61_001


@pytest.fixture(autouse=True)
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folders, all there and all on a tmpfs; no login session."""
    for name in ("RUN", "USERS", "SHARED_MEMORY", "TEMPORARY"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(runtime, name, tmp_path / name)
    monkeypatch.setattr(runtime, "filesystem_type", lambda _: "tmpfs")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    require_root()
    return tmp_path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of the tests are too long for a socket; those of the system are not."""
    monkeypatch.setattr(runtime, "_MOST_SOCKET_PATH", 1000)


def base_of(path: Path | None, system: Path) -> str | None:
    return None if path is None else path.relative_to(system).parts[0]


def spoil(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it impossible to use `folder`."""
    if how == "missing":
        folder.rmdir()
    elif how == "a file":
        folder.rmdir()
        folder.touch()
    elif how == "read-only":
        make = Path.mkdir

        def refuse(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
            if path.is_relative_to(folder):
                raise OSError(30, "Read-only file system", str(path))
            make(path, mode, parents, exist_ok)

        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        for name in ("qedfs", "qedfs-0"):
            if how == "another's":
                (folder / name).mkdir()
                os.chown(folder / name, ALICE, ALICE)
            elif how == "a link":
                (folder / name).symlink_to("/etc")


WAYS = ["missing", "a file", "read-only", "another's", "a link"]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("how", WAYS)
def test_the_next_place_is_taken(system: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(system / "RUN", how, monkeypatch)
    assert base_of(mount_folder("/mnt"), system) == "TEMPORARY"
    assert base_of(journal_folder(), system) == "SHARED_MEMORY"
    places = [place for place in mount_places("/mnt") if place.path.exists()]
    assert [base_of(place.path, system) for place in places] == ["TEMPORARY"]
    with places[0].opened() as fd:
        assert os.path.samestat(os.fstat(fd), mount_folder("/mnt").stat())


@pytest.mark.usefixtures("short")
def test_root_s_session_is_the_second_choice(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "session").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(system / "session"))
    assert base_of(mount_folder("/mnt"), system) == "RUN"
    spoil(system / "RUN", "read-only", monkeypatch)
    assert base_of(mount_folder("/mnt"), system) == "session"


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("how", WAYS)
def test_without_any_place_there_is_no_journal_and_one_line_on_the_socket(
    system: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RUN", "SHARED_MEMORY", "TEMPORARY"):
        with monkeypatch.context() as patched:
            spoil(system / name, how, patched if how != "read-only" else monkeypatch)
    assert journal_folder() is None
    places = r"^no place for a control socket \(.*RUN.*TEMPORARY.*SHARED_MEMORY"
    with pytest.raises(Inaccessible, match=places) as found:
        mount_folder("/mnt")
    assert str(found.value).endswith("set XDG_RUNTIME_DIR to a folder of yours")
    assert "\n" not in str(found.value)


def test_a_place_whose_path_is_too_long_for_a_socket_is_passed_over(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (system / "RUN").rmdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(system / ("x" * 100)))
    (system / ("x" * 100)).mkdir()
    monkeypatch.setattr(runtime, "_MOST_SOCKET_PATH", len(f"{system}/TEMPORARY/qedfs-0/0123456789abcdef/{SOCKET_NAME}"))
    assert base_of(mount_folder("/mnt"), system) == "TEMPORARY"


def test_a_journal_is_kept_on_a_tmpfs_only(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {system / "RUN": "ext4", system / "SHARED_MEMORY": "tmpfs", system / "TEMPORARY": "tmpfs"}
    monkeypatch.setattr(runtime, "filesystem_type", lambda path: kinds[path])
    assert base_of(journal_folder(), system) == "SHARED_MEMORY"
    kinds[system / "SHARED_MEMORY"] = "overlay"
    assert base_of(journal_folder(), system) == "TEMPORARY"
    kinds[system / "TEMPORARY"] = "btrfs"
    assert journal_folder() is None
    assert sorted(path.name for path in system.glob("*/*")) == ["qedfs-0", "qedfs-0"]


def test_the_root_of_a_user_namespace_has_the_places_of_its_user(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's /run is not its own; another process of the user, outside, has to find them."""
    monkeypatch.setattr(runtime, "outer_user", lambda uid: {0: ALICE}.get(uid, -1))
    monkeypatch.setattr(runtime, "_MOST_SOCKET_PATH", 1000)
    spoil(system / "RUN", "read-only", monkeypatch)
    assert mount_folder("/mnt").parent == system / "TEMPORARY" / f"qedfs-{ALICE}"
    assert journal_folder() == system / "SHARED_MEMORY" / f"qedfs-{ALICE}"
    (system / "USERS" / str(ALICE)).mkdir()
    assert journal_folder() == system / "USERS" / str(ALICE) / "qedfs" / "journal"


# Where we were told to look.


def looked(place: RuntimeFolder) -> str:
    """What is at the end of the way."""
    with place.opened() as fd:
        return os.readlink(f"/proc/self/fd/{fd}")


def test_nothing_on_the_way_to_a_place_that_others_tell_of_is_followed_or_asked(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can bind a socket whose path ends like that of a mount, below a file system whose server is theirs."""
    folder = system / "home" / "qedfs" / "mount"
    folder.mkdir(parents=True, mode=0o700)
    (system / "link").symlink_to("home")
    asked: list[str] = []

    def kind(fd: int) -> str:
        asked.append(os.readlink(f"/proc/self/fd/{fd}"))
        return "fuse.theirs" if asked[-1].endswith("/home") else "ext4"

    assert looked(RuntimeFolder(system / "link" / "qedfs", ("mount",), 0)) == str(folder)
    with pytest.raises(FileNotFoundError):
        looked(RuntimeFolder(system / "link" / "qedfs", ("mount",), 0, told=True))
    assert looked(RuntimeFolder(system / "home" / "qedfs", ("mount",), 0, told=True)) == str(folder)
    monkeypatch.setattr(runtime, "filesystem_type", kind)
    with pytest.raises(PermissionError, match="a FUSE file system of another user"):
        looked(RuntimeFolder(system / "home" / "qedfs", ("mount",), 0, told=True))
    assert asked[-1] == str(system / "home")


def test_a_server_with_another_environment_is_found_by_the_kernel_s_table(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_MOST_SOCKET_PATH", 1000)
    (system / "RUN").rmdir()
    (system / "session").mkdir()
    (system / "link").symlink_to("session")
    with monkeypatch.context() as patched:
        patched.setenv("XDG_RUNTIME_DIR", str(system / "link"))
        folder = mount_folder("/mnt")
    strangers = [b"/tmp/x", b"/tmp/0123456789abcdef/control.sock"]
    monkeypatch.setattr(runtime, "sockets", lambda: [*strangers, os.fsencode(folder / SOCKET_NAME)])
    (found,) = [place for place in mount_places("/mnt") if place.told]
    assert looked(found) == str(folder) == f"{system}/session/qedfs/{folder.name}"


# What is left.


@pytest.mark.usefixtures("short")
def test_a_good_end_leaves_nothing_and_a_bad_one_its_log(system: Path) -> None:
    with serving_folder("/mnt") as folder:
        (folder / LOG_NAME).write_text("log")
        (folder / SOCKET_NAME).touch()
    assert list(folder.parent.iterdir()) == []
    (mount_folder("/mnt") / LOG_NAME).write_text("log")
    for mountpoint in ("/mnt", "/other"):
        with pytest.raises(Inaccessible), serving_folder(mountpoint):
            raise Inaccessible
    assert (folder / LOG_NAME).read_text() == "log"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.usefixtures("short")
def test_the_end_of_one_server_takes_nothing_from_the_next(system: Path) -> None:
    """It may still be closing overlays while the mountpoint is in use again."""
    with serving_folder("/mnt") as first:
        second = serving_folder("/mnt")
        assert second.__enter__() == first
        (first / SOCKET_NAME).touch()
    assert (first / SOCKET_NAME).exists()
    second.__exit__(None, None, None)
    assert not first.exists()


@pytest.mark.usefixtures("short")
def test_what_mounts_have_left_is_bounded(system: Path) -> None:
    """By kills: each of another mountpoint. What serves, and what is no mount's, stays however old it is."""
    with held_folder("/served") as served:
        (served / SOCKET_NAME).touch()
        os.utime(served, ns=(0, 0))
        strange = mount_folder("/strange")
        (strange / "precious").touch()
        os.utime(strange, ns=(1, 1))
        left = [mount_folder(f"/mnt{number}") for number in range(KEPT_ENDED + 5)]
        for number, folder in enumerate(left):
            (folder / LOG_NAME).touch()
            os.utime(folder, ns=(10 + number, 10 + number))
        with serving_folder("/new") as new:
            found = set(new.parent.iterdir())
    assert found == {served, strange, new, *left[-KEPT_ENDED + 1 :]}


def test_a_folder_is_removed_by_whoever_holds_it_before_others_find_it_free(tmp_path: Path) -> None:
    folder = tmp_path / "0123456789abcdef"
    folder.mkdir()
    (folder / LOG_NAME).touch()
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(held, fcntl.LOCK_SH)
    remove_unless_served(folder)
    assert folder.exists()
    remove_unless_served(folder, held)
    assert not folder.exists()
    os.close(held)


@pytest.mark.usefixtures("short")
def test_a_folder_that_was_removed_while_it_was_waited_for_is_made_again(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mount_folder("/mnt")
    flock = fcntl.flock
    times = 0

    def removed_first(fd: int, how: int) -> None:
        nonlocal times
        times += 1
        if times == 1:
            remove_unless_served(folder)
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with held_folder("/mnt") as held:
        assert held == folder
        assert folder.is_dir()
