"""The only bound on real time that a test may set: it catches a hang, and says nothing of how fast anything is."""

from __future__ import annotations

# Ten times what the slowest single step takes on two busy cores. A test that fails by it has waited for what never
# came; whether something comes in time is tested against its own deadline, on the mock clock.
HANG_SECONDS = 200.0
# The same as the command line takes it.
HANG_OPTION = f"{HANG_SECONDS:g}s"
