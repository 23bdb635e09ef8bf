"""One libcurl easy handle with its request and its callbacks.

Owns the path of the bytes from libcurl into the caller's buffer, and the rule that no byte is stored before the header
has been judged. Must not know pools, redirects, or which errors deserve a retry.

An exchange serves one request at a time, and is reused for the next. If a callback fails, it stores the exception and
aborts the transfer, and `run` raises the exception. pycurl itself would print the exception and lose it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

import pycurl

from qedfs.errors import Reason, Refused, SourceUnreachable
from qedfs.source.credentials import NO_TLS_FILES, TlsFiles
from qedfs.source.http.answer import Answer, parse_answer
from qedfs.source.http.errors import TransferFailed, source_error
from qedfs.source.http.handle import new_handle, show_tls_files
from qedfs.source.http.judge import Part
from qedfs.source.http.multi import Multi, MultiClosed
from qedfs.source.http.target import Target
from qedfs.source.policy import Policy

MAX_HEADER_SIZE = 64 * 1024  # bytes of header lines per request, including interim answers and trailers

_ABORT = -1  # when a callback returns this, libcurl aborts the transfer
_EMPTY = memoryview(b"")

Judge = Callable[[Answer], Part | None]
"""Returns which part of the body is wanted, or None if no body is. Raises an error to refuse the answer."""


class _SocketAddress(Protocol):
    family: int
    socktype: int
    protocol: int
    addr: tuple[str, int]


class Exchange:
    """An easy handle and its current request."""

    def __init__(self, policy: Policy) -> None:
        self.curl = self._new_handle()
        self._policy = policy
        self._tls = NO_TLS_FILES
        self._target: Target | None = None
        self._lines: Sequence[str] = ()
        self._cookies: Sequence[bytes] = ()
        self._opened: socket.socket | None = None
        self._received = 0
        self._takes_cookies = False
        self._prepare(_EMPTY, None, "")

    def _new_handle(self) -> pycurl.Curl:
        curl = new_handle()
        curl.setopt(pycurl.HEADERFUNCTION, self._on_header)
        curl.setopt(pycurl.WRITEFUNCTION, self._on_body)
        curl.setopt(pycurl.OPENSOCKETFUNCTION, self._on_open_socket)
        curl.setopt(pycurl.SOCKOPTFUNCTION, self._on_socket_opened)
        return curl

    def aim(self, target: Target, lines: Sequence[str], cookies: Sequence[bytes] = ()) -> None:
        """Send the next requests to `target` with these header lines. Cheap if no argument changes.

        `cookies`: the `cookies` of the exchange that resolved the target.
        """
        if target is self._target and lines is self._lines and cookies is self._cookies:
            return
        if target.tls != self._tls:
            self._show(target.tls)
        self.curl.setopt(pycurl.URL, target.url)
        self.curl.setopt(pycurl.PROXY, os.fsencode(target.proxy))
        for option, value in ((pycurl.USERNAME, target.user), (pycurl.PASSWORD, target.password)):
            if value is None:
                self.curl.unsetopt(option)
            else:
                self.curl.setopt(option, value.encode())
        self.curl.setopt(pycurl.HTTPHEADER, [line.encode("latin-1") for line in lines])
        if cookies is not self._cookies:
            for line in (b"ALL", *cookies):  # "ALL" drops all that are stored
                self.curl.setopt(pycurl.COOKIELIST, line)
        self._target, self._lines, self._cookies = target, lines, cookies

    def _show(self, tls: TlsFiles) -> None:
        if self._tls.certificate is not None:
            cookies = self.cookies
            self.curl.close()
            self.curl = self._new_handle()
            if self._takes_cookies:
                self.take_cookies()
            for line in cookies:
                self.curl.setopt(pycurl.COOKIELIST, line)
        show_tls_files(self.curl, tls)
        self._tls = tls

    def take_cookies(self) -> None:
        """From now on store the cookies that answers set, and send them to the hosts that RFC 6265 allows."""
        self._takes_cookies = True
        self.curl.setopt(pycurl.COOKIEFILE, "")

    @property
    def cookies(self) -> tuple[bytes, ...]:
        """The stored cookies, as lines for `aim`. They are as secret as passwords."""
        return tuple(self.curl.getinfo_raw(pycurl.INFO_COOKIELIST) or ())

    async def run(
        self, multi: Multi, pos: int, buffer: memoryview, judge: Judge, where: str, *, fresh: bool = False
    ) -> None:
        """Request `len(buffer)` bytes at `pos`. Returns when the buffer is full, or when `judge` wants no body.

        `fresh` forbids the reuse of an open connection, whose address may have been checked under another rule. `where`
        names the source in messages. However the call ends, the buffer is not touched after it.

        Raises:
            QedfsError: whatever `judge` raised; Refused by the policy; otherwise SourceUnreachable or SourceError.
        """
        self.curl.setopt(pycurl.RANGE, f"{pos}-{pos + len(buffer) - 1}")
        self.curl.setopt(pycurl.FRESH_CONNECT, fresh)
        await self._run(multi, buffer, judge, where)

    async def head(self, multi: Multi, judge: Judge, where: str) -> None:
        """Send a HEAD request for the whole file. Raises what `run` raises."""
        self.curl.unsetopt(pycurl.RANGE)
        self.curl.setopt(pycurl.NOBODY, 1)
        try:
            await self._run(multi, _EMPTY, judge, where)
        finally:
            self.curl.setopt(pycurl.HTTPGET, 1)

    async def _run(self, multi: Multi, buffer: memoryview, judge: Judge, where: str) -> None:
        self._prepare(buffer, judge, where)
        try:
            failure = await self._transfer(multi)
        finally:
            self._prepare(_EMPTY, None, "")
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback refers to this frame, and so to the buffer

    @property
    def received(self) -> int:
        """Bytes of bodies received since `take_received`, including those of failed and cancelled transfers."""
        return self._received

    def take_received(self) -> int:
        """Return `received` and reset it to 0."""
        received, self._received = self._received, 0
        return received

    def peer_address(self) -> str | None:
        """Numeric address of the server, or proxy, that answered last; None if unknown."""
        address: str = self.curl.getinfo(pycurl.PRIMARY_IP)
        return address or None

    def close(self) -> None:
        """Free the handle. No request may be running."""
        self.curl.close()

    def _prepare(self, buffer: memoryview, judge: Judge | None, where: str) -> None:
        self._buffer = buffer
        self._filled = 0
        self._judge = judge  # None once the final header is judged
        self._where = where
        self._header: list[bytes] = []
        self._header_size = 0
        self._unwanted = False
        self._before = self._after = 0  # bytes of the body that are still to be skipped before and after the range
        self._error: Exception | None = None
        self._refusal: Refused | None = None

    async def _transfer(self, multi: Multi) -> Exception | None:
        try:
            await multi.perform(self.curl)
        except (TransferFailed, OSError, MultiClosed) as exc:
            return None if self._unwanted else self._explain(exc)
        if self._judge is not None:
            return self._bad("the answer has no complete header")
        if (self._filled != len(self._buffer) or self._after) and not self._unwanted:
            return self._bad(f"the answer ends after {self._filled} of {len(self._buffer)} bytes")
        return None

    def _explain(self, exc: TransferFailed | OSError | MultiClosed) -> Exception:
        cause: Exception = exc if self._error is None else self._error
        error: Exception
        if isinstance(cause, MultiClosed):
            error = SourceUnreachable(f"{self._where}: the source was closed")
        elif isinstance(cause, OSError):
            error = SourceUnreachable(f"{self._where}: {(cause.strerror or 'system error').lower()}")
        elif not isinstance(cause, TransferFailed):
            return cause
        elif self._refusal is not None and cause.code == pycurl.E_COULDNT_CONNECT:
            error = self._refusal
        else:
            os_errno = self.curl.getinfo(pycurl.OS_ERRNO)
            proxy = self._target.proxy_name if self._target is not None else ""
            error = source_error(cause.code, os_errno, self._where, cause.said, proxy=proxy)
        error.__cause__ = cause
        return error

    def _bad(self, what: str) -> SourceUnreachable:
        return SourceUnreachable(f"{self._where}: {what}", reason=Reason.ANSWER)

    def _on_header(self, line: bytes) -> int | None:
        try:
            self._header_size += len(line)
            if self._header_size > MAX_HEADER_SIZE:
                raise self._bad(f"the answer's header is larger than {MAX_HEADER_SIZE} bytes")
            if self._judge is None:
                return None  # a trailer after a chunked body: not used
            if line.strip(b"\r\n"):
                self._header.append(line)
                return None
            return self._end_of_header(self._judge)
        except Exception as exc:
            self._error = exc
            return _ABORT

    def _end_of_header(self, judge: Judge) -> int | None:
        answer = parse_answer(self._header, self._where)
        self._header = []
        if answer.status < 200:
            return None  # an interim answer (RFC 9110, section 15.2); the final one follows
        self._judge = None
        part = judge(answer)
        if part is None:
            self._unwanted = True
            return _ABORT
        self._before, self._after = part.before, part.after
        return None

    def _on_body(self, data: bytes) -> int | None:
        try:
            self._received += len(data)
            if self._before or self._after:
                data = self._wanted(data)
            end = self._filled + len(data)
            if self._judge is not None or end > len(self._buffer):
                raise self._bad("the answer's body is longer than the range")
            self._buffer[self._filled : end] = data
            self._filled = end
        except Exception as exc:
            self._error = exc
            return _ABORT
        return None

    def _wanted(self, data: bytes) -> bytes:
        """The part of `data`, a piece of the whole file, that belongs to the range."""
        skipped = min(self._before, len(data))
        self._before -= skipped
        wanted = data[skipped : skipped + len(self._buffer) - self._filled]
        self._after -= len(data) - skipped - len(wanted)
        if self._after < 0:
            raise self._bad("the answer's body is longer than the file")
        return wanted

    def _on_open_socket(self, _purpose: int, address: _SocketAddress) -> socket.socket | int:
        """Check an address right before libcurl connects to it. If it is refused, libcurl tries the host's next one."""
        try:
            if self._target is not None:
                self._target.check_address(address.addr[0], self._policy)
            self._opened = socket.socket(address.family, address.socktype, address.protocol)
            return self._opened
        except Refused as exc:
            self._refusal = exc
        except Exception as exc:
            self._error = exc
        return int(pycurl.SOCKET_BAD)

    def _on_socket_opened(self, fd: int, _purpose: int) -> int:
        """Close our socket, of which pycurl has given libcurl a duplicate, and set close-on-exec on the duplicate."""
        try:
            if self._opened is not None:
                self._opened.close()
                self._opened = None
            os.set_inheritable(fd, False)
        except Exception as exc:
            self._error = exc
            return int(pycurl.SOCKOPT_ERROR)
        return int(pycurl.SOCKOPT_OK)
