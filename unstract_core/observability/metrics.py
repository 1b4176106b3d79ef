"""Prometheus metrics of dispatches, runs, settlements and queues (extra [metrics]).

`Metrics` counts the work of a Consumer and of Dispatchers. `QueueCollector` reads the sizes of the queues from the
transport. In a worker with several processes, each child counts into files of the directory PROMETHEUS_MULTIPROC_DIR,
and the parent merges them. The variable must be set before this module is imported. docs/monitoring.md lists every
metric.

The labels are bounded: a queue of a subscription or a dispatch, a task that is registered or dispatched here, and one
of the first error types. Every other value is counted as "(other)".
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import threading
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import attrs

from unstract_core.codec import check_name
from unstract_core.errors import ConfigurationError, ContractError, NotSupported, PayloadError
from unstract_core.observability.observer import End, LeaseLostEvent, Observer, TaskFinished, WorkerHeartbeat
from unstract_core.transport import Delivery, Inspection, Message, QueueState, Settlement, Transport, Verdict

try:
    from prometheus_client import (
        REGISTRY,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        generate_latest,
        mmap_dict,
        multiprocess,
    )
    from prometheus_client.metrics_core import GaugeMetricFamily, Metric
except ImportError as exc:
    raise ConfigurationError(
        "metrics need prometheus_client, which is not installed: pip install 'unstract-wire[metrics]'"
    ) from exc

OTHER = "(other)"
"""The label of a task that is not registered here, of an unreadable message, and of names beyond the limit."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_NAMES, MOST_ERRORS = 500, 50

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_COUNTS = ("counter", "histogram")
_MERGED = (*_COUNTS, "summary")  # only the application itself may have summaries
_MODES = ("livesum", "livemin")
_ROOM = 2**20
"""The size of each new metrics file in bytes, for about 140 pairs of a queue and a task; more extend the file."""
_RUN_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_SETTLE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_ENDS: tuple[End, ...] = ("returned", "raised", "retry_asked", "rejected", "ignored")

_multiprocess: Any = multiprocess  # these two have no types
_mmap_dict: Any = mmap_dict
_merging = threading.Lock()


class _Names:
    """Returns a name as a label if it is known or among the first `most` names, and OTHER for every other one."""

    def __init__(self, most: int, known: Iterable[str] = ()) -> None:
        self._room = most
        self._known = set(known)

    def __call__(self, name: object) -> str:
        if isinstance(name, str) and name in self._known:
            return name
        if self._room <= 0 or not isinstance(name, str):
            return OTHER
        try:
            check_name(name, "$")
        except PayloadError:
            return OTHER
        self._room -= 1
        self.learn(name)
        return name

    def learn(self, name: str) -> None:
        self._known.add(name)


class _Series:
    """The metrics of one queue and task, cached because a look-up for each message takes longer than counting."""

    def __init__(self, metrics: Metrics, queue: str, task: str) -> None:
        self.started = metrics.started.labels(queue, task)
        self.running = metrics.running_now.labels(queue, task)
        self.run_seconds = metrics.run_seconds.labels(queue, task)
        self.replaced = metrics.replaced.labels(queue, task)
        self.lost = metrics.leases_lost.labels(queue, task)
        self.settle_seconds = metrics.settle_seconds.labels(queue, task)
        self.follow_ups = metrics.follow_ups.labels(queue, task)
        self.given_back = metrics.given_back.labels(queue, task)
        self.ran = {end: metrics.ran_total.labels(queue, task, end) for end in _ENDS}
        self.verdicts = {
            Verdict.ACK: metrics.acknowledged.labels(queue, task),
            Verdict.RETRY: metrics.retried.labels(queue, task),
            Verdict.BURY: metrics.buried.labels(queue, task),
        }
        self.replies = {status: metrics.replies.labels(queue, task, status) for status in ("completed", "failed")}


