"""From the name of a host to its addresses, off the event loop.

Owns the threads that a silent name server may keep: the system's resolver gives up after half a minute with its
defaults, however soon whoever asked has. They take their place from nobody but those who ask for the same name. (Over
HTTP, libcurl looks names up by itself, in threads of each source's own.)
"""

from __future__ import annotations

import socket

from qedfs.source.threads import in_own_thread

THREADS = 2  # for each name: one more than hangs

Address = tuple[socket.AddressFamily, tuple[str | int, ...] | tuple[int, bytes]]


async def addresses(host: str, port: int) -> list[Address]:
    """The addresses of a host, the best ones first. OSError: it has none, or nobody knows now."""
    try:
        return _look_up(host, port, socket.AI_NUMERICHOST)  # what is no name needs no thread
    except socket.gaierror:
        return await in_own_thread(f"host {host}", lambda: _look_up(host, port), threads=THREADS)


def _look_up(host: str, port: int, flags: int = 0) -> list[Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _, _, _, address in found]
