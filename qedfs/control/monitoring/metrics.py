"""The figures of a mount as Prometheus metrics.

Owns the names of the metrics. Reads the live objects at each scrape and keeps nothing, so reads and writes of the mount
are not slowed down. Must not know how the text is served. Needs the package prometheus_client.

The label `image` is a file name inside the mount; bytes that are not UTF-8 are escaped as in `status`. The label
`source` is a backing without its secrets. Backings that look the same without them are added up, because a label must
be unique.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from qedfs import __version__
from qedfs.control.monitoring.status import BROKEN, STANDBY, state_of
from qedfs.control.port import Mounted, Restart, ServedImage
from qedfs.errors import Reason
from qedfs.fetch.latency import BOUNDS
from qedfs.fetch.queue import FetchQueue
from qedfs.fetch.total_limit import TotalLimit
from qedfs.image.condition import Cause
from qedfs.image.image import Image
from qedfs.jobs.job import Job
from qedfs.jobs.state import State

Served = tuple[str, Image, Job]

RESTART_REASONS = ("upgrade", "killed", "error", "hung")
STATES = (*(str(state) for state in State), STANDBY, BROKEN)

_IMAGE_COUNTERS: tuple[tuple[str, str, Callable[[Image], float]], ...] = (
    ("read_bytes", "Bytes that guests have read.", lambda image: image.counters.read),
    ("written_bytes", "Bytes that guests have written.", lambda image: image.counters.written),
    ("missed_bytes", "Bytes read that had to be fetched first.", lambda image: image.counters.missed),
    ("granted_bytes", "Bytes that were counted against its limit.", lambda image: image.limiter.granted),
    ("discarded_bytes", "Bytes discarded before they were fetched.", lambda image: image.counters.discarded),
    ("barriers", "Times that the overlay was made durable.", lambda image: image.overlay.barriers),
    ("barrier_seconds", "Time spent in barriers.", lambda image: image.overlay.barrier_seconds),
)
_IMAGE_GAUGES: tuple[tuple[str, str, Callable[[Image, Job], float]], ...] = (
    ("size_bytes", "Size of the image.", lambda image, job: job.total),
    ("populated_bytes", "Bytes of the image that need no source.", lambda image, job: job.progress),
    ("disk_usage_bytes", "Bytes that the overlay file takes on disk.", lambda image, job: image.overlay.disk_usage),
    ("limit_bytes_per_second", "Limit of the stream, 0 for none.", lambda image, job: job.rate_limiter.limit),
    ("stalled_requests", "Requests that wait for a source that is away.", lambda image, job: image.stalls.count),
    ("read_only", "1 if nothing can be kept or written.", lambda image, job: not image.writable),
    (
        "uncommitted_bytes",
        "Bytes written to the overlay whose commit is still to come.",
        lambda image, job: image.overlay.uncommitted_bytes,
    ),
    (
        "commit_pending",
        "1 if there are entries that the overlay's tables do not have yet.",
        lambda image, job: image.overlay.commit_pending,
    ),
)
# The last element combines the values of several queues for one source.
_SOURCE_GAUGES: tuple[tuple[str, str, Callable[[FetchQueue], float], Callable[[Iterable[float]], float]], ...] = (
    ("requests_in_flight", "Requests that were sent and are not finished.", lambda fetch: len(fetch.flights()), sum),
    ("background_bytes_in_flight", "Bytes in flight that nobody waits for.", lambda fetch: fetch.background_bytes, sum),
    ("waiting_readers", "Readers that wait for bytes of the source.", lambda fetch: fetch.readers, sum),
    ("window_bytes", "Bytes that may be in flight in the background.", lambda fetch: fetch.window.bytes, sum),
    ("round_trip_seconds", "Shortest time of a request lately.", lambda fetch: fetch.window.round_trip, max),
    ("rate_bytes_per_second", "Best rate that the link has shown.", lambda fetch: fetch.window.rate, max),
    (
        "away_seconds",
        "How long it has given no answer, 0 if it does.",
        lambda fetch: fetch.remote.silence().seconds if fetch.remote.is_away else 0.0,
        max,
    ),
    ("up", "0 if the last request failed.", lambda fetch: fetch.remote.error is None, min),
)


def exposition(mount: Mounted) -> bytes:
    """The current metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(MountCollector(mount))
    return generate_latest(registry)


class MountCollector(Collector):
    """The metrics of one mount."""

    def __init__(self, mount: Mounted) -> None:
        self._mount = mount

    def describe(self) -> list[Metric]:
        """Nothing: a registry then takes the names from `collect`."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics with their current values."""
        info = GaugeMetricFamily(
            "qedfs_info", "Always 1; the labels tell which mount.", labels=["version", "mountpoint"]
        )
        info.add_metric([__version__, _label(self._mount.mountpoint)], 1)
        yield info
        yield from _restart_metrics(self._mount.restart)
        yield from _limit_metrics(self._mount.total)
        everything = self._mount.everything()
        yield _states(everything)
        yield _troubles(everything)
        served = [(_label(found.name), found.image, found.job) for found in everything if found.image and found.job]
        yield from _image_metrics(served)
        yield from _job_metrics(everything)
        yield from _source_metrics(self._mount.fetches())