class Metrics(Observer):
    """Counts the work of one Consumer and of any number of Dispatchers.

    A second Consumer needs a second Metrics with its own registry.

    Args:
        registry: The registry of the metrics; None, the default, for the global one of prometheus_client.
        tasks: The tasks that may become labels before they have run here; empty by default.

    Raises:
        ConfigurationError: The registry already has these metrics.
        OSError: The disk of PROMETHEUS_MULTIPROC_DIR has no space for the files of this process.
    """

    def __init__(self, registry: CollectorRegistry | None = None, tasks: Container[str] = frozenset()) -> None:
        self._registry = REGISTRY if registry is None else registry
        self._tasks = tasks
        self._ran_here: set[str] = set()
        self._series: dict[tuple[str, str], _Series] = {}
        self._queues = _Names(MOST_NAMES)
        self._queues_sent_to, self._tasks_sent = _Names(MOST_NAMES), _Names(MOST_NAMES)
        self._errors = _Names(MOST_ERRORS)
        self._heartbeat: tuple[Gauge, Gauge, Gauge] | None = None
        if directory := os.environ.get(_DIRECTORY):
            _allocate(directory)
        try:
            self._define()
        except ValueError as exc:
            raise ConfigurationError(
                "this registry has the metrics of another Metrics: share that one, or pass a CollectorRegistry()"
            ) from exc

    def _define(self) -> None:
        self.dispatched = self._counter("dispatched", "Messages sent.")
        self.dispatch_failed = self._counter("dispatch_failed", "Messages that could not be sent.", "error")
        self.started = self._counter("started", "Tasks started.")
        self.ran_total = self._counter("ran", "Tasks that ended.", "end")
        self.failed = self._counter("failed", "Tasks that raised, except for requested retries.", "error")
        self.rejected_total = self._counter("rejected", "Messages that were rejected without a run.", "error")
        self.acknowledged = self._counter("acknowledged", "Messages acknowledged.")
        self.retried = self._counter("retried", "Messages settled as a retry.")
        self.buried = self._counter("buried", "Messages dead-lettered.")
        self.given_back = self._counter("given_back", "Messages released before their task was started.")
        self.follow_ups = self._counter("follow_ups", "Continuations sent, by the queue and task of their parent.")
        self.replies = self._counter("replies", "Replies and statuses written.", "status")
        self.leases_lost = self._counter("leases_lost", "Leases lost; the result of the task is not written.")
        self.replaced = self._counter("replaced", "Parts of results that the wire cannot carry, and were replaced.")
        self.run_seconds = self._histogram("run_seconds", "Seconds that tasks ran.", _RUN_BUCKETS)
        self.settle_seconds = self._histogram(
            "settle_seconds", "Seconds from the end of a task to its settlement.", _SETTLE_BUCKETS
        )
        self.running_now = Gauge(
            "unstract_wire_running",
            "Tasks that are running on a thread.",
            ["queue", "task"],
            registry=self._registry,
            multiprocess_mode="livesum",
        )

    @contextlib.contextmanager
    def sending(self, message: Message) -> Iterator[Message]:
        try:
            yield message
        except Exception as exc:
            error = self._errors(type(exc).__name__) if isinstance(exc, ContractError) else OTHER
            self.dispatch_failed.labels(*self._addressed(message), error).inc()
            raise
        self.dispatched.labels(*self._addressed(message)).inc()

    def running(self, delivery: Delivery) -> AbstractContextManager[None]:
        if delivery.payload is not None:
            self._ran_here.add(delivery.payload.task_name)
        series = self._of(delivery)
        series.started.inc()
        return cast(AbstractContextManager[None], series.running.track_inprogress())

    def on_task_finished(self, event: TaskFinished) -> None:
        series = self._of(event.delivery)
        series.ran[event.end].inc()
        series.run_seconds.observe(event.seconds)
        if event.replaced:
            series.replaced.inc(event.replaced)
        if event.end in ("raised", "rejected"):
            self.failed.labels(*self._labels(event.delivery), self._errors(event.error_type)).inc()

    def rejected(self, delivery: Delivery, error_type: str) -> None:
        self.rejected_total.labels(*self._labels(delivery), self._errors(error_type)).inc()

    def settled(self, settlement: Settlement, seconds: float) -> None:
        series = self._of(settlement.delivery)
        if not settlement.counted:
            series.given_back.inc()
            return
        series.verdicts[settlement.verdict].inc()
        series.settle_seconds.observe(seconds)
        if settlement.follow_up is not None:
            series.follow_ups.inc()
        if settlement.reply is not None:
            series.replies[settlement.reply.status].inc()

    def on_lease_lost(self, event: LeaseLostEvent) -> None:
        self._of(event.delivery).lost.inc()

    def on_heartbeat(self, event: WorkerHeartbeat) -> None:
        in_flight, unavailable, seen_at = self._heartbeat or self._first_heartbeat()
        in_flight.set(event.in_flight)
        unavailable.set(event.unavailable)
        seen_at.set(time.time())

    def _first_heartbeat(self) -> tuple[Gauge, Gauge, Gauge]:
        """Define the gauges of a consumer; a process that only dispatches does not have them."""
        self._heartbeat = (
            self._gauge("held", "Messages in flight: waiting, running, or not settled.", "livesum"),
            self._gauge("transport_away", "Consumers whose transport is unavailable.", "livesum"),
            self._gauge(
                "last_turn_timestamp_seconds", "Time of the last heartbeat of the consumer (Unix time).", "livemin"
            ),
        )
        return self._heartbeat

    def _labels(self, delivery: Delivery) -> tuple[str, str]:
        task = delivery.payload.task_name if delivery.payload is not None else OTHER
        return self._queues(delivery.queue), task if task in self._ran_here or task in self._tasks else OTHER

    def _of(self, delivery: Delivery) -> _Series:
        if delivery.payload is not None and (series := self._series.get((delivery.queue, delivery.payload.task_name))):
            return series
        labels = self._labels(delivery)
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Series(self, *labels)
        return series

    def _addressed(self, message: Message) -> tuple[str, str]:
        return self._queues_sent_to(message.queue), self._tasks_sent(message.payload.task_name)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"unstract_wire_{name}", text, ["queue", "task", *labels], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(
            f"unstract_wire_{name}", text, ["queue", "task"], registry=self._registry, buckets=tuple(buckets)
        )

    def _gauge(self, name: str, text: str, mode: str) -> Gauge:
        return Gauge(f"unstract_wire_{name}", text, registry=self._registry, multiprocess_mode=mode)  # type: ignore[arg-type]  # a Literal


