"""One client: greeting, negotiation, requests in order, events behind it.

Owns the conversation over one connection. Must not know what the commands do.

Two tasks share the connection: the one that answers, and the one that sends events. A lock keeps their lines whole.
Events begin only when the answer to `qmp_capabilities` has been sent: the `qemu.qmp` library takes the very next line
after its request for that answer.

A client may hang up without waiting for the answer: what it has sent until then is run all the same.
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
MAX_EVENTS = 4096  # not yet taken by the client; one that lags so far behind has stopped to read
FLUSH_SECONDS = 0.5  # for the last events of a mount that stops

Execute = Callable[[str, Arguments, "QmpSession"], Awaitable[Any]]

negotiation: Commands[QmpSession] = Commands()


class QmpSession:
    """A client that is connected. `execute` runs a command once the negotiation is over."""

    def __init__(self, stream: trio.SocketStream, execute: Execute) -> None:
        self._stream = stream
        self._execute = execute
        self._sending = trio.Lock()
        self._events: deque[bytes] = deque()
        self._event_came = trio.Event()
        self._scope = trio.CancelScope()
        self._deaf = False  # its client takes no more lines
        self.negotiated = False
        self.busy = False  # a command of its client is being run
        self.heard_at = trio.current_time()  # when its client was last heard of or answered
        self.after_reply: Callable[[], None] | None = None  # called once the answer is out; for a command that ends us

    async def run(self, greeting: object) -> None:
        """Talk until the client hangs up. Errors of the connection end it, silently."""
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
        """Hang up, without the events that are still to be sent."""
        self._events.clear()
        self._scope.cancel()

    def post(self, event: bytes) -> None:
        """Send an event, soon; a client that does not read is dropped."""
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
                    # Also if we are dropped meanwhile, by a client that does not read: the command has been accepted.
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
            # A fault of ours in one command must not end the mount.
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
            # Taken off the queue only when it is out: a send that is cancelled before it began is made up in `_flush`.
            await self._send(self._events[0])
            if self._events:  # `drop` may have cleared them meanwhile
                self._events.popleft()

    async def _flush(self) -> None:
        """Send what is left, to a client that takes it, and hang up."""
        try:
            with trio.CancelScope(shield=True), trio.move_on_after(FLUSH_SECONDS):
                await self._send_waiting()
        finally:
            await trio.aclose_forcefully(self._stream)

    async def _send(self, line: bytes) -> None:
        """Send a line, or nothing to a client that has hung up: commands of its own may still wait to be read."""
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
