"""The tests; shared helpers are imported as `tests.harness.servers` and the like.

Owns where their bytecode is kept. Containers often forbid Python to write any (PYTHONDONTWRITEBYTECODE). Then each
worker of a run rewrites the assertions of all test files, which is two thirds of the processor time of its start, and
each `qedfs` that a test starts compiles the program first. So here it is kept in .venv, beside no source.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if sys.dont_write_bytecode and sys.prefix != sys.base_prefix:
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(Path(sys.prefix, "bytecode"))
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