class QueueCollector:
    """Reads the sizes of queues from a transport, as a collector of a CollectorRegistry.

    A scrape never fails: if the transport does not answer, the queue metrics are absent and `unstract_wire_up` is 0.

    Args:
        transport: A transport with the capability `inspection`.
        queues: The queues; None, the default, for every queue with messages.
        every: The shortest interval between two queries, in seconds; 5 by default.
        patience: The longest time that a scrape waits for a query, in seconds; 2 by default.

    Raises:
        NotSupported: The transport does not claim `inspection`.
    """

    def __init__(
        self, transport: Transport, queues: Sequence[str] | None = None, every: float = 5.0, *, patience: float = 2.0
    ) -> None:
        if not transport.capabilities.inspection:
            raise NotSupported("QueueCollector needs a transport with the capability inspection")
        self._transport = cast(Inspection, transport)
        self._names = None if queues is None else list(dict.fromkeys(queues))
        self._every = every
        self._patience = patience
        self._lock = threading.Lock()
        self._asking: threading.Event | None = None
        self._asked_at = float("-inf")
        self._states: Sequence[QueueState] | None = None

    def describe(self) -> Iterable[Metric]:
        return self._families(None)

    def collect(self) -> Iterable[Metric]:
        states = self._look()
        up = GaugeMetricFamily("unstract_wire_up", _UP, value=0 if states is None else 1)
        return [up, *self._families(states)[1:]]

    def _families(self, states: Sequence[QueueState] | None) -> list[Metric]:
        up = GaugeMetricFamily("unstract_wire_up", _UP)
        messages = GaugeMetricFamily(
            "unstract_wire_queue_messages", "Messages in a queue: ready, in flight, delayed.", labels=["queue", "state"]
        )
        oldest = GaugeMetricFamily(
            "unstract_wire_queue_oldest_seconds",
            "Age of the oldest ready message; 0 if there is none.",
            labels=["queue"],
        )
        dead = GaugeMetricFamily("unstract_wire_queue_dead_letters", "Dead letters of a queue.", labels=["queue"])
        estimated = GaugeMetricFamily(
            "unstract_wire_queue_estimated", "1 if a queue is too long to be counted, else 0.", labels=["queue"]
        )
        for state in _few(states or ()):
            estimated.add_metric([state.queue], float(state.estimated))
            for name in ("ready", "in_flight", "delayed"):
                messages.add_metric([state.queue, name], getattr(state, name))
            oldest.add_metric([state.queue], state.oldest or 0.0)
            dead.add_metric([state.queue], state.dead)
        return [up, messages, oldest, dead, estimated]

    def _look(self) -> Sequence[QueueState] | None:
        with self._lock:
            asking = self._asking
            if asking is None and time.monotonic() - self._asked_at >= self._every:
                self._asked_at = time.monotonic()
                asking = self._asking = threading.Event()
                threading.Thread(target=self._ask, args=[asking], name="unstract-wire-queues", daemon=True).start()
        if asking is not None and not asking.wait(max(0.0, self._asked_at + self._patience - time.monotonic())):
            return None
        return self._states

    def _ask(self, asking: threading.Event) -> None:
        try:
            self._states = self._transport.queues(self._names)
        except Exception:  # `unstract_wire_up` reports it, and the consumer logs the reason
            self._states = None
        with self._lock:
            self._asking = None
        asking.set()


