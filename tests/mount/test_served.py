"""How many times an image is open, as the kernel reports it."""

from __future__ import annotations

from qedfs.mount.served import Served


def test_opens_closes_and_releases_are_counted() -> None:
    served = Served("disk.raw", "/o/disk.qed", 2, (1, 1, 1))
    served.note_open()
    served.note_open()
    served.note_close()
    assert (served.opens, served.closes) == (2, 1)
    served.note_release()
    assert (served.opens, served.closes) == (1, 0)
    # Two descriptors of one open(), as a child has that inherits it.
    served.note_close()
    served.note_close()
    served.note_release()
    assert (served.opens, served.closes) == (0, 0)


def test_an_overlay_that_is_not_opened_yet_is_settling() -> None:
    served = Served("disk.raw", "/o/disk.qed", 2, (1, 1, 1))
    assert served.settling
    assert (served.error, served.troubles) == (None, [])
