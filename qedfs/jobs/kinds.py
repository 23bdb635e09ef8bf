"""The table of all kinds of background jobs. A new kind needs a module with a subclass of `Job`, and a name here."""

from __future__ import annotations

from qedfs.jobs.commit import CommitJob
from qedfs.jobs.defrag import DefragJob
from qedfs.jobs.job import Job
from qedfs.jobs.stream import StreamJob

KINDS: dict[str, type[Job]] = {job.kind: job for job in (StreamJob, DefragJob, CommitJob)}
