"""Pointers in loaded libraries: found, replaced for a while, and protected again."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from qedfs.mount import library_memory


def test_a_library_that_is_not_loaded_has_no_memory() -> None:
    assert library_memory.memory_of("/nowhere.so") == []


def test_a_pointer_in_read_only_memory_is_replaced_and_protected_again() -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    word = ctypes.c_void_p.from_buffer(memory)
    page = ctypes.addressof(word)
    library_memory._protect(page, mmap.PROT_READ)
    pointer = library_memory.Pointer(page, writable=False, function="")
    with library_memory.replaced(pointer, 7):
        assert word.value == 7
    assert not word.value
    assert any(
        "r--" in line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(f"{page:x}-")
    )
    library_memory._protect(page, mmap.PROT_READ | mmap.PROT_WRITE)
    del word
    memory.close()
