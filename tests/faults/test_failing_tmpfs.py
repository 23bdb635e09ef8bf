"""A tmpfs that fails under the session journal costs nobody anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qedfs.format.tables import ZERO
from qedfs.overlay.create import create_overlay
from qedfs.overlay.journal import Journal
from qedfs.overlay.open import open_overlay

CLUSTER_SIZE = 4096
IMAGE_SIZE = 64 * CLUSTER_SIZE


async def _no_fill(_: int) -> bytes:
    return bytes(CLUSTER_SIZE)


async def test_a_journal_that_cannot_be_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit has succeeded, and so does the flush; what stays in the journal is replayed to no effect."""
    path = str(tmp_path / "disk.qed")
    create_overlay(path, image_size=IMAGE_SIZE, backing="http://host/a", cluster_size=CLUSTER_SIZE)
    overlay = await open_overlay(path, writable=True, journal_folder=tmp_path)
    await overlay.write(0, b"a" * CLUSTER_SIZE, _no_fill)
    await overlay.write(CLUSTER_SIZE, b"b" * CLUSTER_SIZE, _no_fill)

    def fail(*paths: Path) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        await overlay.flush()
    # In place: a replay of the old entries must not bring old data back.
    await overlay.write(0, b"c" * CLUSTER_SIZE, _no_fill)
    await overlay.write(2 * CLUSTER_SIZE, b"d" * CLUSTER_SIZE, _no_fill)
    # As kill -9 leaves it: the descriptor goes, nothing is written.
    overlay.storage.close()
    again = await open_overlay(path, writable=True, journal_folder=tmp_path)
    for cluster, byte in enumerate(b"cbd"):
        (run,) = await again.map(cluster * CLUSTER_SIZE, CLUSTER_SIZE)
        found = memoryview(bytearray(CLUSTER_SIZE))
        await again.read_data(run.offset, found)
        assert bytes(found) == bytes([byte]) * CLUSTER_SIZE
    await again.close()


@pytest.mark.expect_log("writes to new clusters wait for a commit")
async def test_a_discard_that_stays_in_the_journal_takes_no_later_write_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tmpfs is full: it takes neither the entry of the write, nor a shorter journal after the commit."""
    path = str(tmp_path / "disk.qed")
    create_overlay(path, image_size=IMAGE_SIZE, backing="http://host/a", cluster_size=CLUSTER_SIZE)
    overlay = await open_overlay(path, writable=True, journal_folder=tmp_path)
    await overlay.discard(0, 4)

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        patched.setattr(Journal, "append", fail)
        await overlay.write(CLUSTER_SIZE, b"b" * CLUSTER_SIZE, _no_fill)
        await overlay.flush()
    overlay.storage.close()
    again = await open_overlay(path, writable=True, journal_folder=tmp_path)
    (zeros, data) = await again.map(0, 2 * CLUSTER_SIZE)
    assert zeros.offset == ZERO
    found = memoryview(bytearray(CLUSTER_SIZE))
    await again.read_data(data.offset, found)
    assert bytes(found) == b"b" * CLUSTER_SIZE
    await again.close()
