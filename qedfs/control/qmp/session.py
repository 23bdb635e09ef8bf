"""One connected QMP client: greeting, negotiation, requests in order, events.

Owns the conversation over one connection. Must not know what the commands do.

Two tasks write to the connection: one sends replies, the other sends events. A lock keeps their lines from mixing.
Events start only after the reply to `qmp_capabilities` has been sent, because the `qemu.qmp` library takes the next
line after its request for that reply.

A client may close the connection without waiting for replies. The commands that it has sent run all the same.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from qedfs.control.qmp.command import Arg, Arguments, Commands, parse_request
from qedfs.control.qmp.errors import CommandNotFound, QmpError
from qedfs.control.qmp.wire import Reader, WireError, encode
from qedfs.errors import QedfsError

log = logging.getLogger(__name__)

RECEIVE_BYTES = 65536
MAX_EVENTS = 4096  # queued for one client; a client with so many unread events has stopped reading
FLUSH_SECONDS = 0.5  # to send the last events when the mount stops

Execute = Callable[[str, Arguments, "QmpSession"], Awaitable[Any]]

negotiation: Commands[QmpSession] = Commands()


class QmpSession:
    """The server's side of one connection. `execute` runs a command after the negotiation."""

    def __init__(self, stream: trio.SocketStream, execute: Execute) -> None:
        self._stream = stream
        self._execute = execute
        self._sending = trio.Lock()
        self._events: deque[bytes] = deque()
        self._event_came = trio.Event()
        self._scope = trio.CancelScope()
        self._deaf = False  # the client has closed its end and receives nothing more
        self.negotiated = False
        self.busy = False  # a command of this client is running
        self.heard_at = trio.current_time()  # when the client last connected or got a reply
        # Called once, after the reply to the current command: `quit` ends the mount, but its reply must be sent first.
        self.after_reply: Callable[[], None] | None = None

    async def run(self, greeting: object) -> None:
        """Serve the client until it closes the connection. An error of the connection ends the session silently."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send_events)
                    await self._send(encode(greeting))
                    await self._answer()
                    nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await self._flush()

    def drop(self) -> None:
        """Close the connection and discard the queued events."""
        self._events.clear()
        self._scope.cancel()

    def post(self, event: bytes) -> None:
        """Queue an event. A client that does not read is dropped."""
        if not self.negotiated:
            return
        if len(self._events) >= MAX_EVENTS:
            log.info("a control client does not read its events, it is dropped")
            self._scope.cancel()
            return
        self._events.append(event)
        self._event_came.set()

    async def _answer(self) -> None:
        reader = Reader()
        while data := await self._stream.receive_some(RECEIVE_BYTES):
            for message in reader.feed(data):
                self.busy = True
                answer = await self._reply(message)
                self.busy, self.heard_at = False, trio.current_time()
                try:
                    await self._send(encode(answer))
                finally:
                    # Even if the session was dropped meanwhile: the command has been accepted.
                    if self.after_reply is not None:
                        after, self.after_reply = self.after_reply, None
                        after()

    async def _reply(self, message: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever a client sends
        echo = {"id": message["id"]} if isinstance(message, dict) and "id" in message else {}
        try:
            if isinstance(message, WireError):
                raise QmpError(str(message))
            name, arguments = parse_request(message)
            result = await self._dispatch(name, arguments)
        except QmpError as exc:
            error: dict[str, Any] = {"class": exc.error_class, "desc": exc.desc}
        except QedfsError as exc:
            error = {"class": QmpError.error_class, "desc": str(exc), "x-qedfs-exit-code": exc.exit_code}
        except Exception:
            # A bug in one command must not end the mount.
            log.exception("a control command failed")
            error = {"class": QmpError.error_class, "desc": "internal error, see the log"}
        else:
            return {"return": result, **echo}
        return {**echo, "error": error}

    async def _dispatch(self, name: str, arguments: Arguments) -> Any:  # noqa: ANN401 - what the command returns
        if name == "qmp_capabilities":
            command = negotiation[name]
            if self.negotiated:
                raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
            command.check(arguments)
            return await command.handler(self, arguments)
        if not self.negotiated:
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        return await self._execute(name, arguments, self)

    async def _send_events(self) -> None:
        while True:
            await self._event_came.wait()
            self._event_came = trio.Event()
            await self._send_waiting()

    async def _send_waiting(self) -> None:
        while self._events:
            # Removed from the queue only after it was sent: if this send is cancelled, `_flush` sends the event.
            await self._send(self._events[0])
            if self._events:  # `drop` may have cleared them meanwhile
                self._events.popleft()

    async def _flush(self) -> None:
        """Send the remaining events to a client that still reads, and close the connection."""
        try:
            with trio.CancelScope(shield=True), trio.move_on_after(FLUSH_SECONDS):
                await self._send_waiting()
        finally:
            await trio.aclose_forcefully(self._stream)

    async def _send(self, line: bytes) -> None:
        """Send a line. After the client has closed its end, do nothing: commands may still wait in the socket."""
        async with self._sending:
            if self._deaf:
                return
            try:
                await self._stream.send_all(line)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._deaf = True


@negotiation("qmp_capabilities", Arg("enable", "array", optional=True))
async def _qmp_capabilities(session: QmpSession, arguments: Arguments) -> dict[str, Any]:
    wanted = [str(name) for name in arguments.get("enable", [])]
    if wanted:
        raise QmpError(f"Capability {', '.join(wanted)} not available")

    def begin() -> None:
        session.negotiated = True

    session.after_reply = begin
    return {}
