"""A server's connection to the holder of its mount (`holder.py`), and what one server tells the next one.

Owns the messages. Must not know what the values mean, but for `format` and `paused`. Each is one packet of text; its
first word says what it is:

| from the server | |
|---|---|
| `ready` and a descriptor | it has loaded its program, and waits for its turn; the memory is for what it cannot send |
| `keep` and a descriptor | /dev/fuse: from now on the mount outlives the server |
| `set KEY VALUE`, `del KEY` | what the next server has to know |
| `alive` | the event loop turns; every ALIVE_SECONDS, until `serving` |
| `serving` | requests are answered |
| `upgrade` | start the next server |
| `handed` | everything is closed for the next server, and this one ends |
| `over` | the mount has ended in order |
| `failed TEXT` | why it is about to end |
| `notify TEXT` | for the service manager |

| from the holder | |
|---|---|
| `state FORMAT` | the first message: the format of the values that are kept; without one, if there are none yet |
| `mount` | there is no mount yet: make it |
| `take JSON` and two descriptors | /dev/fuse and the values: take the mount over |
| `hand` | the next server is ready: hand the mount over |
| `failed TEXT` | the next server could not start |

A holder serves on under later versions of the servers, so messages are only ever added. The values may change: a server
that cannot read them says so before it is `ready`, so that the one before it serves on.

A packet that was sent is in the kernel, so it arrives even if the server is killed at the next instruction. A holder
that is stopped (Ctrl-Z) reads nothing, and the kernel queues only a few hundred packets. Later ones wait in this
process. They are also in the memory that the holder shares, one a line, where it reads them if this process is killed.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import signal
import socket
from collections import deque
from collections.abc import Mapping

import trio

from qedfs.errors import QedfsError

MESSAGE_BYTES = 1 << 16
FORMAT = "2"  # of the values that this version tells
READABLE = frozenset({"1", FORMAT})  # by this version
WAIT_SECONDS = 30.0  # for a holder that does not read, before a packet is given up
ALIVE_SECONDS = 5.0
ORPHAN_SECONDS = 60.0  # for an event loop to turn after the end of the holder
_PR_SET_PDEATHSIG = 1


class HolderGone(QedfsError):
    """The holder was killed, so no other server follows this one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """A mount that is taken over from another server."""

    fd: int  # /dev/fuse
    values: Mapping[str, str]
    reason: str  # how the other server has ended
    restarts: int  # how many servers have taken this mount over, with this one
    since: float  # when the mount stopped answering, in CLOCK_MONOTONIC
    kinds: Mapping[str, int]  # of all these takeovers, by the constants of `holder.py`


