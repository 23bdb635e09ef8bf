"""What two looks at a source say about its version: every kind of validator against every other one."""

from __future__ import annotations

import pytest

from qedfs.source.base import Identity, Sameness

SIZE = 4096
MONDAY, TUESDAY = "Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT"
# What one version may be told with.
KINDS = {
    "none": Identity(SIZE),
    "date": Identity(SIZE, None, MONDAY),
    "weak": Identity(SIZE, 'W/"a"'),
    "weak, date": Identity(SIZE, 'W/"a"', MONDAY),
    "strong": Identity(SIZE, '"a"'),
    "strong, date": Identity(SIZE, '"a"', MONDAY),
}
# And what another one may.
OTHERS = {
    "none": Identity(SIZE),
    "date": Identity(SIZE, None, TUESDAY),
    "weak": Identity(SIZE, 'W/"b"'),
    "weak, date": Identity(SIZE, 'W/"b"', TUESDAY),
    "strong": Identity(SIZE, '"b"'),
    "strong, date": Identity(SIZE, '"b"', TUESDAY),
}
SAME, PRESUMED, DOUBTED, CHANGED = Sameness.SAME, Sameness.PRESUMED, Sameness.DOUBTED, Sameness.CHANGED

# Pinned kind: what it says of each kind that is shown, in the order of KINDS.
EQUAL = {
    "none": (PRESUMED, PRESUMED, PRESUMED, PRESUMED, PRESUMED, PRESUMED),
    "date": (DOUBTED, SAME, DOUBTED, SAME, DOUBTED, SAME),
    "weak": (DOUBTED, DOUBTED, PRESUMED, PRESUMED, DOUBTED, DOUBTED),
    "weak, date": (DOUBTED, DOUBTED, DOUBTED, SAME, DOUBTED, DOUBTED),
    "strong": (DOUBTED, DOUBTED, DOUBTED, DOUBTED, SAME, SAME),
    "strong, date": (DOUBTED, DOUBTED, DOUBTED, DOUBTED, SAME, SAME),
}
DIFFERENT = {
    "none": (PRESUMED, PRESUMED, PRESUMED, PRESUMED, PRESUMED, PRESUMED),
    "date": (DOUBTED, CHANGED, DOUBTED, CHANGED, DOUBTED, CHANGED),
    "weak": (DOUBTED, DOUBTED, CHANGED, CHANGED, DOUBTED, DOUBTED),
    "weak, date": (DOUBTED, CHANGED, CHANGED, CHANGED, DOUBTED, CHANGED),
    "strong": (DOUBTED, DOUBTED, DOUBTED, DOUBTED, CHANGED, CHANGED),
    "strong, date": (DOUBTED, CHANGED, DOUBTED, CHANGED, CHANGED, CHANGED),
}


@pytest.mark.parametrize("pinned", KINDS)
def test_every_kind_against_every_kind(pinned: str) -> None:
    known = KINDS[pinned]
    assert tuple(known.compare(shown).sameness for shown in KINDS.values()) == EQUAL[pinned]
    assert tuple(known.compare(shown).sameness for shown in OTHERS.values()) == DIFFERENT[pinned]
    for shown in (*KINDS.values(), *OTHERS.values()):
        verdict = known.compare(shown)
        assert bool(verdict.why) == (verdict.sameness in (DOUBTED, CHANGED))


@pytest.mark.parametrize(
    ("known", "shown", "sameness"),
    [
        # The digest outranks all but the size.
        (Identity(1, '"a"', MONDAY, digest="md5:00"), Identity(1, '"b"', TUESDAY, digest="md5:00"), SAME),
        (Identity(1, '"a"', MONDAY, digest="md5:00"), Identity(1, '"a"', MONDAY, digest="md5:01"), CHANGED),
        (Identity(1, digest="md5:00"), Identity(2, digest="md5:00"), CHANGED),
        (Identity(1, '"a"', digest="md5:00"), Identity(1, '"a"', digest="sha-1:01"), SAME),
        (Identity(1, '"a"', digest="md5:00"), Identity(1, '"a"'), SAME),
        (Identity(1, '"a"', digest="md5:00"), Identity(1, digest="md5:00"), SAME),
        # Tags and dates of another server.
        (Identity(1, '"a"', place="x"), Identity(1, '"b"', place="y"), DOUBTED),
        (Identity(1, '"a"', place="x"), Identity(1, '"a"', place="y"), SAME),
        (Identity(1, '"a"', place="x"), Identity(1, '"b"'), CHANGED),
        (Identity(1, None, MONDAY, place="x"), Identity(1, None, TUESDAY, place="y"), DOUBTED),
        (Identity(1, None, MONDAY, place="x"), Identity(1, None, MONDAY, place="y"), PRESUMED),
        (Identity(1, 'W/"a"', place="x"), Identity(1, 'W/"b"', place="y"), DOUBTED),
        (Identity(1, place="x"), Identity(2, place="y"), CHANGED),
        # A qcow2 image's tables stand in the place of a date, and not for its data.
        (Identity(1, None, "qcow2 file of 9 bytes"), Identity(1, None, "qcow2 file of 9 bytes"), PRESUMED),
        (Identity(1, None, "qcow2 file of 9 bytes"), Identity(1, None, "qcow2 file of 8 bytes"), CHANGED),
        (Identity(1, None, "QED file of 9 bytes"), Identity(1, None, "today of QED file of 9 bytes"), PRESUMED),
        (Identity(1, None, "QED file of 9 bytes"), Identity(1, None, "today of QED file of 8 bytes"), CHANGED),
        (Identity(1, None, "today of QED file of 9 bytes"), Identity(1, None, "QED file of 9 bytes"), CHANGED),
    ],
)
def test_digests_and_places(known: Identity, shown: Identity, sameness: Sameness) -> None:
    assert known.compare(shown).sameness is sameness
