"""The kinds of `Job`, by the type that QMP has for each. A new kind needs a module with a subclass, and a name here.

Owns the list. Must not know what the kinds do. `populate.py` and `prefetch.py` work in the background, too, but are no
`Job`.
"""

from __future__ import annotations

from qedfs.jobs.commit import CommitJob
from qedfs.jobs.defrag import DefragJob
from qedfs.jobs.job import Job
from qedfs.jobs.stream import StreamJob

KINDS: dict[str, type[Job]] = {job.kind: job for job in (StreamJob, DefragJob, CommitJob)}
