"""What libfuse and fusermount3 say while they mount: they print it to standard error, which a daemon's user never sees.

Owns descriptor 2 for the length of a block. Must not know what the words mean.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

MOST_BYTES = 4096
_STDERR = 2


@contextlib.contextmanager
def caught_words() -> Iterator[list[str]]:
    """Catch the lines that are printed to descriptor 2 in the block. They are in the list after the block.

    Log lines of other threads are among them. If no descriptor is left to catch with, the lines go where they always
    went, and the list stays empty.
    """
    lines: list[str] = []
    with contextlib.ExitStack() as stack:
        try:
            kept = os.dup(_STDERR)
            stack.callback(os.close, kept)
            catch = os.memfd_create("libfuse-words")
            stack.callback(os.close, catch)
        except OSError:
            yield lines
            return
        sys.stderr.flush()
        os.dup2(catch, _STDERR)  # inherited by fusermount3
        try:
            yield lines
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os.dup2(kept, _STDERR)
            words = os.pread(catch, MOST_BYTES, 0).decode(errors="replace")
            lines += [line.strip() for line in words.splitlines() if line.strip()]
