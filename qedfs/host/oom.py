"""Lets the kernel end this process when memory runs out, where the process that started it is protected from that.

Owns the score of a server in oom_score_adj(5). A unit protects its main process, the holder, which is small. Its
servers inherit that, but they are what may take all memory, and another one takes over from a server that was ended.

Imports nothing of the project.
"""

from __future__ import annotations

from pathlib import Path

SCORE = Path("/proc/self/oom_score_adj")
NEVER = -1000
SELDOM = -500  # as if it took half of the machine less than it does


def stay_killable(score: Path = SCORE) -> None:
    """Raise a score of "never" to "seldom". Any other one stays: that is the choice of whoever started us.

    A kernel that hides the score, or refuses, leaves it as it is.
    """
    try:
        if int(score.read_text()) == NEVER:
            score.write_text(f"{SELDOM}\n")
    except (OSError, ValueError):
        return