def _restart_metrics(restart: Restart | None) -> Iterator[Metric]:
    counter = CounterMetricFamily("qedfs_restarts", "Servers that have taken this mount over.", labels=["reason"])
    for reason in RESTART_REASONS:
        counter.add_metric([reason], 0 if restart is None else restart.kinds.get(reason, 0))
    pause = GaugeMetricFamily(
        "qedfs_last_restart_pause_seconds", "How long the mount answered nothing at the last restart, 0 if none was."
    )
    pause.add_metric([], 0 if restart is None else restart.pause_seconds)
    yield from (counter, pause)


def _limit_metrics(total: TotalLimit) -> Iterator[Metric]:
    limit = GaugeMetricFamily(
        "qedfs_limit_total_bytes_per_second", "Limit of what all images fetch in the background, 0 for none."
    )
    limit.add_metric([], total.limiter.limit)
    fetched = CounterMetricFamily("qedfs_background_fetched_bytes", "Bytes fetched that no reader waited for.")
    fetched.add_metric([], total.fetched)
    yield from (limit, fetched)


def _states(everything: Sequence[ServedImage]) -> Metric:
    metric = GaugeMetricFamily("qedfs_image_state", "1 for the state that the image is in.", labels=["image", "state"])
    for found in everything:
        now = state_of(found)
        for state in STATES:
            metric.add_metric([_label(found.name), state], state == now)
    return metric


def _troubles(everything: Sequence[ServedImage]) -> Metric:
    metric = GaugeMetricFamily("qedfs_image_trouble", "1 for what is wrong with it now.", labels=["image", "cause"])
    for found in everything:
        now = {trouble.cause for trouble in found.troubles}
        for cause in Cause:
            metric.add_metric([_label(found.name), str(cause)], cause in now)
    return metric


def _image_metrics(served: Sequence[Served]) -> Iterator[Metric]:
    for name, text, count in _IMAGE_COUNTERS:
        counter = CounterMetricFamily(f"qedfs_image_{name}", text, labels=["image"])
        for image_name, image, _ in served:
            counter.add_metric([image_name], count(image))
        yield counter
    for name, text, measure in _IMAGE_GAUGES:
        gauge = GaugeMetricFamily(f"qedfs_image_{name}", text, labels=["image"])
        for image_name, image, job in served:
            gauge.add_metric([image_name], measure(image, job))
        yield gauge
    kept = CounterMetricFamily(
        "qedfs_image_kept_bytes", "Bytes fetched and kept, by who asked for them.", labels=["image", "cause"]
    )
    for image_name, image, _ in served:
        kept.add_metric([image_name, "reader"], image.counters.kept_asked)
        kept.add_metric([image_name, "stream"], image.counters.kept_stream)
    yield kept


def _job_metrics(everything: Sequence[ServedImage]) -> Iterator[Metric]:
    """How far the jobs other than streams are."""
    done = GaugeMetricFamily("qedfs_image_job_done_bytes", "How far a job is.", labels=["image", "type"])
    total = GaugeMetricFamily("qedfs_image_job_total_bytes", "Where it ends.", labels=["image", "type"])
    for found in everything:
        job = None if found.jobs is None else found.jobs.other
        if job is not None and job.active:
            done.add_metric([_label(found.name), job.kind], job.progress)
            total.add_metric([_label(found.name), job.kind], job.total)
    yield from (done, total)


def _source_metrics(fetches: Sequence[FetchQueue]) -> Iterator[Metric]:
    sources: dict[str, list[FetchQueue]] = defaultdict(list)
    for fetch in fetches:
        sources[_label(str(fetch.remote.location))].append(fetch)
    fetched = CounterMetricFamily("qedfs_source_fetched_bytes", "Bytes fetched.", labels=["source"])
    retries = CounterMetricFamily(
        "qedfs_source_retries",
        "Attempts that failed for a reason that may pass, by reason.",
        labels=["source", "reason"],
    )
    for source, group in sources.items():
        fetched.add_metric([source], sum(fetch.fetched_bytes for fetch in group))
        # Overlays with different cluster sizes use separate queues over the same connections.
        remotes = {id(fetch.remote): fetch.remote for fetch in group}
        for reason in Reason:
            retries.add_metric([source, str(reason)], sum(remote.retries[reason] for remote in remotes.values()))
    yield from (fetched, retries)
    for name, text, measure, combine in _SOURCE_GAUGES:
        gauge = GaugeMetricFamily(f"qedfs_source_{name}", text, labels=["source"])
        for source, group in sources.items():
            gauge.add_metric([source], combine(map(measure, group)))
        yield gauge
    yield _waits(sources)


def _label(text: str) -> str:
    """A label as valid UTF-8, which the format requires. File names on Linux need not be."""
    return text.encode(errors="backslashreplace").decode()


def _waits(sources: dict[str, list[FetchQueue]]) -> Metric:
    """How long reads of missing bytes took, including failed reads."""
    metric = HistogramMetricFamily(
        "qedfs_source_wait_seconds", "Time that reads waited for bytes of the source.", labels=["source"]
    )
    bounds = [*map(str, BOUNDS), "+Inf"]
    for source, group in sources.items():
        counts = [sum(column) for column in zip(*(fetch.waits.up_to() for fetch in group), strict=True)]
        buckets = list(zip(bounds, counts, strict=True))
        metric.add_metric([source], buckets, sum_value=sum(fetch.waits.seconds for fetch in group))
    return metric
