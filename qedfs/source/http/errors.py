"""Translates libcurl's result codes into errors of qedfs.

Owns the wording, and the distinction between transient and permanent failures. Must not pass on libcurl's own error
text, which may contain the URL and with it a password or a signature. The text is only searched for known phrases.
"""

from __future__ import annotations

import os
import re

import pycurl

from qedfs.errors import Reason, SourceError, SourceUnreachable
from qedfs.source.ca_files import with_advice
from qedfs.source.tls_alerts import Said, explain_alert

_E_PROXY = 97  # CURLE_PROXY; pycurl has no name for it

_PERMANENT = {
    pycurl.E_URL_MALFORMAT: "libcurl does not accept the URL",
    pycurl.E_PEER_FAILED_VERIFICATION: "the server's TLS certificate is not trusted or is for another name",
    pycurl.E_SSL_CACERT_BADFILE: "the file of CA certificates cannot be read (see CURL_CA_BUNDLE, SSL_CERT_FILE)",
}
_TRANSIENT = {
    pycurl.E_FAILED_INIT: (Reason.OTHER, "libcurl could not run the transfer"),
    pycurl.E_COULDNT_RESOLVE_PROXY: (Reason.CONNECT, "the proxy's name does not resolve"),
    pycurl.E_COULDNT_RESOLVE_HOST: (Reason.CONNECT, "the host name does not resolve"),
    pycurl.E_COULDNT_CONNECT: (Reason.CONNECT, "cannot connect"),
    _E_PROXY: (Reason.CONNECT, "the proxy refuses the connection"),
    pycurl.E_SSL_CONNECT_ERROR: (Reason.CONNECT, "the TLS handshake failed; is it an https server at all?"),
    pycurl.E_OPERATION_TIMEDOUT: (Reason.TIMEOUT, "no answer, or too slow an answer, within the time limit"),
    pycurl.E_PARTIAL_FILE: (Reason.CUT, "the answer was cut short"),
    pycurl.E_GOT_NOTHING: (Reason.CUT, "the connection was closed without an answer"),
    pycurl.E_SEND_ERROR: (Reason.CUT, "the connection broke while the request was sent"),
    pycurl.E_RECV_ERROR: (Reason.CUT, "the connection broke"),
    pycurl.E_UNSUPPORTED_PROTOCOL: (Reason.ANSWER, "the answer is not HTTP"),
    pycurl.E_WRITE_ERROR: (Reason.ANSWER, "the answer is garbled"),
    pycurl.E_FTP_WEIRD_SERVER_REPLY: (Reason.ANSWER, "the answer is garbled"),
}
# The group matches the fixed texts of X509_verify_cert_error_string(3).
_VERIFY_RESULT = re.compile(r"verify result: ([a-zA-Z ,'-]+) \(\d+\)")
# With a proxy, these are about the connection to it.
_AT_PROXY = {
    pycurl.E_COULDNT_CONNECT: "cannot connect to the proxy {}",
    pycurl.E_COULDNT_RESOLVE_PROXY: "the name of the proxy {} does not resolve",
    _E_PROXY: "the proxy {} refuses the connection",
}
_SYSTEM_CALLS = frozenset({pycurl.E_COULDNT_CONNECT, pycurl.E_SEND_ERROR, pycurl.E_RECV_ERROR})


class TransferFailed(Exception):
    """A transfer ended with libcurl's result `code` (CURLE_*). `said`: what its error text revealed.

    Never leaves this package.
    """

    def __init__(self, code: int, said: Said | None = None) -> None:
        super().__init__(f"libcurl result {code}")
        self.code = code
        self.said = said


def said(text: str) -> Said | None:
    """What libcurl's error text reveals beyond the result code, in our words; None if it has no known phrase."""
    if "alert" in text:
        return explain_alert(text)
    if "client certificate" in text or "private key" in text:
        return Said(
            "the client certificate or its key cannot be used; it must be PEM, and the key without a passphrase"
        )
    if "certificate subject name" in text or "does not match" in text:
        return Said(f"{_PERMANENT[pycurl.E_PEER_FAILED_VERIFICATION]}: it does not contain this name")
    found = _VERIFY_RESULT.search(text)
    if found is not None:
        return Said(f"{_PERMANENT[pycurl.E_PEER_FAILED_VERIFICATION]}: {with_advice(found[1])}")
    return None


def source_error(code: int, os_errno: int, where: str, told: Said | None = None, *, proxy: str = "") -> SourceError:
    """The error for a transfer that ended with libcurl's result `code`.

    `os_errno`: the errno of libcurl's last failed system call, or 0. `where`: the redacted location, which begins the
    message. `told`: the result of `said` for the error text. `proxy`: the name of the proxy that is used, if any.
    """
    if told is not None and told.lasting:
        return SourceError(f"{where}: {told.words}")
    if told is not None:
        return SourceUnreachable(f"{where}: {told.words}", reason=Reason.CONNECT)
    if code in _PERMANENT:
        return SourceError(f"{where}: {_PERMANENT[code]}")
    if proxy and code in _AT_PROXY:
        return _proxy_error(code, os_errno, where, proxy)
    reason, what = _TRANSIENT.get(code, (Reason.OTHER, f"the transfer failed (libcurl result {code})"))
    if os_errno and code in _SYSTEM_CALLS:
        what = f"{what} ({os.strerror(os_errno).lower()})"
    return SourceUnreachable(f"{where}: {what}", reason=reason)


def _proxy_error(code: int, os_errno: int, where: str, proxy: str) -> SourceUnreachable:
    what = _AT_PROXY[code].format(proxy)
    if os_errno and code in _SYSTEM_CALLS:
        what = f"{what} ({os.strerror(os_errno).lower()})"
    advice = "see the variables http_proxy, https_proxy and all_proxy; no_proxy names hosts that need none"
    return SourceUnreachable(f"{where}: {what}; {advice}", reason=Reason.CONNECT)
