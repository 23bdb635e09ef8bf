"""SIGKILL at any moment: every write that had returned is there, with a journal and without one.

The next session is another user's, or has another environment: its own journal lies in another folder.

The page cache survives the process, so all that was written is in the file; what matters is which entries were in the
file or in the journal when a write was answered.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import trio

from qedfs.host.runtime import RuntimeFolder
from qedfs.overlay.check import check
from qedfs.overlay.open import open_storage
from qedfs.overlay.session import read_header
from tests.fakes.storage import MemoryStorage
from tests.harness.sample import sample
from tests.overlay.examine import Broken, judge_times
from tests.overlay.mutants import Mutant, mutated
from tests.overlay.runs import Kill, run_and_kill
from tests.overlay.scenario import DROPPING, MOVING, History, Scenario, read_all, repeatable

# Thousands of rounds through code that other tests cover: a tracer would double their time.
pytestmark = [pytest.mark.sweep, pytest.mark.no_cover]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sessions of this test may put their journals."""
    found = [RuntimeFolder(tmp_path / name) for name in ("here", "there")]
    for place in found:
        place.path.mkdir()
    monkeypatch.setattr("qedfs.overlay.journal_search.journal_places", lambda _: found)


def put_journals(kill: Kill, folder: Path) -> None:
    """Leave in the folder what the killed process left there."""
    for path in folder.parent.glob("*/disk-*"):
        path.unlink()
    for name, content in kill.journals.items():
        (folder / name).write_bytes(content)


async def judge(history: History, kill: Kill, folder: Path) -> str | None:
    """Open what the killed process left and compare it with the model; twice, as the second open must find the same."""
    put_journals(kill, folder / "here")
    image: bytes | bytearray = kill.image
    for name in ("there", "here"):
        storage = MemoryStorage(image, name="disk")
        overlay = await open_storage(storage, journal_folder=folder / name)
        fault = history.model.fault(await read_all(overlay, history.scenario.base), kill.at)
        corruptions = check(storage, read_header(storage)[0]).corruptions
        if fault or corruptions:
            return fault or f"{corruptions} corruptions"
        try:
            judge_times(overlay, history, kill.at)
        except Broken as exc:
            return str(exc)
        await overlay.close()
        image = storage.bytes
    return None


def killed(seed: int, folder: Path, chance: float = 0.2, *, stop: bool = False, alone: bool = False) -> list[str]:
    """The faults of all kills of a seed; with `stop`, the first one only. `alone`: of an overlay without backing."""
    scenario = Scenario.draw(seed)
    if alone:
        scenario = dataclasses.replace(
            scenario, backing=b"", backed=False, trims=9, dirty=False, detach=False, journal=True
        )

    async def main() -> list[str]:
        history, kills = await run_and_kill(scenario, chance)
        assert kills
        faults = []
        for kill in kills:
            if text := await judge(history, kill, folder):
                faults.append(f"seed {seed}, event {kill.at}: {text}")
                if stop:
                    break
        return faults

    with repeatable(seed):
        return trio.run(main)


@pytest.mark.parametrize("first", range(0, sample(4, whole=48), 2))
def test_no_returned_write_is_lost(first: int, tmp_path: Path) -> None:
    assert [fault for seed in range(first, first + 2) for fault in killed(seed, tmp_path)] == []


@pytest.mark.parametrize("first", range(0, sample(4, whole=48), 2))
def test_no_returned_write_is_lost_without_a_backing(first: int, tmp_path: Path) -> None:
    """There, a discard leaves missing clusters as they are."""
    assert [fault for seed in range(first, first + 2) for fault in killed(seed, tmp_path, alone=True)] == []


@pytest.mark.parametrize("first", range(MOVING, MOVING + sample(2, whole=48), 2))
def test_no_returned_write_is_lost_while_data_is_moved(first: int, tmp_path: Path) -> None:
    assert [fault for seed in range(first, first + 2) for fault in killed(seed, tmp_path)] == []


