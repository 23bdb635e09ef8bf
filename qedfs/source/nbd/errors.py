"""Translates the failures of an NBD connection into errors of qedfs.

Owns the wording, and the choice between transient (SourceUnreachable) and permanent errors (SourceError). Must not know
whether a request is tried again (`source/retrying.py`). Every message is one line that begins with the redacted
location.
"""

from __future__ import annotations

import os
import socket
import ssl

import trio

from qedfs.errors import Reason, SourceError, SourceUnreachable
from qedfs.source.ca_files import with_advice
from qedfs.source.nbd.protocol import Refusal, Violation, printable
from qedfs.source.tls_alerts import Said, explain_alert
from qedfs.source.url import Location


class EndedUnderTls(Exception):
    """The server hung up between the start of the TLS handshake and the end of the NBD handshake.

    Never leaves this package.
    """


def is_end(exc: Exception) -> bool:
    """Whether the exception only means that the peer hung up."""
    cause = exc.__cause__ if isinstance(exc, trio.BrokenResourceError) else exc
    return isinstance(cause, (EOFError, ssl.SSLEOFError, ConnectionError))


def opening_fault(location: Location, exc: Exception) -> SourceError:
    """Translate the failure of a connection attempt or handshake. A protocol violation is permanent here."""
    certificate = _certificate_fault(exc)
    if certificate is not None:
        return SourceError(f"{location}: the server's certificate is not trusted: {with_advice(certificate)}")
    alert = _alert(exc)
    if alert is not None:
        text = f"{location}: {alert.words}"
        return SourceError(text) if alert.lasting else SourceUnreachable(text, reason=Reason.CONNECT)
    if isinstance(exc, EndedUnderTls):
        # nbdkit and QEMU use GnuTLS, verify our certificate after the TLS handshake, and hang up without an alert.
        words = "the server closed the connection at the TLS handshake; it may want a client certificate"
        text = f"{location}: {words} or a pre-shared key that it knows (see --credentials)"
        return SourceUnreachable(text, reason=Reason.CONNECT)
    if isinstance(exc, Violation):
        return SourceError(f"{location}: {exc}")
    if isinstance(exc, Refusal):
        return reply_fault(location, exc)
    kind = Reason.TIMEOUT if isinstance(exc, trio.TooSlowError) else Reason.CONNECT
    what = _no_socket(location, exc) or f"cannot connect: {reason(exc)}"
    return SourceUnreachable(f"{location}: {what}", reason=kind)


def reply_fault(location: Location, exc: Refusal) -> SourceError:
    """Translate a well-formed error reply to one request."""
    if exc.transient:
        return SourceUnreachable(f"{location}: {exc}", reason=Reason.SERVER)
    return SourceError(f"{location}: {exc}")


def dropped(location: Location, why: str, kind: Reason = Reason.CUT) -> SourceUnreachable:
    """The error for a request whose connection was dropped."""
    return SourceUnreachable(f"{location}: connection dropped: {why}", reason=kind)


def lost(location: Location) -> SourceUnreachable:
    """The error for a request that was not answered although later requests were."""
    return SourceUnreachable(f"{location}: a reply got lost", reason=Reason.TIMEOUT)


def reason(exc: Exception) -> str:
    """Why a connection ended, in a few words."""
    if isinstance(exc, trio.TooSlowError):
        return "timed out"
    if isinstance(exc, EOFError):
        return "the server closed the connection"
    if isinstance(exc, socket.gaierror):
        return f"its name cannot be resolved: {exc.strerror}"
    if isinstance(exc, trio.BrokenResourceError) and exc.__cause__ is not None:
        return f"{type(exc.__cause__).__name__}: {printable(str(exc.__cause__).encode())}"
    if isinstance(exc, OSError) and exc.errno is not None:
        return os.strerror(exc.errno)
    return str(exc) if isinstance(exc, Violation) else f"{type(exc).__name__}: {printable(str(exc).encode())}"


def _no_socket(location: Location, exc: Exception) -> str | None:
    """What is wrong with the path of a Unix socket; None if something else failed."""
    if location.path is None:
        return None
    if isinstance(exc, FileNotFoundError):
        return f"there is no socket {location.path}; is the server running?"
    if isinstance(exc, ConnectionRefusedError):
        return f"nobody listens at the socket {location.path}; is the server running?"
    return None


def _alert(exc: Exception) -> Said | None:
    """What the server objected to in the TLS handshake; None if it sent no alert that we know."""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and (said := explain_alert(cause.reason or "")):
            return said
        cause = cause.__cause__
    return None


def _certificate_fault(exc: Exception) -> str | None:
    """Why the server's certificate was rejected; None if something else failed."""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return printable(cause.verify_message.encode())
        cause = cause.__cause__
    return None
