"""The barriers and ordering rules of the overlay, one by one, and how to take each of them away.

Owns the table. A mutant replaces a piece of a function's source while the context is open; a piece that is no longer
there fails loudly, so the table cannot fall behind the code.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Mutant(NamedTuple):
    """One rule and the code without it."""

    rule: str
    function: str  # module:function or module:Class.method, below qedfs.overlay
    old: str
    new: str
    needs: str = ""  # the flag of a scenario without which the rule does not matter
    first: int = 0  # the seed to begin with: one that soon finds it, and many rules if possible


MUTANTS = (
    Mutant(
        "commit: a barrier between data and the entries that point to it",
        "commit:Committer._write",
        "self._barriers.barrier()\n        try:",
        "try:",
        first=13,
    ),
    Mutant(
        "commit: tables are written after the barrier, not before it",
        "commit:Committer._write",
        "self._barriers.barrier()\n"
        "        try:\n            for offset, data in group.sectors:\n                storage.write(offset, [data])\n",
        "try:\n            for offset, data in group.sectors:\n                storage.write(offset, [data])\n"
        "            self._barriers.barrier()\n",
        first=13,
    ),
    Mutant(
        "commit: entries are those of the start of the group",
        "commit:Committer._write",
        "in group.sectors:",
        "in group.sectors + [self._tables.sector(n, s) for n, changed in group.dirty.items() for s in changed]:",
        first=19,
    ),
    Mutant(
        "commit: the file is whole clusters long before an entry is written",
        "commit:Committer._take",
        "self._grow()",
        "pass",
        first=25,
    ),
    Mutant(
        "commit: the entries of a failed group stay dirty",
        "commit:Committer._put_back",
        "self._tables.make_dirty(number, changed)",
        "pass",
        "full_disk",
        first=14,
    ),
    Mutant(
        "flush: a second barrier after the entries",
        "commit:Committer._write",
        "if durable:",
        "if durable and not (group.dirty or group.tables):",
        first=12,
    ),
    Mutant(
        "flush: one barrier is enough only where no entry waits",
        "commit:Committer.flush_now",
        "self.pending or ",
        "",
        first=14,
    ),
    Mutant(
        "flush: no barrier only where nothing was written since the last one",
        "commit:Committer.flush_now",
        "if not self._storage.unsynced:",
        "if True:",
        first=19,
    ),
    Mutant(
        "flush: one that waits for the lock has a barrier for what was written meanwhile",
        "commit:Committer.flush",
        " or self._storage.unsynced)",
        ")",
        first=14,
    ),
    Mutant(
        "discard: its space is used again after a barrier for its entries",
        "commit:Committer._run_group",
        "durable = durable or bool(group.freed)",
        "pass",
        first=32,
    ),
    Mutant(
        "discard: what a group frees is what it writes, not what is discarded meanwhile",
        "commit:Committer._landed",
        "self._freed.landed(group.freed)",
        "self._freed.landed(group.freed | self._freed.take())",
        first=66,
    ),
    Mutant(
        "discard: its space counts as zeros after the punch, not before it",
        "freed:FreedClusters._give_back",
        "punched = await self._storage.in_thread(functools.partial(self._punch, runs))",
        "punched = True",
        first=28,
    ),
    Mutant(
        "detach: a barrier before the header drops the backing",
        "overlay:Overlay.detach",
        "await self.committer.flush()",
        "await self.committer.commit()",
        "detach",
        first=57,
    ),
    Mutant(
        "detach: a barrier after the header",
        "session:Session.detach",
        "self._barrier()\n    # The name",
        "pass\n    # The name",
        "detach",
        first=36,
    ),
    Mutant(
        "record: a barrier after each",
        "session:Session.store",
        "self._barrier()",
        "pass",
        first=14,
    ),
    Mutant(
        "record: a barrier between two slots, also where the first one was written without",
        "session:Session._write_slot",
        "if self._unordered:",
        "if False:",
        first=99,
    ),
    Mutant(
        "record: the slots are written in turn",
        "session:Session._write_slot",
        "slot_index(record)",
        "0",
        first=14,
    ),
    Mutant(
        "times: the record says that a guest writes, before it does",
        "overlay:Overlay._write",
        "await self._session.let_times_move()",
        "self.times.may_move = True",
        first=26,
    ),
    Mutant(
        "repair: a barrier before NEED_CHECK is cleared",
        "session:Session.clear_dirty",
        "self._storage.barrier()\n    self._write_header",
        "self._write_header",
        "dirty",
        first=32,
    ),
    Mutant(
        "allocation: it starts behind a last cluster that is not whole",
        "open:_open",
        "round_up(file_end, cluster_size)",
        "round_down(file_end, cluster_size)",
        first=26,
    ),
    Mutant(
        "open: after a session that did not end in order all is read from the disk",
        "open:_open",
        "revalidate(storage, journal_folder)",
        "pass",
        "killed",
        first=14,
    ),
    Mutant(
        "a failed barrier: what waits for a commit is taken back",
        "commit:Committer._take_back",
        "await self._read_again()",
        "pass",
        "bad_barrier",
        first=47,
    ),
    Mutant(
        "a failed barrier: nobody else's barrier runs beside it",
        "commit:Committer.durably",
        "async with self._barrier_lock:",
        "if True:",
        "bad_barrier",
        first=91,
    ),
    Mutant(
        "open: a journal is not believed if its data has not reached the disk",
        "revalidation:_refresh",
        "if _checksum(storage, orphan, cluster_size) != before:",
        "if False:",
        "killed",
        first=296,
    ),
)

# Those that matter only while data is moved: the search for them begins at `scenario.MOVING` and their `first`.
MOVES = (
    Mutant(
        "move: a write under way in a thread ends first",
        "relocation:Relocation._settled",
        "await done.wait()",
        "return data",
        first=9,
    ),
    Mutant(
        "move: the old place is used again after a barrier for the new entry",
        "relocation:Relocation._publish",
        "self._freed.add(freed)",
        "self._freed.landed(freed)",
        first=13,
    ),
    Mutant(
        "move: nothing comes between the copy and the entry",
        "relocation:Relocation.move",
        "self._publish(found, offset):",
        "await trio.lowlevel.checkpoint() or self._publish(found, offset):",
        first=4,
    ),
)


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    """Take the rule away while the context is open."""
    module_name, _, name = mutant.function.partition(":")
    module = importlib.import_module(f"qedfs.overlay.{module_name}")
    class_name, _, method = name.rpartition(".")
    owner = getattr(module, class_name) if class_name else module
    original = vars(owner)[method]
    plain = getattr(original, "fget", original)
    source = textwrap.dedent(inspect.getsource(plain))
    if source.count(mutant.old) != 1:
        raise LookupError(f"{mutant.function} no longer has exactly one {mutant.old!r}")
    made: dict[str, object] = {}
    exec(compile(source.replace(mutant.old, mutant.new), f"<{mutant.rule}>", "exec"), vars(module), made)
    setattr(owner, method, made[method])
    try:
        yield
    finally:
        setattr(owner, method, original)
