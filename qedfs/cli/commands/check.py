"""`qedfs check`: finds damage in an overlay that nobody has open, and repairs what can be repaired."""

from __future__ import annotations

import click

from qedfs.cli.option_types import PLACE
from qedfs.cli.plain.check import check as run


@click.command(short_help="Look for damage, and repair it.")
@click.argument("overlay", type=PLACE)
@click.option("--repair", is_flag=True, help="Clear entries that point to invalid places, and free leaked space.")
@click.option("--drop-journal", is_flag=True, help="Discard the writes that a killed mount has left in its journal.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(overlay: str, repair: bool, drop_journal: bool, as_json: bool) -> None:
    """Check the tables of OVERLAY, which must not be mounted or open elsewhere.

    Exit codes: 0 sound, or sound after --repair; 3 damaged. Leaked clusters, which a crash may leave, waste space but
    do no harm: they are counted, and are not an error. --repair gives their space back to the file system. A cluster
    that two entries refer to cannot be repaired. Clusters in the journal of a killed mount count as missing here; the
    next mount restores them. If the journal may be another user's, only mounts of that user and of root can do so;
    --drop-journal lets others mount the overlay without it.
    """
    run(overlay, repair=repair, drop_journal=drop_journal, as_json=as_json)
