"""Name resolution off the event loop.

Owns the threads, which a silent name server may block: with its defaults, the system's resolver gives up after half a
minute, even if the caller has given up long before. Each host name has its own thread limit, so a blocked look-up
affects no other name. (For HTTP, libcurl resolves names itself, in threads that belong to one source.)
"""

from __future__ import annotations

import socket

from qedfs.source.threads import in_own_thread

THREADS = 2  # per name: one may hang, and another try is still possible

Address = tuple[socket.AddressFamily, tuple[str | int, ...] | tuple[int, bytes]]


async def addresses(host: str, port: int) -> list[Address]:
    """The addresses of a host, the preferred ones first. Raises OSError if it has none, or the look-up fails."""
    try:
        return _look_up(host, port, socket.AI_NUMERICHOST)  # a numeric address needs no thread
    except socket.gaierror:
        return await in_own_thread(f"host {host}", lambda: _look_up(host, port), threads=THREADS)


def _look_up(host: str, port: int, flags: int = 0) -> list[Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _, _, _, address in found]
