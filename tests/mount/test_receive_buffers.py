"""libfuse's buffers for requests are touched when they are allocated, so that a kill cannot fail the copy into them."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from qedfs.mount import library_memory, receive_buffers

# In a process of its own, as libfuse's pointer stays changed.
PROGRAM = """
import ctypes, mmap
import pyfuse3
from qedfs.mount import receive_buffers
library = ctypes.PyDLL(None)
pointer = receive_buffers._pointer_to_malloc()
word = ctypes.c_void_p.from_address(pointer.place)
size = 32 << 20  # so large that it is a mapping of its own, of which the kernel has allocated nothing yet

def resident():
    library.malloc_trim(0)
    allocate = receive_buffers._MALLOC(word.value)
    block = allocate(size)
    start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = (size - mmap.PAGESIZE) // mmap.PAGESIZE
    found = (ctypes.c_ubyte * pages)()
    assert library.mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * mmap.PAGESIZE), found) == 0
    library.free(ctypes.c_void_p(block))
    return sum(byte & 1 for byte in found), pages

before, pages = resident()
assert receive_buffers.touch_receive_buffers()
after, _ = resident()
print(before < pages / 100, after == pages)
"""


def test_a_buffer_is_in_memory_as_soon_as_it_is_allocated() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.stdout == "True True\n", done.stderr


def test_an_interpreter_with_a_place_of_its_own_for_malloc_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's has, which is not position-independent."""
    expected = receive_buffers._pointer_to_malloc()

    def address_of(library: ctypes.PyDLL, function: str) -> int:
        return 1 << 62 if library._name is None else library_memory.address_of(library, function)

    monkeypatch.setattr(receive_buffers, "address_of", address_of)
    assert receive_buffers._pointer_to_malloc() == expected


def test_without_the_pointer_it_says_what_may_happen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, expect_log: object
) -> None:
    monkeypatch.setattr(receive_buffers, "memory_of", lambda _: [])
    assert not receive_buffers.touch_receive_buffers()
    assert "a crash may fail the write that is being received: libfuse has 0 pointers to malloc" in caplog.text
