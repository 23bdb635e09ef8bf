"""The status of a mount as plain values for JSON.

Owns the keys of `status --json`, and what each state is called. Must not change an image, nor know who asks.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from qedfs.control.monitoring.progress_rate import Rate
from qedfs.control.port import Mounted, Restart, ServedImage
from qedfs.errors import QedfsError
from qedfs.fetch.queue import FetchQueue
from qedfs.image.condition import Cause, Trouble
from qedfs.image.image import Image
from qedfs.jobs.image_jobs import ImageJobs
from qedfs.jobs.job import Job
from qedfs.jobs.state import State

STANDBY = "standby"  # state of an image that keeps nothing of its source yet
BROKEN = "broken"  # state of an overlay that cannot be served
SETTLING = "the overlay is new and may still be being copied into the folder"


def mount_status(mount: Mounted, socket: str, rates: Mapping[str, Rate]) -> dict[str, Any]:
    """The status of a whole mount. `rates`: by the path of the overlay. All sizes in bytes."""
    return {
        "mountpoint": mount.mountpoint,
        "device": mount.device,
        "socket": socket,
        "more_operations": {"answered": not mount.without_more, "error": mount.without_more or None},
        "restart": {
            "after_crash": not mount.without_restart,
            "upgrade": not mount.without_upgrade,
            "error": mount.without_restart or None,
        },
        "restarts": mount.restart.count if mount.restart else 0,
        "last_restart": _restart_status(mount.restart),
        "limit_total": mount.total.limiter.limit,
        "fetched_in_background": mount.total.fetched,
        "released": sorted(mount.released()),
        "images": [image_status(served, rates.get(served.path)) for served in mount.everything()],
        "sources": [_source_status(fetches) for fetches in _by_connection(mount.fetches())],
    }


def _restart_status(restart: Restart | None) -> dict[str, Any] | None:
    if restart is None:
        return None
    return {
        "reason": restart.reason,
        "pause_seconds": round(restart.pause_seconds, 3),
        "counts": dict(restart.kinds),
    }


def image_status(served: ServedImage, rate: Rate | None) -> dict[str, Any]:
    """The status of one image, served or not."""
    image, job = served.image, served.job
    if image is None or job is None:
        return _unserved_status(served)
    left = job.total - job.progress
    waits_for = away(image, job)
    running = job.state is State.RUNNING and image.counted and not waits_for
    eta = rate.seconds_for(left) if rate and running else None
    return {
        "name": served.name,
        "overlay": served.path,
        "size": image.size,
        "backing": None if image.complete or image.source is None else str(image.source.location),
        "served": True,
        "state": state_of(served),
        "reason": waits_for or job.reason or None,
        "populated": job.progress,
        "total": job.total,
        "rate": round(rate.value) if rate else 0,
        "eta_seconds": 0.0 if image.complete else None if eta is None else round(eta, 1),
        **_condition(served.troubles),
        "exit_code": 0 if job.error is None else job.error.exit_code,
        "limit": job.rate_limiter.limit,
        "granted": image.limiter.granted,
        "copy_on_read": image.copy_on_read,
        "on_source_error": image.stalls.rule.action,
        "wait_bound_seconds": image.stalls.rule.bound_seconds,
        "stalled": image.stalls.count,
        "populate": _populate(served.jobs),
        "job": _job(served.jobs),
        "read_only": not image.writable,
        "opens": served.opens,
        "releasing": served.releasing,
        "disk_usage": image.overlay.disk_usage,
        "counters": dataclasses.asdict(image.counters),
    }


def state_of(served: ServedImage) -> str:
    """The state of an overlay, served or not."""
    if served.image is not None and served.image.in_standby:
        return STANDBY
    if served.image is not None and served.job is not None:
        return str(State.WAITING if away(served.image, served.job) else served.job.state)
    return str(State.WAITING) if served.error is None else BROKEN


def _populate(jobs: ImageJobs | None) -> dict[str, Any] | None:
    """The rescue of an image from another copy of its source, the last one if it has ended."""
    if jobs is None or jobs.populate is None:
        return None
    found = jobs.populate
    return {
        "from": str(found.copy.location),
        "state": str(found.state),
        "done": found.done,
        "error": None if found.error is None else str(found.error),
        "exit_code": 0 if found.error is None else found.error.exit_code,
    }


def _job(jobs: ImageJobs | None) -> dict[str, Any] | None:
    """The job beside the stream, the last one if it has ended."""
    if jobs is None or jobs.other is None:
        return None
    job = jobs.other
    return {
        "type": job.kind,
        "state": str(job.state),
        "reason": job.reason or None,
        "done": job.progress,
        "total": job.total,
        "limit": job.rate_limiter.limit,
        "error": None if job.error is None else str(job.error),
        "exit_code": 0 if job.error is None else job.error.exit_code,
    }


def away(image: Image, job: Job) -> str:
    """Why a stream makes no progress while its source is away; "" if it is not, or if the stream would not work anyway.

    The job itself gets an error only after the whole deadline, because the source retries until then. People want to
    know sooner.
    """
    error = image.condition.noted(Cause.SOURCE_AWAY)
    if error is None or image.complete or not (job.state is State.RUNNING or job.hindered):
        return ""
    return str(error)


def _unserved_status(served: ServedImage) -> dict[str, Any]:
    error = served.error
    return {
        "name": served.name,
        "overlay": served.path,
        "size": None,
        "backing": None,
        "served": False,
        "state": state_of(served),
        "reason": SETTLING if error is None else None,
        "populated": None,
        "total": None,
        "rate": 0,
        "eta_seconds": None,
        **_condition(served.troubles),
        "exit_code": QedfsError.exit_code if error is None else error.exit_code,
        "limit": None,
        "granted": None,
        "copy_on_read": None,
        "on_source_error": None,
        "wait_bound_seconds": None,
        "stalled": 0,
        "populate": None,
        "job": None,
        "read_only": None,
        "opens": 0,
        "releasing": False,
        "disk_usage": None,
        "counters": None,
    }


def _condition(troubles: Sequence[Trouble]) -> dict[str, Any]:
    found = [
        {
            "cause": str(trouble.cause),
            "error": str(trouble.error),
            "since": round(trouble.since, 3),
            "ends_with": trouble.ends_with,
        }
        for trouble in troubles
    ]
    return {"error": found[0]["error"] if found else None, "condition": found}


def _by_connection(fetches: Sequence[FetchQueue]) -> list[list[FetchQueue]]:
    """The queues, grouped by source: overlays with different cluster sizes use separate queues."""
    groups: dict[int, list[FetchQueue]] = defaultdict(list)
    for fetch in fetches:
        groups[id(fetch.remote)].append(fetch)
    return list(groups.values())


def _source_status(fetches: Sequence[FetchQueue]) -> dict[str, Any]:
    remote = fetches[0].remote
    return {
        "backing": str(remote.location),
        "size": None if remote.identity is None else remote.identity.size,
        "etag": None if remote.identity is None else remote.identity.etag,
        "last_modified": None if remote.identity is None else remote.identity.last_modified,
        "digest": None if remote.identity is None else remote.identity.digest,
        "fetched": sum(fetch.fetched_bytes for fetch in fetches),
        "readers": sum(fetch.readers for fetch in fetches),
        "window": sum(fetch.window.bytes for fetch in fetches),
        "retries": sum(remote.retries.values()),
        "retries_by_reason": {str(reason): count for reason, count in remote.retries.items()},
        "away_since": round(remote.silence().since, 3) if remote.is_away else None,
        "error": None if remote.error is None else str(remote.error),
    }