class HolderLink:
    """The connection to the holder, or none: then nothing is sent, and there is never a mount to take over."""

    def __init__(self, fd: int | None = None) -> None:
        self._socket = None if fd is None else socket.socket(fileno=fd)
        self._unsent: deque[tuple[bytes, int | None]] = deque()  # packets, and a descriptor for each that has one
        self._overflow = -1  # the memory for packets that wait
        self._spilled = False  # there are some in it
        self._values: dict[str, str] = {}
        self._gone = False  # the holder was killed
        if self._socket is not None:
            self._socket.set_inheritable(False)

    def __bool__(self) -> bool:
        return self._socket is not None

    def turn(self) -> Taken | None:
        """Wait for our turn. Returns the mount to take over, None if there is none yet. Waits without an event loop.

        Raises:
            HolderGone: the holder was killed.
            QedfsError: what it keeps is of another version of this program.
        """
        if self._socket is None:
            return None
        _wake_after_holder()
        # We are in the background of the terminal. With `stty tostop` the first line of the log would stop us.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        said, _ = _received(self._socket, 0)
        _, _, kept = said.partition(" ")
        if kept and kept not in READABLE:
            raise QedfsError(f"another version of qedfs has left a state of format {kept}, which this one cannot read")
        self._overflow = os.memfd_create("qedfs-unsent")
        self._unsent.append((b"ready", os.dup(self._overflow)))
        self.flush()
        said, descriptors = _received(self._socket, 2)
        verb, _, rest = said.partition(" ")
        self._socket.setblocking(False)
        if verb == "mount":
            self.set("format", FORMAT)
            return None
        if verb != "take" or len(descriptors) != 2:
            raise QedfsError(f"the holder of the mount says {verb}, which this version does not know")
        with open(descriptors[1], "rb") as file:
            file.seek(0)
            self._values = json.loads(file.read())
        self.set("format", FORMAT)
        told = json.loads(rest)
        taken = Taken(
            descriptors[0],
            dict(self._values),
            reason=str(told["reason"]),
            restarts=int(told["restarts"]),
            since=float(self._values.get("paused", told["since"])),
            kinds=dict(told.get("kinds", {})),  # a holder may be older than its servers
        )
        self.drop("paused")
        return taken

    def keep(self, fd: int) -> None:
        """Let the holder keep /dev/fuse."""
        if self._socket is not None:
            self._unsent.append((b"keep", os.dup(fd)))
            self.flush()

    def set(self, key: str, value: str) -> None:
        """Tell the next server. Nothing is sent if the value is what it was."""
        if self._socket is not None and self._values.get(key) != value:
            self._values[key] = value
            self._send(f"set {key} {value}")

    def drop(self, key: str) -> None:
        """Forget a value."""
        if self._values.pop(key, None) is not None:
            self._send(f"del {key}")

    def tell(self, message: str) -> None:
        """Send a message that is only text."""
        self._send(message)

    async def heard(self) -> str:
        """Wait for a message of the holder. Returns "" if the holder has gone; never returns if there is none."""
        if self._socket is None:
            await trio.sleep_forever()
            raise AssertionError
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return self._socket.recv(MESSAGE_BYTES).decode(errors="replace")
            except BlockingIOError:
                continue
            except OSError:
                return ""

    def _send(self, text: str) -> None:
        """Send a packet. It waits in a queue of ours if the holder does not read, which a stopped one does not."""
        if self._socket is not None:
            packet = text.encode(errors="surrogateescape")
            self._unsent.append((packet, None))
            self.flush()
            if self._unsent and self._overflow >= 0:
                self._spilled = True
                os.write(self._overflow, packet + b"\n")

    def flush(self) -> None:
        """Send what waits in our queue, as far as the holder reads."""
        while self._unsent and self._socket is not None:
            text, fd = self._unsent[0]
            try:
                passed = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
                self._socket.sendmsg([text], passed, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except TimeoutError:  # in `finish`: it was stopped
                return
            except OSError:  # which `heard` reports
                self._gone = True
                self._drop_unsent()
                return
            self._unsent.popleft()
            if fd is not None:
                os.close(fd)
            if self._spilled and not self._unsent:
                # Before a later packet is sent: a line that is read after it would bring an old value back.
                self._spilled = False
                os.ftruncate(self._overflow, 0)
                os.lseek(self._overflow, 0, os.SEEK_SET)

    def _drop_unsent(self) -> None:
        for _, fd in self._unsent:
            if fd is not None:  # an open /dev/fuse would keep the mount's connection
                os.close(fd)
        self._unsent.clear()

    def finish(self, message: str) -> bool:
        """Send the last message, and wait for a holder that is slow to read. Returns whether there is one."""
        if self._socket is None or self._gone:
            return False
        self._socket.settimeout(WAIT_SECONDS)
        self._send(message)
        return not self._gone

    def end_if_orphaned(self) -> None:
        """From now on, end this process if it hangs after the end of its holder: nobody else would.

        To be called in the event loop. If that does not turn within ORPHAN_SECONDS, the stacks of all threads are
        logged and the process ends, as if it was killed.
        """
        if self._socket is None:
            return
        holder, token = os.getppid(), trio.lowlevel.current_trio_token()

        def woken(*_: object) -> None:
            if os.getppid() == holder:  # somebody has continued a stopped process
                return
            with contextlib.suppress(trio.RunFinishedError, OSError, ValueError):
                faulthandler.dump_traceback_later(ORPHAN_SECONDS, exit=True)
                token.run_sync_soon(faulthandler.cancel_dump_traceback_later)

        signal.signal(signal.SIGCONT, woken)

    def close(self) -> None:
        """Close our end."""
        if self._socket is not None:
            self._socket.close()
        if self._overflow >= 0:
            os.close(self._overflow)
            self._overflow = -1


def _received(connection: socket.socket, most: int) -> tuple[str, list[int]]:
    """Wait for a message with up to `most` descriptors. Raises HolderGone."""
    with contextlib.suppress(ConnectionError):
        content, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, most)
        if content:
            return content.decode(), descriptors
    raise HolderGone("the holder of the mount was killed before this server had its turn")


def _wake_after_holder() -> None:
    """Let the end of the holder wake this process: a stopped one would not notice it, and the mount would hang.

    The kernel does so for a process group that loses its last parent, but only if it has stopped entirely by then.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)