@pytest.mark.parametrize("first", range(DROPPING, DROPPING + sample(2, whole=48), 2))
def test_no_returned_write_is_lost_while_what_the_backing_has_is_dropped(first: int, tmp_path: Path) -> None:
    assert [fault for seed in range(first, first + 2) for fault in killed(seed, tmp_path)] == []


def test_without_a_backing_a_discard_has_to_begin_with_a_cluster_that_it_changes(tmp_path: Path) -> None:
    mutant = Mutant(
        "the journal's witness is true",
        "discard:Discards._discard_some",
        "first = self._map.first_discardable(first, count, missing_too=missing_too)",
        "first = first if self._map.first_discardable(first, count, missing_too=missing_too) < stop else stop",
    )
    with mutated(mutant):
        assert any(killed(seed, tmp_path, 1, stop=True, alone=True) for seed in range(7, 60))


RULES = (
    Mutant(
        "the record says that a guest writes, before it does",
        "overlay:Overlay._write",
        "await self._session.let_times_move()",
        "self.times.may_move = True",
        first=5,
    ),
    Mutant(
        "a write is answered after its entries are in the journal",
        "cluster_writer:ClusterWriter._publish",
        "self._journal.append(entries)",
        "pass",
        first=5,
    ),
    Mutant(
        "without a journal a write is answered after its commit",
        "overlay:Overlay._write",
        "await self.committer.commit()",
        "pass",
        first=7,
    ),
    Mutant(
        "a commit under way counts as pending",
        "commit:Committer.pending",
        "return self._running or self._waiting",
        "return self._waiting",
        first=4,
    ),
    Mutant(
        "the journal is emptied when the file has its entries, not before",
        "commit:Committer._landed",
        "group.journal_end",
        "self._journal.end",
        first=5,
    ),
    Mutant(
        "the journal is looked for where any session can have put it",
        "journal_search:_search",
        "for place in places:",
        "for place in places[:1]:",
        first=5,
    ),
    Mutant(
        "the journal is replayed before the new session voids it",
        "open:_open",
        "apply(orphan.pairs, clusters, tables, allocator, backing=backing is not None)",
        "pass",
        first=5,
    ),
    Mutant(
        "a discard is in the journal",
        "discard:Discards._discard_some",
        "self._journal.append([(first, zero_run(count))])",
        "pass",
        first=5,
    ),
    Mutant(
        "a discard in the journal takes effect again, in its order among writes",
        "recovery:_apply_zeros",
        "clusters.discard(cluster, end - cluster, missing_too=backing)",
        "pass",
        first=5,
    ),
    Mutant(
        "a journal fits whose witness a running group has replaced",
        "recovery:_follows",
        "found in _left_by(entry) and",
        "False and",
        first=62,
    ),
    Mutant(
        "a journal fits in which a discard explains another place",
        "recovery:_explained",
        "if number not in placed:",
        "if False:",
        first=5,
    ),
    Mutant(
        "a journal fits in which a later write explains another place",
        "recovery:_explained",
        "left[cluster] == place_of(entry) or ",
        "",
        first=5,
    ),
    Mutant(
        "a move is in the journal",
        "relocation:Relocation._publish",
        "self._journal.append([(cluster, moved_to(place)) for cluster, place in entries])",
        "pass",
        first=MOVING,
    ),
    Mutant(
        "a journal fits in which a move explains another place",
        "recovery:_explained",
        " or (is_move(entry) and cluster not in placed)",
        "",
        first=MOVING,
    ),
    Mutant(
        "a move in the journal takes effect again over the place before it",
        "recovery:_takes_effect",
        "is_move(entry) or ",
        "",
        first=MOVING,
    ),
)


@pytest.mark.parametrize("mutant", RULES, ids=lambda mutant: mutant.rule)
def test_each_rule_is_necessary(mutant: Mutant, tmp_path: Path) -> None:
    with mutated(mutant):
        seeds = range(mutant.first, mutant.first + 60)
        assert any(killed(seed, tmp_path, 1, stop=True) for seed in seeds), f"nothing breaks without it: {mutant.rule}"