_UP = "Whether the transport returned the sizes of its queues."


def _few(states: Sequence[QueueState]) -> Iterable[QueueState]:
    """Yield the first MOST_NAMES states, and the sum of the others."""
    yield from states[:MOST_NAMES]
    if rest := states[MOST_NAMES:]:
        yield attrs.evolve(
            rest[0],
            queue=OTHER,
            ready=sum(state.ready for state in rest),
            in_flight=sum(state.in_flight for state in rest),
            delayed=sum(state.delayed for state in rest),
            oldest=max(state.oldest or 0.0 for state in rest),
            dead=sum(state.dead for state in rest),
            estimated=any(state.estimated for state in rest),
        )


def exposition(registry: CollectorRegistry) -> tuple[bytes, str]:
    """Return the metrics of a registry in Prometheus' text format, and the content type."""
    return generate_latest(registry), CONTENT_TYPE


def multiprocess_registry(directory: str) -> CollectorRegistry:
    """Return a registry with the merged metrics of several processes.

    Args:
        directory: The PROMETHEUS_MULTIPROC_DIR of the processes.

    Raises:
        ConfigurationError: There is no such directory.
    """
    try:
        files = _multiprocess.MultiProcessCollector(None, path=directory)
    except ValueError as exc:
        raise ConfigurationError(
            f"metrics of several processes need a directory, and {directory!r} is not one; create it"
        ) from exc
    registry = CollectorRegistry()
    registry.register(_ProcessMetrics(files))
    return registry


class _ProcessMetrics:
    """Reads the files of all processes while no file is being merged."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def collect(self) -> Iterable[Metric]:
        with _merging:
            return list(self._files.collect())


def _allocate(directory: str) -> None:
    """Reserve disk space for this process' files: they are mapped, and on a full disk a signal would end it."""
    kinds = [*_COUNTS, *(f"gauge_{mode}" for mode in _MODES)]
    paths = [os.path.join(directory, f"{kind}_{os.getpid()}.db") for kind in kinds]
    new = [path for path in paths if not os.path.exists(path)]  # the application's own metrics may already have a file
    try:
        for path in paths:
            with open(path, "a+b") as file:
                if sys.platform == "linux":
                    os.posix_fallocate(file.fileno(), 0, _ROOM)
                else:  # other systems lack posix_fallocate
                    file.write(bytes(max(0, _ROOM - file.tell())))
    except OSError:
        for path in new:  # an incomplete file would make the files of all processes unreadable
            with contextlib.suppress(OSError):
                os.remove(path)
        raise


def forget_process(pid: int, directory: str | None = None) -> None:
    """Remove the gauges of a process that has ended, and merge its counts into one file for all ended processes.

    Merging keeps the time of a scrape constant, however many children of a worker were replaced.

    Args:
        pid: The process that has ended.
        directory: The directory of the files; None, the default, for PROMETHEUS_MULTIPROC_DIR.

    Raises:
        ConfigurationError: No directory is given or set.
    """
    directory = directory or os.environ.get(_DIRECTORY)
    if not directory:
        raise ConfigurationError(f"forget_process needs a directory, or {_DIRECTORY} in the environment")
    with _merging, contextlib.suppress(OSError):
        _multiprocess.mark_process_dead(pid, directory)
        for kind in _MERGED:
            _merge(os.path.join(directory, f"{kind}_{pid}.db"), os.path.join(directory, f"{kind}_ended.db"))


def _merge(ended: str, into: str) -> None:
    if not os.path.exists(ended):
        return
    disk = os.statvfs(os.path.dirname(into))
    if disk.f_bavail * disk.f_frsize < 2 * (_ROOM + os.path.getsize(ended)):
        return  # without disk space for a merge, the file is scraped unmerged
    with contextlib.suppress(
        RuntimeError, struct.error
    ):  # the process was killed while it created the file, which is empty
        values = list(_mmap_dict.MmapedDict.read_all_values_from_file(ended))
        with contextlib.closing(_mmap_dict.MmapedDict(into)) as whole:
            for key, value, timestamp, _ in values:
                whole.write_value(key, whole.read_value(key)[0] + value, timestamp)
    os.remove(ended)
