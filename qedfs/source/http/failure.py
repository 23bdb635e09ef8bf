"""What libcurl's result codes mean for us: the one place where they become errors of qedfs.

Owns the wording and the split between "another try may do better" and "never". Must not use libcurl's own error
text: it can hold the URL, and with it a password or a signature.
"""

from __future__ import annotations

import os

import pycurl

from qedfs.errors import SourceError, SourceUnreachable

_PERMANENT = {
    pycurl.E_URL_MALFORMAT: "libcurl does not accept the URL",
    pycurl.E_PEER_FAILED_VERIFICATION: "the server's TLS certificate is not trusted or is for another name",
    pycurl.E_SSL_CACERT_BADFILE: "the file of trusted CA certificates cannot be read (see SSL_CERT_FILE)",
}
_TRANSIENT = {
    pycurl.E_COULDNT_RESOLVE_PROXY: "the proxy's name does not resolve",
    pycurl.E_COULDNT_RESOLVE_HOST: "the host name does not resolve",
    pycurl.E_COULDNT_CONNECT: "cannot connect",
    pycurl.E_PROXY: "the proxy refuses the connection",
    pycurl.E_SSL_CONNECT_ERROR: "the TLS handshake failed",
    pycurl.E_OPERATION_TIMEDOUT: "no answer, or too slow a one, within the time allowed",
    pycurl.E_PARTIAL_FILE: "the answer was cut short",
    pycurl.E_GOT_NOTHING: "the connection was closed without an answer",
    pycurl.E_SEND_ERROR: "the connection broke while the request was sent",
    pycurl.E_RECV_ERROR: "the connection broke",
    pycurl.E_UNSUPPORTED_PROTOCOL: "the answer is not HTTP",
    pycurl.E_HTTP_RETURNED_ERROR: "the answer is not usable",
    pycurl.E_WRITE_ERROR: "the answer is garbled",
    pycurl.E_FTP_WEIRD_SERVER_REPLY: "the answer is garbled",
}


class TransferFailed(Exception):  # noqa: N818  -- an event inside this package, not an error that a user meets
    """A transfer ended with libcurl's result `code` (CURLE_*)."""

    def __init__(self, code: int) -> None:
        super().__init__(f"libcurl result {code}")
        self.code = code


def source_error(code: int, os_errno: int, where: str) -> SourceError:
    """The error for a transfer that ended with `code`; `os_errno` is that of the system call at fault, or 0."""
    if code in _PERMANENT:
        return SourceError(f"{where}: {_PERMANENT[code]}")
    what = _TRANSIENT.get(code, f"the transfer failed (libcurl result {code})")
    if os_errno:
        what = f"{what} ({os.strerror(os_errno).lower()})"
    return SourceUnreachable(f"{where}: {what}")
