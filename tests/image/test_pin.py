"""The version of a source: what is pinned, and what a later session that is told something else makes of it.

Every kind of validator that may be pinned against every kind that may be shown after a remount, with the same bytes and
with others. What happens while a file is read is in `tests/source/http/test_http_version.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import trio.testing

from qedfs.errors import SourceChanged
from qedfs.format.record import Pin
from qedfs.image.image import Image
from qedfs.overlay.open import open_storage
from qedfs.source.base import Identity, Sameness
from qedfs.source.pinning import USUAL, By, Pinning
from qedfs.source.samples import Samples
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served

SIZE = 8 * CLUSTER
OLD, NEW = (random.Random(seed).randbytes(SIZE) for seed in (1, 2))
MONDAY, TUESDAY = "Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT"
KINDS = {
    "none": Identity(SIZE),
    "date": Identity(SIZE, None, MONDAY),
    "weak": Identity(SIZE, 'W/"a"'),
    "weak, date": Identity(SIZE, 'W/"a"', MONDAY),
    "strong": Identity(SIZE, '"a"'),
    "strong, date": Identity(SIZE, '"a"', MONDAY),
}
OTHERS = {
    "none": Identity(SIZE),
    "date": Identity(SIZE, None, TUESDAY),
    "weak": Identity(SIZE, 'W/"b"'),
    "weak, date": Identity(SIZE, 'W/"b"', TUESDAY),
    "strong": Identity(SIZE, '"b"'),
    "strong, date": Identity(SIZE, '"b"', TUESDAY),
}
LONG = "x" * 900


def source(content: bytes, identity: Identity) -> FakeSource:
    made = FakeSource(content)
    made.identity = identity
    return made


def new_overlay() -> MemoryStorage:
    return MemoryStorage(empty(cluster_size=CLUSTER, image_size=SIZE, backing=b"http://fake/disk.raw").data)


async def started(identity: Identity, *, content: bytes = OLD, pinning: Pinning = USUAL) -> MemoryStorage:
    """An overlay that has kept two clusters of a version."""
    storage = new_overlay()
    async with served(source(content, identity), storage=storage, pinning=pinning) as image:
        for pos in (0, 4 * CLUSTER):
            await image.read(pos, 512)
    return MemoryStorage(storage.bytes)


async def is_same(storage: MemoryStorage, content: bytes, shown: Identity, pinning: Pinning = USUAL) -> bool:
    """Whether another session takes bytes from this source; local ones it serves in any case."""
    async with served(source(content, shown), storage=storage, pinning=pinning) as image:
        assert bytes(await image.read(0, CLUSTER)) == OLD[:CLUSTER]
        missing = image.overlay.missing
        pos = next(pos for pos in range(0, SIZE, CLUSTER) if image.overlay.clusters.all_missing(pos // CLUSTER, 1))
        try:
            assert bytes(await image.read(pos, CLUSTER)) == content[pos : pos + CLUSTER]
        except SourceChanged:
            assert image.overlay.missing == missing
            return False
        return True


def pin_of(image: Image) -> Pin:
    pin = image.overlay.record.pin
    assert pin is not None
    return pin


@pytest.mark.parametrize(
    ("known", "seen", "joined"),
    [
        (Identity(1), Identity(1, '"a"', "today"), Identity(1, '"a"', "today")),
        (Identity(1, '"a"'), Identity(1, None, "today"), Identity(1, '"a"', "today")),
        (Identity(1, '"a"', "today", "x"), Identity(1, None, None, "y"), Identity(1, '"a"', "today", "x")),
        (Identity(1, '"a"'), Identity(1, '"a"', digest="md5:00"), Identity(1, '"a"', digest="md5:00")),
    ],
)
def test_what_both_tell(known: Identity, seen: Identity, joined: Identity) -> None:
    assert known.joined(seen) == joined
    assert joined.joined(seen) is joined


@pytest.mark.parametrize("pinned", KINDS)
async def test_after_a_remount_the_same_bytes_are_the_same_version(
    autojump_clock: trio.testing.MockClock, pinned: str
) -> None:
    overlay = await started(KINDS[pinned])
    for name, shown in KINDS.items():
        assert await is_same(MemoryStorage(overlay.bytes), OLD, shown), name
    for name, shown in OTHERS.items():
        proved = KINDS[pinned].compare(shown).sameness is Sameness.CHANGED
        assert await is_same(MemoryStorage(overlay.bytes), OLD, shown) is not proved, name


@pytest.mark.parametrize("pinned", KINDS)
async def test_after_a_remount_other_bytes_are_another_version(
    autojump_clock: trio.testing.MockClock, pinned: str
) -> None:
    overlay = await started(KINDS[pinned])
    for name, shown in OTHERS.items():
        assert not await is_same(MemoryStorage(overlay.bytes), NEW, shown), name
    for name, shown in KINDS.items():
        # The one thing that nobody can notice: a strong tag, or a date, that stays.
        told = KINDS[pinned].compare(shown).sameness is Sameness.SAME
        assert await is_same(MemoryStorage(overlay.bytes), NEW, shown) is told, name


@pytest.mark.parametrize("shown", OTHERS)
async def test_nothing_kept_takes_any_version(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, shown: str
) -> None:
    overlay = new_overlay()
    async with served(source(OLD, KINDS["strong, date"]), storage=overlay) as image:
        await image.source_size()
    caplog.clear()
    async with served(source(NEW, OTHERS[shown]), storage=MemoryStorage(overlay.bytes)) as image:
        assert bytes(await image.read(0, CLUSTER)) == NEW[:CLUSTER]
    assert "nothing had been kept" in caplog.text


async def test_without_samples_a_validator_that_vanishes_is_a_change(autojump_clock: trio.testing.MockClock) -> None:
    """As in overlays of the first version, and where all that was kept are zeros."""
    overlay = await started(KINDS["strong, date"])
    async with served(source(OLD, KINDS["strong, date"]), storage=overlay) as image:
        pin = dataclasses.replace(pin_of(image), samples="")
        await image.overlay.change_record(lambda record: dataclasses.replace(record, pin=pin))
    bare = overlay.bytes
    assert await is_same(MemoryStorage(bare), OLD, KINDS["strong"])
    for kind in ("none", "date", "weak", "weak, date"):
        assert not await is_same(MemoryStorage(bare), OLD, KINDS[kind]), kind
    # But a pin that has nothing but a size cannot lose anything.
    zeros = new_overlay()
    async with served(source(bytes(SIZE), KINDS["none"]), storage=zeros) as image:
        await image.read(0, 512)
        assert pin_of(image).samples == ""
    async with served(source(bytes(SIZE), KINDS["strong"]), storage=MemoryStorage(zeros.bytes)) as image:
        assert bytes(await image.read(CLUSTER, 512)) == bytes(512)


async def test_what_is_told_late_joins_the_pin_at_once(autojump_clock: trio.testing.MockClock) -> None:
    overlay = new_overlay()
    changing = source(OLD, KINDS["none"])
    async with served(changing, storage=overlay) as image:
        await image.read(0, 1)
        assert pin_of(image).etag is None
        changing.identity = KINDS["strong"]
        await image.read(CLUSTER, 1)
        assert pin_of(image).etag == '"a"'
    assert not await is_same(MemoryStorage(overlay.bytes), NEW, OTHERS["strong"])


@pytest.mark.parametrize("copy_on_read", [True, False])
async def test_what_is_told_late_is_compared_with_the_pin(
    autojump_clock: trio.testing.MockClock, copy_on_read: bool
) -> None:
    """The first answers of this session told nothing; the pin of another one knows better."""
    overlay = await started(KINDS["strong"])
    changing = source(OLD, KINDS["none"])
    async with served(changing, storage=overlay, copy_on_read=copy_on_read) as image:
        await image.read(CLUSTER, 1)
        await trio.sleep(1)
        changing.identity, changing.content = OTHERS["strong"], NEW
        missing = image.overlay.missing
        with pytest.raises(SourceChanged):
            await image.read(5 * CLUSTER, 1)
        await trio.sleep(1)
        assert image.overlay.missing == missing
        assert await image.read(0, 1) == OLD[:1]


async def test_what_is_told_no_longer_is_compared_with_the_pin(autojump_clock: trio.testing.MockClock) -> None:
    overlay = await started(KINDS["strong"])
    changing = source(OLD, KINDS["strong"])
    async with served(changing, storage=overlay) as image:
        await image.source_size()
        changing.identity, changing.content = KINDS["none"], NEW
        missing = image.overlay.missing
        with pytest.raises(SourceChanged, match="the bytes at 0 differ"):
            await image.read(CLUSTER, 1)
        await trio.sleep(1)
        assert image.overlay.missing == missing


async def test_a_long_tag_is_compared_by_its_digest(autojump_clock: trio.testing.MockClock) -> None:
    for prefix in ("", "W/"):
        overlay = await started(Identity(SIZE, f'{prefix}"{LONG}"'))
        assert await is_same(MemoryStorage(overlay.bytes), OLD, Identity(SIZE, f'{prefix}"{LONG}"'))
        assert not await is_same(MemoryStorage(overlay.bytes), OLD, Identity(SIZE, f'{prefix}"{LONG}y"'))


# What decides.


async def test_a_published_digest_decides(autojump_clock: trio.testing.MockClock) -> None:
    overlay = await started(Identity(SIZE, '"a"', MONDAY, digest="sha-256:00"))
    assert await is_same(MemoryStorage(overlay.bytes), OLD, Identity(SIZE, '"b"', TUESDAY, digest="sha-256:00"))
    assert not await is_same(MemoryStorage(overlay.bytes), OLD, Identity(SIZE, '"a"', MONDAY, digest="sha-256:01"))
    # What the pin knows is kept, though it is told only now and then.
    again = MemoryStorage(overlay.bytes)
    assert await is_same(again, OLD, Identity(SIZE, '"a"', MONDAY))
    assert not await is_same(MemoryStorage(again.bytes), OLD, Identity(SIZE, digest="sha-256:01"))


async def test_another_mirror_of_the_same_bytes(autojump_clock: trio.testing.MockClock) -> None:
    overlay = await started(Identity(SIZE, '"a"', MONDAY, place="1" * 16))
    second = Identity(SIZE, '"b"', TUESDAY, place="2" * 16)
    assert not await is_same(MemoryStorage(overlay.bytes), NEW, second)
    assert await is_same(MemoryStorage(overlay.bytes), NEW, Identity(SIZE, '"a"', MONDAY, place="2" * 16))
    assert await is_same(overlay, OLD, second)
    # Now it is that one's tag that is pinned.
    assert not await is_same(MemoryStorage(overlay.bytes), OLD, Identity(SIZE, '"c"', TUESDAY, place="2" * 16))
    assert await is_same(MemoryStorage(overlay.bytes), OLD, Identity(SIZE, '"a"', MONDAY, place="1" * 16))


@pytest.mark.parametrize(
    ("by", "shown", "same"),
    [
        (By.ALL, OTHERS["strong, date"], False),
        (By.DATE, Identity(SIZE, '"b"', MONDAY), True),
        (By.DATE, OTHERS["strong, date"], False),
        (By.ETAG, Identity(SIZE, '"a"', TUESDAY), True),
        (By.ETAG, OTHERS["strong, date"], False),
        (By.SIZE, OTHERS["strong, date"], True),
        (By.NONE, OTHERS["strong, date"], True),
    ],
)
async def test_the_user_says_what_counts(
    autojump_clock: trio.testing.MockClock, by: By, shown: Identity, same: bool
) -> None:
    pinning = Pinning(by)
    for pinned in ("strong, date", "weak, date"):
        overlay = await started(dataclasses.replace(KINDS[pinned], etag='"a"'))
        assert await is_same(MemoryStorage(overlay.bytes), OLD, pinning.counted(shown), pinning) is same
        if by is By.SIZE:
            assert not await is_same(MemoryStorage(overlay.bytes), NEW, pinning.counted(shown), pinning)
            assert not await is_same(MemoryStorage(overlay.bytes), OLD, Identity(SIZE - 1), pinning)
        if by is By.NONE:
            assert await is_same(overlay, NEW, pinning.counted(shown), pinning)


async def test_without_any_pin_samples_of_an_old_version_do_not_linger(autojump_clock: trio.testing.MockClock) -> None:
    overlay = await started(KINDS["strong"])
    nothing = Pinning(By.NONE)
    assert await is_same(overlay, NEW, KINDS["none"], nothing)
    assert await is_same(MemoryStorage(overlay.bytes), NEW, OTHERS["strong"])


async def test_the_user_has_a_name_for_the_version(autojump_clock: trio.testing.MockClock) -> None:
    first, second = Pinning(called="build 1"), Pinning(called="build 2")
    overlay = await started(KINDS["strong, date"], pinning=first)
    assert await is_same(MemoryStorage(overlay.bytes), OLD, OTHERS["strong, date"], first)
    assert not await is_same(MemoryStorage(overlay.bytes), OLD, KINDS["strong, date"], second)
    assert not await is_same(MemoryStorage(overlay.bytes), OLD, Identity(SIZE - 512), first)
    # A mount that does not name it leaves the name, and everything else, as it is.
    unnamed = MemoryStorage(overlay.bytes)
    assert await is_same(unnamed, OLD, KINDS["strong, date"])
    assert not await is_same(MemoryStorage(unnamed.bytes), OLD, KINDS["strong, date"], second)
    # An overlay that has no name yet gets one where the version is the same otherwise.
    plain = await started(KINDS["strong, date"])
    assert not await is_same(MemoryStorage(plain.bytes), OLD, OTHERS["strong, date"], first)
    assert await is_same(plain, OLD, KINDS["strong, date"], first)
    assert not await is_same(MemoryStorage(plain.bytes), OLD, KINDS["strong, date"], second)
    long = Pinning(called=LONG)
    overlay = await started(KINDS["none"], pinning=long)
    assert await is_same(MemoryStorage(overlay.bytes), OLD, OTHERS["strong"], long)


async def test_a_refusal_says_what_helps(autojump_clock: trio.testing.MockClock) -> None:
    overlay = await started(KINDS["strong"])
    for shown, says in ((OTHERS["strong"], "--pin date"), (Identity(SIZE - 512), "or start a new overlay")):
        async with served(source(OLD, shown), storage=MemoryStorage(overlay.bytes)) as image:
            with pytest.raises(SourceChanged, match=says):
                await image.read(CLUSTER, 1)
    # In the middle of a session too, where it is the source that notices.
    noticing = source(OLD, KINDS["strong"])
    async with served(noticing, storage=overlay) as image:
        noticing.fail = SourceChanged('here: ETag was "a", is now "b"')
        with pytest.raises(SourceChanged):
            await image.read(CLUSTER, 1)
        with pytest.raises(SourceChanged, match=r"what is local is served.*start a new overlay.*--pin date"):
            await image.read(2 * CLUSTER, 1)


# Samples.


async def test_samples_are_stored_when_something_was_kept(autojump_clock: trio.testing.MockClock) -> None:
    overlay = new_overlay()
    async with served(source(OLD, KINDS["strong"]), storage=overlay) as image:
        await image.source_size()
        await trio.sleep(5)
        assert pin_of(image).samples == ""
        await image.read(0, 512)
        await trio.sleep(5)
        assert pin_of(image).samples.startswith("0:")
        sequence = image.overlay.record.sequence
        await trio.sleep(60)
        assert image.overlay.record.sequence == sequence


async def test_a_look_at_samples_costs_a_request_each(autojump_clock: trio.testing.MockClock) -> None:
    overlay = await started(KINDS["none"])
    again = source(OLD, KINDS["none"])
    async with served(again, storage=overlay) as image:
        await image.source_size()
        assert sorted((pos, size) for pos, size, _ in again.reads) == [(0, 4096), (4 * CLUSTER, 4096)]
        await image.read(CLUSTER, 512)
        assert len(again.reads) == 3


async def test_a_strong_tag_or_a_date_costs_no_look(autojump_clock: trio.testing.MockClock) -> None:
    for pinned, shown in itertools.product(("date", "strong", "strong, date"), repeat=2):
        if KINDS[pinned].compare(KINDS[shown]).sameness is Sameness.SAME:
            again = source(OLD, KINDS[shown])
            async with served(again, storage=await started(KINDS[pinned])) as image:
                await image.source_size()
                assert again.reads == []


@pytest.mark.parametrize(
    ("content", "grown", "same"), [(OLD, False, True), (OLD, True, True), (NEW, False, False), (NEW, True, False)]
)
async def test_a_backing_that_a_commit_has_changed_in_part_is_known_by_its_samples(
    content: bytes, grown: bool, same: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """It has another date, and may have grown to the size of the image, which ends later than the backing did."""
    storage = await started(KINDS["date"])
    overlay = await open_storage(storage)
    samples = Samples()
    samples.offer(2 * CLUSTER, memoryview(OLD)[2 * CLUSTER : 3 * CLUSTER])
    pin = overlay.record.pin
    assert pin is not None
    size = SIZE - CLUSTER if grown else SIZE
    known = Pin(pin.backing, size, samples=samples.encode())
    await overlay.change_record(lambda record: dataclasses.replace(record, pin=known, committing=True))
    await overlay.close()
    storage = MemoryStorage(storage.bytes)
    assert await is_same(storage, content, OTHERS["date"]) is same
    record = (await open_storage(MemoryStorage(storage.bytes, writable=False))).record
    assert record.committing is not same
    assert record.pin is not None
    assert record.pin.last_modified == (TUESDAY if same else None)
    # From now on, the date counts again.
    assert await is_same(MemoryStorage(storage.bytes), content, KINDS["date"]) is False


async def test_a_comparison_stores_nothing(autojump_clock: trio.testing.MockClock) -> None:
    storage = new_overlay()
    async with served(source(OLD, KINDS["date"]), storage=storage) as image:
        assert image.version is not None
        before = bytes(storage.bytes)
        assert (await image.version.compare()).last_modified == MONDAY
        assert (image.overlay.record.pin, image.version.identity, bytes(storage.bytes)) == (None, None, before)
        await image.read(0, CLUSTER)
        assert image.overlay.record.pin is not None
    async with served(source(NEW, OTHERS["date"]), storage=MemoryStorage(storage.bytes)) as image:
        assert image.version is not None
        for _ in range(2):
            with pytest.raises(SourceChanged, match="not the version"):
                await image.version.compare()
