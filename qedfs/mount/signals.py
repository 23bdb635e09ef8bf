"""What signals do to a mount: stop in order, stop at once, or write into the log what it is doing.

Owns the handlers and the text of the dump. Must not know how a mount stops.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import trio

import qedfs
from qedfs.fetch.queue import FetchQueue
from qedfs.units import format_size

log = logging.getLogger(__name__)

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOST_FLIGHTS = 32  # of one queue in a dump

_OURS = os.path.dirname(os.path.dirname(qedfs.__file__)) + os.sep
_TRIO = os.path.dirname(trio.__file__) + os.sep


async def stop_on_signal(
    stop: Callable[[], None], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Call `stop` at the first signal to stop. From then on each of them ends the process at once.

    Started once it notices them: a signal that comes before ends the process, which must not have mounted yet.

    To be run until the overlays are closed: a service manager sends SIGTERM also to a mount that was unmounted a
    moment ago and still flushes.
    """
    with trio.open_signal_receiver(*STOPPING) as signals:
        task_status.started()
        number = await anext(signals)
        log.info("stopping on %s; a second signal stops at once", signal.Signals(number).name)
        stop()
    # The kernel's own action, which also works while the event loop stands: a shell reports it as 143, 130, 129.
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)


async def dump_on_signal(fetches: Callable[[], Sequence[FetchQueue]]) -> None:
    """At each SIGUSR1, log all tasks and the fetch queues."""
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async for _ in signals:
            log.info("%s", "\n  ".join(["asked by SIGUSR1:", *_tasks(), *_queues(fetches())]))


def _tasks() -> Iterator[str]:
    """One line per place where tasks wait: their name, their number if there are several, where."""
    root = trio.lowlevel.current_root_task()
    found = Counter((task.name, _place(task)) for task in _below(root)) if root is not None else Counter()
    for (name, place), count in sorted(found.items()):
        yield f"task {name}{f' (x {count})' if count > 1 else ''} {place}"


def _below(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    """A task and all that it has started, directly or not. With a stack of its own: flights nest without bound."""
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
        # A coroutine that is not Python's own (pyfuse3 is compiled) need not tell where it is.
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
