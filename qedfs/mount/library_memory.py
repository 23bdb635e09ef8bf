"""Pointers in the memory of loaded libraries: where they are, and how they are changed.

Owns the protection of their pages. Must not know what a pointer is for.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Pointer(NamedTuple):
    """A place in memory that has the address of a function."""

    place: int
    writable: bool  # or in a part that the loader has made read-only after it had resolved the pointers (RELRO)
    function: str


def memory_of(path: str) -> list[tuple[int, int, bool]]:
    """The data of a loaded library in the memory of this process: (start, end, writable). Empty if it is not loaded."""
    regions = []
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5] == path and fields[1].startswith("r") and "x" not in fields[1]:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            regions.append((start, end, "w" in fields[1]))
    return regions


def address_of(library: ctypes.PyDLL, function: str) -> int:
    """The address of a function."""
    return ctypes.cast(getattr(library, function), ctypes.c_void_p).value or 0


@contextlib.contextmanager
def replaced(pointer: Pointer, value: int) -> Iterator[None]:
    """Set a pointer while the context is open."""
    word = ctypes.c_void_p.from_address(pointer.place)
    before = word.value
    with made_writable(pointer):
        word.value = value
        try:
            yield
        finally:
            word.value = before


@contextlib.contextmanager
def made_writable(pointer: Pointer) -> Iterator[None]:
    """Let a pointer be set while the context is open."""
    if pointer.writable:
        yield
        return
    page = pointer.place - pointer.place % mmap.PAGESIZE
    _protect(page, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        yield
    finally:
        _protect(page, mmap.PROT_READ)


def _protect(page: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), protection):
        number = ctypes.get_errno()
        raise OSError(number, f"mprotect: {os.strerror(number)}")
