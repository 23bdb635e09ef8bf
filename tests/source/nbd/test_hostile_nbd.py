"""Every way in which the fake server can misbehave, over a socket: one declared error, no wrong byte, no hang."""

from __future__ import annotations

import functools

import pytest
import trio

from qedfs.errors import SourceError, SourceUnreachable
from tests.fakes.nbd_behaviours import (
    AFTER_A_READ,
    BEHAVIOURS,
    DESCRIBING,
    OPENING,
    OPENING_LATER,
    READING,
    TLS,
    WELL_BEHAVED,
)
from tests.fakes.nbd_server import CORRECT, Behaviour, FakeNbd
from tests.source.nbd.support import MiB, opened, read, serving, serving_on_mock_clock, sparse_content

CONTENT = sparse_content(MiB)
POS = 64 * 1024  # not 0: some servers answer with the byte before
SIZE = 16 * 1024

# Errors in good form leave the connection usable, all else must end it.
KEEPS_CONNECTION = {name for name in READING if name.startswith("E") and name != "ESHUTDOWN"} | {"error-code-unknown"}
KEEPS_CONNECTION |= {"extents-EIO"}


def _single_line(error: BaseException, url: str) -> str:
    text = str(error)
    assert text.startswith(url)
    assert text.isprintable()
    return text


@pytest.mark.parametrize("name", [*OPENING, *OPENING_LATER])
async def test_refuses_to_open(name: str, autojump_clock: trio.testing.MockClock) -> None:
    behaviour = BEHAVIOURS[name]
    async with serving_on_mock_clock(FakeNbd(CONTENT, behaviour)) as url:
        with pytest.RaisesGroup(SourceError) as caught:
            async with opened(url):
                pytest.fail("it opened")
        error = caught.value.exceptions[0]
        assert behaviour.says in _single_line(error, url)
        assert isinstance(error, SourceUnreachable) is not behaviour.permanent
    assert autojump_clock.current_time() < 11


@pytest.mark.parametrize("name", TLS)
async def test_nbds_never_falls_back(name: str) -> None:
    fake = FakeNbd(CONTENT, TLS[name])
    async with serving(fake) as url:
        url = url.replace("nbd://", "nbds://")
        with pytest.RaisesGroup(SourceError) as caught:
            async with opened(url):
                pytest.fail("it opened")
    assert TLS[name].says in _single_line(caught.value.exceptions[0], url)
    assert fake.options == [5], "nothing but STARTTLS may be asked in the clear"


async def _expect_fault(name: str, behaviour: Behaviour, *, extents: bool) -> None:
    fake = FakeNbd(CONTENT, behaviour)
    async with serving(fake) as url, opened(url) as source:
        question = source.extents if extents else functools.partial(read, source)
        with pytest.raises(SourceError) as caught:
            await question(POS, SIZE)
        assert behaviour.says in _single_line(caught.value, url)
        assert isinstance(caught.value, SourceUnreachable) is not behaviour.permanent
        # The server comes to its senses: the source must work again, on whatever connection.
        fake.behaviour = CORRECT if behaviour.structured else WELL_BEHAVED["simple-replies"]
        assert await read(source, POS, SIZE) == CONTENT[POS : POS + SIZE]
        assert fake.connections == (1 if name in KEEPS_CONNECTION else 2)


@pytest.mark.parametrize("name", READING)
async def test_a_bad_answer_to_a_read(name: str) -> None:
    await _expect_fault(name, READING[name], extents=False)


@pytest.mark.parametrize("name", DESCRIBING)
async def test_a_bad_answer_about_extents(name: str) -> None:
    await _expect_fault(name, DESCRIBING[name], extents=True)


@pytest.mark.parametrize("name", AFTER_A_READ)
async def test_what_comes_after_a_good_answer(name: str) -> None:
    fake = FakeNbd(CONTENT, AFTER_A_READ[name])
    async with serving(fake) as url, opened(url) as source:
        assert await read(source, POS, SIZE) == CONTENT[POS : POS + SIZE]
        await trio.testing.wait_all_tasks_blocked(0.02)
        fake.behaviour = CORRECT
        assert await read(source, POS, SIZE) == CONTENT[POS : POS + SIZE]
        assert fake.connections == 2


async def test_all_reads_in_flight_fail_with_the_connection() -> None:
    answers = trio.Event()
    fake = FakeNbd(CONTENT, READING["magic-wrong"])

    async def wait_for_all(_call: object) -> None:
        await answers.wait()

    fake.before_answer = wait_for_all
    failures: list[str] = []

    async with serving(fake) as url, opened(url) as source:

        async def one(number: int) -> None:
            with pytest.raises(SourceUnreachable) as caught:
                await read(source, number * 4096, 4096)
            failures.append(str(caught.value))

        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(one, number)
            await trio.testing.wait_all_tasks_blocked()
            answers.set()
    assert failures == [f"{url}: connection dropped: the server sent something other than a reply"] * 16


async def test_a_silent_server_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    async with serving_on_mock_clock(FakeNbd(CONTENT, WELL_BEHAVED["silent"])) as url, opened(url) as source:
        with pytest.raises(SourceUnreachable, match="no progress for 30 s"):
            await read(source, 0, 4096)
    assert 29 < autojump_clock.current_time() < 40


async def test_a_dribbling_server_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    fake = FakeNbd(CONTENT)
    async with serving_on_mock_clock(fake) as url, opened(url) as source:
        # A byte a second is activity, but no progress.
        async def dribble(_call: object) -> None:
            (stream,) = fake.streams
            await stream.send_all(bytes.fromhex("668e33ef00010001") + (1).to_bytes(8, "big"))
            await stream.send_all((4096 + 8).to_bytes(4, "big") + bytes(8))
            while True:
                await stream.send_all(b"x")
                await trio.sleep(1)

        fake.before_answer = dribble
        with pytest.raises(SourceUnreachable, match="no progress for 30 s"):
            await read(source, 0, 4096)
    assert 29 < autojump_clock.current_time() < 70


async def test_an_idle_connection_is_not_given_up(autojump_clock: trio.testing.MockClock) -> None:
    fake = FakeNbd(CONTENT)
    async with serving_on_mock_clock(fake) as url, opened(url) as source:
        for _ in range(3):
            assert await read(source, 5, 5) == CONTENT[5:10]
            await trio.sleep(1000)
        assert fake.connections == 1


async def test_a_slow_answer_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    fake = FakeNbd(CONTENT)
    async with serving_on_mock_clock(fake) as url, opened(url) as source:

        async def late(_call: object) -> None:
            await trio.sleep(25)

        fake.before_answer = late
        for _ in range(3):
            assert await read(source, 5, 5) == CONTENT[5:10]
        assert fake.connections == 1
