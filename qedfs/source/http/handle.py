"""Makes libcurl easy handles, with all the options that are the same for every request.

Owns the allowed protocols, TLS trust and time limits. Must not know a particular request.
"""

from __future__ import annotations

import contextlib
import os

import pycurl

from qedfs import __version__
from qedfs.source.ca_files import find_ca_file, find_ca_folder
from qedfs.source.credentials import NO_TLS_FILES, TlsFiles

CONNECT_SECONDS = 10  # name resolution, TCP and TLS together
STALL_SECONDS = 10  # a transfer that stays below STALL_BYTES_PER_SECOND for this long is aborted
STALL_BYTES_PER_SECOND = 1024

# Bytes per receive. libcurl cannot receive into a buffer of ours: it passes pieces of its own to a callback, at most
# 16 KiB each (CURL_MAX_WRITE_SIZE, fixed when libcurl is built). pycurl makes a bytes object of each, which we copy. Up
# to this size, buffer and pieces stay in the core's cache, so only the kernel's copy and our last one reach memory.
# With 256 KiB there are half as many receives, but no less processor time.
RECEIVE_BUFFER_SIZE = 64 * 1024

_SUPPRESS_CONNECT_HEADERS = 265  # CURLOPT_SUPPRESS_CONNECT_HEADERS; pycurl has no name for it
_QUICK_EXIT = 322  # CURLOPT_QUICK_EXIT; likewise


def new_handle() -> pycurl.Curl:
    """Make an easy handle for range requests over http and https.

    It only speaks HTTP/1.1, where each request in flight has its own connection. On the single connection of HTTP/2 the
    bytes of an urgent answer would queue in the socket behind those of background reads.

    libcurl does not follow redirects, because it does not know the mounting user's policy. User name and password are
    sent as Basic, because other schemes first need a request that the server refuses.
    """
    curl = pycurl.Curl()
    for option, value in _FIXED_OPTIONS.items():
        curl.setopt(option, value)
    curl.setopt(pycurl.CONNECTTIMEOUT, CONNECT_SECONDS)
    curl.setopt(pycurl.LOW_SPEED_LIMIT, STALL_BYTES_PER_SECOND)
    curl.setopt(pycurl.LOW_SPEED_TIME, STALL_SECONDS)
    with contextlib.suppress(pycurl.error):  # new in libcurl 7.87
        # Without it, cancelling a transfer waits for the end of its name resolution.
        curl.setopt(_QUICK_EXIT, 1)
    ca_file = find_ca_file(os.environ)
    if ca_file is not None:
        curl.setopt(pycurl.PROXY_CAINFO, ca_file)
    show_tls_files(curl, NO_TLS_FILES)
    return curl


def show_tls_files(curl: pycurl.Curl, files: TlsFiles) -> None:
    """Use the CA and client certificates of one server. Without a CA file, trust the usual CAs (`ca_files.py`).

    pycurl cannot unset a client certificate again, so a server without one needs another handle.
    """
    ca_file = files.ca or find_ca_file(os.environ)
    ca_folder = None if files.ca else find_ca_folder(os.environ)
    for option, path in ((pycurl.CAINFO, ca_file), (pycurl.CAPATH, ca_folder)):
        if path is None:
            curl.unsetopt(option)
        else:
            curl.setopt(option, os.fsencode(path))
    if files.certificate is not None:
        curl.setopt(pycurl.SSLCERT, os.fsencode(files.certificate))
        curl.setopt(pycurl.SSLKEY, os.fsencode(files.key or files.certificate))


_FIXED_OPTIONS = {
    pycurl.PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
    pycurl.REDIR_PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
    pycurl.FOLLOWLOCATION: 0,
    pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
    pycurl.HTTPGET: 1,
    pycurl.HTTPAUTH: pycurl.HTTPAUTH_BASIC,
    pycurl.NETRC: pycurl.NETRC_IGNORED,  # `login.py` reads it
    pycurl.HTTP_CONTENT_DECODING: 0,
    _SUPPRESS_CONNECT_HEADERS: 1,
    pycurl.PATH_AS_IS: 1,  # the path that is sent must be the path that the policy checked
    pycurl.SSL_VERIFYPEER: 1,
    pycurl.SSL_VERIFYHOST: 2,
    pycurl.KEYPASSWD: "",  # otherwise OpenSSL prompts for the passphrase of a key on the terminal
    pycurl.BUFFERSIZE: RECEIVE_BUFFER_SIZE,
    pycurl.NOSIGNAL: 1,  # libcurl must not change the process's handling of SIGALRM and SIGPIPE
    pycurl.NOPROGRESS: 1,
    pycurl.TCP_KEEPALIVE: 1,
    pycurl.USERAGENT: f"qedfs/{__version__}",
}
