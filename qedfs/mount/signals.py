"""The signals of a mount: stop cleanly, stop at once, or log what the mount is doing.

Owns the handlers and the text of the dump. Must not know how a mount stops.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import trio

import qedfs
from qedfs.fetch.queue import FetchQueue
from qedfs.units import format_size

log = logging.getLogger(__name__)

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
AGAIN_SECONDS = 0.5  # until then a further signal is the first one again: timeout(1) signals its child, then its group
MOST_FLIGHTS = 32  # of one queue in a dump

_OURS = os.path.dirname(os.path.dirname(qedfs.__file__)) + os.sep
_TRIO = os.path.dirname(trio.__file__) + os.sep


async def stop_on_signal(
    stop: Callable[[], None],
    then: signal.Handlers = signal.SIG_DFL,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Call `stop` at the first signal in STOPPING. After AGAIN_SECONDS, a further signal ends the process at once.

    `then`: SIG_IGN if another process heeds further signals.

    Reports `started` when the handlers are installed. An earlier signal ends the process, so do not mount before.

    Keep this running until the overlays are closed: a service manager also sends SIGTERM to a mount that has just been
    unmounted and is still flushing.
    """
    with trio.open_signal_receiver(*STOPPING) as signals:
        task_status.started()
        number = await anext(signals)
        first = time.monotonic()
        log.info("stopping on %s; a second signal stops at once", signal.Signals(number).name)
        stop()
        # A second one that has arrived meanwhile is sent again at the end of this block, before `then` is there.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)

    def again(number: int, _: object) -> None:
        if time.monotonic() - first >= AGAIN_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in STOPPING:
        signal.signal(number, again if then is signal.SIG_DFL else then)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if then is signal.SIG_DFL:
        await trio.sleep(AGAIN_SECONDS)
        # The kernel's action works even if the event loop hangs. A shell reports it as 143, 130 or 129.
        for number in STOPPING:
            signal.signal(number, then)


async def dump_on_signal(fetches: Callable[[], Sequence[FetchQueue]]) -> None:
    """At each SIGUSR1, log all tasks and the fetch queues."""
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async for _ in signals:
            log.info("%s", "\n  ".join(["asked by SIGUSR1:", *_tasks(), *_queues(fetches())]))


def _tasks() -> Iterator[str]:
    """One line per distinct place where tasks wait: their name, their number if there are several, the place."""
    root = trio.lowlevel.current_root_task()
    found = Counter((task.name, _place(task)) for task in _below(root)) if root is not None else Counter()
    for (name, place), count in sorted(found.items()):
        yield f"task {name}{f' (x {count})' if count > 1 else ''} {place}"


def _below(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    """A task and all its descendants. Uses an explicit stack, since the nesting of flights has no bound."""
    waiting = [task]
    while waiting:
        task = waiting.pop()
        yield task
        waiting += [child for nursery in task.child_nurseries for child in nursery.child_tasks]


def _place(task: trio.lowlevel.Task) -> str:
    """Where a task waits: the innermost line that is not trio's own."""
    place = "in trio"
    try:
        for frame, line in task.iter_await_frames():
            code = frame.f_code
            if not code.co_filename.startswith(_TRIO):
                place = f"at {code.co_filename.removeprefix(_OURS)}:{line} in {code.co_name}"
    except (AttributeError, TypeError):
        # A compiled coroutine, such as pyfuse3's, may not expose its frames.
        return place
    return place


def _queues(fetches: Sequence[FetchQueue]) -> Iterator[str]:
    now = trio.current_time()
    for fetch in fetches:
        flights = fetch.flights()
        yield (
            f"source {fetch.remote.location}: {len(flights)} requests in flight with "
            f"{format_size(sum(flight.size for flight in flights))}, {fetch.readers} readers wait, "
            f"window {format_size(fetch.window.bytes)}, round trip {fetch.window.round_trip * 1000:.1f} ms"
        )
        for flight in flights[:MOST_FLIGHTS]:
            kind = "for a reader" if flight.urgent else "in the background"
            arrived = ", arrived" if flight.arrived.is_set() else ""
            yield f"  {format_size(flight.size)} at {flight.pos} {kind}, for {now - flight.since:.1f} s{arrived}"
