"""Which overlays can be put in standby, what the record says of it, and which source ends it."""

from __future__ import annotations

import pytest

from qedfs.errors import InStandby, NoSpace, QedfsError, ReadOnlyOverlay, SourceChanged
from qedfs.format.record import Pin, Standby, digest
from qedfs.image.standby_record import check_size, put_in_standby, record_active, record_emptying
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill
from tests.overlay.images import empty

CLUSTER = 1 << 16
SIZE = 8 * CLUSTER
BACKING = b"http://fake/disk.raw"


async def opened(storage: MemoryStorage | None = None, *, backing: bytes = BACKING) -> Overlay:
    return await open_storage(
        storage or MemoryStorage(empty(cluster_size=CLUSTER, image_size=SIZE, backing=backing).data)
    )


async def test_an_empty_overlay_is_in_standby_and_so_is_its_next_session() -> None:
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=SIZE, backing=BACKING).data)
    overlay = await opened(storage)
    await put_in_standby("disk.qed", overlay)
    assert overlay.record.standby.waits
    await overlay.close()
    again = await opened(MemoryStorage(storage.bytes))
    assert again.record.standby is Standby.WAITING
    await again.close()


async def test_of_an_earlier_version_only_the_size_counts() -> None:
    overlay = await opened()
    pin = Pin(digest(BACKING.decode()), SIZE - 512, etag='"v1"')
    await overlay.change_record(lambda record: type(record)(record.session, pin))
    await put_in_standby("disk.qed", overlay)
    assert overlay.record.pin == Pin(pin.backing, SIZE - 512)
    with pytest.raises(SourceChanged):
        check_size("disk.raw", overlay, SIZE)
    check_size("disk.raw", overlay, SIZE - 512)
    await overlay.close()


async def test_without_a_known_size_the_source_must_fill_the_image() -> None:
    overlay = await opened()
    check_size("disk.raw", overlay, SIZE)
    check_size("disk.raw", overlay, SIZE - 1)  # an image is whole sectors
    for size in (SIZE - 512, SIZE + 1, 0):
        with pytest.raises(SourceChanged, match="the image"):
            check_size("disk.raw", overlay, size)
    await overlay.close()


async def test_an_overlay_that_holds_something_is_not_put_in_standby() -> None:
    overlay = await opened()
    await overlay.adopt(0, bytearray(b"old" + bytes(CLUSTER - 3)), CLUSTER)
    with pytest.raises(QedfsError, match="has clusters already"):
        await put_in_standby("disk.qed", overlay)
    assert overlay.record.standby is Standby.NEVER
    await overlay.close()


async def test_what_was_activated_stays_active(caplog: pytest.LogCaptureFixture) -> None:
    overlay = await opened()
    await put_in_standby("disk.qed", overlay)
    pin = Pin(digest(BACKING.decode()), SIZE, etag='"v2"')
    await record_active(overlay, pin)
    await put_in_standby("disk.qed", overlay)
    assert (overlay.record.standby, overlay.record.pin) == (Standby.REVOCABLE, pin)
    assert "was activated before; it is not in standby" in caplog.text
    await overlay.close()


async def test_without_a_backing_there_is_nothing_to_wait_for(caplog: pytest.LogCaptureFixture) -> None:
    overlay = await opened(backing=b"")
    await put_in_standby("disk.qed", overlay)
    assert overlay.record.standby is Standby.NEVER
    assert "has no backing; it is not in standby" in caplog.text
    await overlay.close()


async def test_standby_must_be_known_to_later_sessions() -> None:
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=SIZE, backing=BACKING).data)
    storage.writable = False
    overlay = await opened(storage)
    with pytest.raises(ReadOnlyOverlay, match="nobody could know"):
        await put_in_standby("disk.qed", overlay)
    await overlay.close()


async def test_the_first_write_of_a_guest_is_noted_whichever_session_it_is_in() -> None:
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=SIZE, backing=BACKING).data)
    overlay = await opened(storage)
    await put_in_standby("disk.qed", overlay)
    await record_active(overlay, None)
    await overlay.close()
    again = await opened(MemoryStorage(storage.bytes))
    states = [again.record.standby]
    await again.write(0, bytes(CLUSTER), no_fill)
    states.append(again.record.standby)
    assert states == [Standby.REVOCABLE, Standby.ACTIVE]
    await again.close()


async def revocable() -> MemoryStorage:
    """An overlay that was activated, and that no guest has written to."""
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=SIZE, backing=BACKING).data)
    overlay = await opened(storage)
    await put_in_standby("disk.qed", overlay)
    await record_active(overlay, None)
    await overlay.close()
    return MemoryStorage(storage.bytes)


async def test_the_way_back_is_not_begun_on_a_full_disk_that_cannot_say_so() -> None:
    """Otherwise a kill would leave an active overlay with half of its clusters dropped."""
    storage = await revocable()
    storage.fail("write", NoSpace("full"), forever=True, wrote=0)
    overlay = await opened(storage)
    assert overlay.full is not None
    with pytest.raises(NoSpace):
        await record_emptying("disk.raw", overlay)
    assert overlay.record.standby is Standby.REVOCABLE
    storage.mend()
    await record_emptying("disk.raw", overlay)
    assert (await opened(MemoryStorage(storage.bytes, writable=False))).record.standby is Standby.EMPTYING


async def test_no_guest_writes_what_a_way_back_would_drop() -> None:
    storage = await revocable()
    overlay = await opened(storage)
    storage.fail("write", NoSpace("full"), wrote=0)  # only the record, whose new place a file system has to find
    with pytest.raises(NoSpace):
        await overlay.write(0, bytes(CLUSTER), no_fill)
    await overlay.write(0, bytes(CLUSTER), no_fill)
    with pytest.raises(QedfsError, match="has written"):
        await record_emptying("disk.raw", overlay)
    await overlay.close()


async def test_a_write_that_comes_after_the_way_back_has_begun_is_refused() -> None:
    overlay = await opened(await revocable())
    await record_emptying("disk.raw", overlay)
    with pytest.raises(InStandby):
        await overlay.write(0, bytes(CLUSTER), no_fill)
