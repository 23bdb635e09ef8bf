"""All kinds of background jobs. A new kind is a module with a class derived from `Job`, and its name in this table."""

from __future__ import annotations

from qedfs.jobs.job import Job
from qedfs.jobs.stream import StreamJob

KINDS: dict[str, type[Job]] = {job.kind: job for job in (StreamJob,)}
