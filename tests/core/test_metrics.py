"""Metrics: counts with bounded labels, in one process and in several."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from tools.check_lock import ROOT
from transports.memory import MemoryTransport
from unstract_core import (
    Capabilities,
    ConfigurationError,
    Consumer,
    Delivery,
    Dispatcher,
    NotSupported,
    PayloadError,
    QueueState,
    RetryLater,
    Settlement,
    TransportUnavailable,
    Verdict,
)
from unstract_core.observability.metrics import (
    MOST_ERRORS,
    MOST_NAMES,
    OTHER,
    Metrics,
    QueueCollector,
    exposition,
    forget_process,
    multiprocess_registry,
)
from unstract_core.observability.observer import End, LeaseLostEvent, TaskFinished, WorkerHeartbeat

QUEUE = "q"
SECRET = "the contents of the document"  # noqa: S105 - it stands for one


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    """Return a sample by its name without the prefix; None if there is none."""
    return registry.get_sample_value(f"unstract_wire_{name}", labels)


def of(registry: CollectorRegistry, name: str, task: str, **labels: str) -> float | None:
    return value(registry, name, queue=QUEUE, task=task, **labels)


def finish(metrics: Metrics, queue: str, task: str, end: End, error_type: str | None = None) -> None:
    """Record the end of a task of 0.1 seconds."""
    delivery = Delivery("1", queue, 1, message(task, queue).payload, b"")
    metrics.on_task_finished(TaskFinished(delivery, end, error_type, 0.1, 0))


def fail(*_: Any) -> None:
    raise ValueError(SECRET)


def later(*_: Any) -> None:
    raise RetryLater(delay=0)


TASKS: dict[str, Callable[..., Any]] = {
    "return": lambda *_: None,
    "nan": lambda *_: [float("nan"), float("inf")],
    "fail": fail,
    "later": later,
}


def worked(transport: MemoryTransport, **options: Any) -> CollectorRegistry:
    """Run all waiting messages, and return the registry."""
    registry = CollectorRegistry()
    Consumer(transport, TASKS, [QUEUE], observers=[Metrics(registry)], **options).drain()
    return registry


def test_dispatch_run_and_settlement_are_counted_once() -> None:
    """Sends, starts, runs, acknowledgements and durations are counted by queue and task."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    transport = MemoryTransport()
    for _ in range(3):
        Dispatcher(transport, observers=[metrics]).send("return", queue=QUEUE)
    Consumer(transport, TASKS, [QUEUE], observers=[metrics]).drain()
    assert of(registry, "ran_total", "return", end="returned") == 3
    for name in ("dispatched", "started", "acknowledged"):
        assert of(registry, f"{name}_total", "return") == 3, name
    for name in ("run_seconds_count", "settle_seconds_count"):
        assert of(registry, name, "return") == 3, name
    for name in ("retried", "buried", "given_back", "follow_ups", "leases_lost", "replaced"):
        assert of(registry, f"{name}_total", "return") == 0, name
    assert of(registry, "running", "return") == 0


def test_failure_is_counted_by_error_type() -> None:
    """Retries, the dead letter and the status of a failing task are counted, and its error text appears nowhere."""
    transport = MemoryTransport()
    transport.send([message("fail", QUEUE, SECRET, task_id="d-1")])
    registry = worked(transport, max_attempts=3, backoff=0.0)
    assert of(registry, "ran_total", "fail", end="raised") == 3
    assert of(registry, "failed_total", "fail", error="ValueError") == 3
    assert of(registry, "retried_total", "fail") == 2
    assert of(registry, "buried_total", "fail") == 1
    assert of(registry, "replies_total", "fail", status="failed") == 1
    assert SECRET not in exposition(registry)[0].decode()


def test_requested_retry_is_not_a_failure() -> None:
    """RetryLater is a separate end, but is a failure if the task may not be run again."""
    transport = MemoryTransport()
    transport.send([message("later", QUEUE)])
    registry = worked(transport, max_attempts=2)
    assert of(registry, "ran_total", "later", end="retry_asked") == 1
    assert of(registry, "ran_total", "later", end="raised") == 1
    assert of(registry, "failed_total", "later", error="RetryLater") == 1
    assert (of(registry, "retried_total", "later"), of(registry, "buried_total", "later")) == (1, 1)


def test_continuation_is_counted_for_its_parent() -> None:
    """A dispatch with callbacks counts one follow-up and one status, and the callback itself none."""
    transport = MemoryTransport()
    transport.send([message("return", QUEUE, on_success=then("nan", QUEUE), task_id="d-1")])
    registry = worked(transport)
    assert of(registry, "follow_ups_total", "return") == 1
    assert of(registry, "replies_total", "return", status="completed") == 1
    assert of(registry, "follow_ups_total", "nan") == 0
    assert of(registry, "replaced_total", "nan") == 2


def test_unknown_tasks_share_one_label() -> None:
    """An unknown task and an unreadable message count as `(other)`, so a foreign sender cannot add series."""
    transport = MemoryTransport()
    transport.send([message(f"unknown-{number}", QUEUE) for number in range(20)])
    registry = worked(transport)
    assert of(registry, "rejected_total", OTHER, error="UnknownTask") == 20
    assert of(registry, "buried_total", OTHER) == 20
    assert "unknown-" not in exposition(registry)[0].decode()


def test_registered_task_is_counted_by_its_name() -> None:
    """A task in `tasks` is counted by its name before it has run here."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, frozenset({"return"}))
    delivery = Delivery("1", QUEUE, 9, message("return", QUEUE).payload, b"{}")
    metrics.rejected(delivery, "TooManyAttempts")
    metrics.settled(Settlement(delivery, Verdict.BURY), 0.0)
    assert of(registry, "rejected_total", "return", error="TooManyAttempts") == 1
    assert of(registry, "buried_total", "return") == 1


def test_lost_leases_and_released_messages_are_counted() -> None:
    """Neither counts as settled, and a released message has no settle latency."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, {"return"})
    delivery = Delivery("1", QUEUE, 1, message("return", QUEUE).payload, b"{}")
    metrics.on_lease_lost(LeaseLostEvent(delivery))
    metrics.settled(Settlement(delivery, Verdict.RETRY, counted=False), 3.0)
    assert of(registry, "leases_lost_total", "return") == 1
    assert of(registry, "given_back_total", "return") == 1
    assert of(registry, "retried_total", "return") == 0
    assert of(registry, "settle_seconds_count", "return") == 0


def test_failed_dispatch_is_counted_and_raised() -> None:
    """A failed dispatch is counted by this package's error type, and a rejected name is not a label."""
    registry = CollectorRegistry()
    transport = MemoryTransport()
    dispatcher = Dispatcher(transport, observers=[Metrics(registry)])
    with pytest.raises(PayloadError):
        dispatcher.send("return", args=[object()], queue=QUEUE)
    with pytest.raises(PayloadError):
        dispatcher.send("\ud800", queue="\0")
    assert of(registry, "dispatch_failed_total", "return", error="PayloadError") == 1
    assert value(registry, "dispatch_failed_total", queue=OTHER, task=OTHER, error="PayloadError") == 1
    assert of(registry, "dispatched_total", "return") is None
    exposition(registry)


@given(st.lists(st.text(max_size=300) | st.characters(categories=["Cs"]), min_size=1, max_size=30))
def test_any_name_leaves_the_scrape_valid(names: list[str]) -> None:
    """The exposition is valid for any name of a sender or class."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for name in names:
        finish(metrics, name, name, "raised", name)
        with contextlib.suppress(RuntimeError), metrics.sending(message(name, name)):
            raise RuntimeError
    body, content_type = exposition(registry)
    assert content_type.startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert len(families["unstract_wire_failed"].samples) <= 2 * len(set(names))


def test_number_of_labels_is_bounded() -> None:
    """A sender with new names for each dispatch creates a bounded number of series."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for number in range(2 * MOST_NAMES):
        name = f"made-up-{number}"
        with metrics.sending(message(name, name)):
            pass
        finish(metrics, QUEUE, "return", "raised", name)
    found: dict[tuple[str, str], set[str]] = {}
    for family in registry.collect():
        for sample in family.samples:
            for label, text in sample.labels.items():
                found.setdefault((family.name, label), set()).add(text)
    assert len(found["unstract_wire_dispatched", "task"]) == MOST_NAMES + 1
    assert len(found["unstract_wire_dispatched", "queue"]) == MOST_NAMES + 1
    assert len(found["unstract_wire_failed", "error"]) == MOST_ERRORS + 1


def test_running_tasks_are_counted_while_they_run() -> None:
    """`running` is counted by queue and task, and `held` is the number of messages in flight."""
    registry = CollectorRegistry()
    transport = MemoryTransport()
    transport.send([message("hold", QUEUE)] * 2)
    go = threading.Event()
    consumer = Consumer(transport, {"hold": lambda: go.wait(60)}, [QUEUE], concurrency=2, observers=[Metrics(registry)])
    thread = threading.Thread(target=consumer.drain, daemon=True)
    thread.start()
    try:
        wait_until(lambda: of(registry, "running", "hold") == 2, what="both to run")
        assert of(registry, "started_total", "hold") == 2
        wait_until(lambda: value(registry, "held") == 2, what="the end of a turn")
    finally:
        go.set()
    thread.join(60)
    assert of(registry, "running", "hold") == 0
    assert value(registry, "held") == 0


def test_heartbeat_sets_the_gauges_of_a_consumer() -> None:
    """A heartbeat sets its time, the messages in flight and the availability; a producer has no such gauges."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    assert value(registry, "last_turn_timestamp_seconds") is None
    before = time.time()
    metrics.on_heartbeat(WorkerHeartbeat(in_flight=3, running=1, unavailable=True))
    assert (value(registry, "held"), value(registry, "transport_away")) == (3, 1)
    assert before <= (value(registry, "last_turn_timestamp_seconds") or 0.0) <= time.time()
    metrics.on_heartbeat(WorkerHeartbeat(in_flight=0, running=0, unavailable=False))
    assert (value(registry, "held"), value(registry, "transport_away")) == (0, 0)


def test_second_metrics_in_a_registry_is_rejected() -> None:
    """The ConfigurationError names the remedy."""
    registry = CollectorRegistry()
    Metrics(registry)
    with pytest.raises(ConfigurationError, match=r"CollectorRegistry\(\)"):
        Metrics(registry)


def test_metrics_without_extra_name_the_extra() -> None:
    """Without prometheus_client the import error names the extra to install."""
    script = "import sys; sys.modules['prometheus_client'] = None; import unstract_core.observability.metrics"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=child_environment()
    )
    assert "ConfigurationError" in ended.stderr
    assert "pip install 'unstract-wire[metrics]'" in ended.stderr


# The sizes of the queues


@attrs.define
class Asked:
    """A transport with only `queues`, which returns or raises `answer`."""

    answer: Callable[[], Sequence[QueueState]]
    capabilities: Capabilities = attrs.field(factory=lambda: Capabilities(inspection=True))
    names: list[Any] = attrs.field(factory=list)

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        self.names.append(names)
        return self.answer()


def collected(collector: QueueCollector) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector)
    return registry


def test_queue_collector_reports_each_queue() -> None:
    """Ready, in flight, delayed, oldest age and dead letters are reported by queue; an empty queue has zeros."""
    transport = MemoryTransport()
    transport.send([message("return", QUEUE)] * 3)
    transport.send([message("return", QUEUE, delay=60.0)])
    subscription = transport.subscribe([QUEUE], lease=60.0)
    held = subscription.receive(limit=2, wait=0)
    subscription.settle([Settlement(held[0], Verdict.BURY, reason="because")])
    registry = collected(QueueCollector(transport, [QUEUE, "empty"]))
    body = exposition(registry)[0].decode()
    assert value(registry, "up") == 1
    states = {state: value(registry, "queue_messages", queue=QUEUE, state=state) for state in ("ready", "in_flight")}
    assert states == {"ready": 1, "in_flight": 1}
    assert value(registry, "queue_messages", queue=QUEUE, state="delayed") == 1
    assert (value(registry, "queue_oldest_seconds", queue=QUEUE) or 0.0) > 0
    assert value(registry, "queue_dead_letters", queue=QUEUE) == 1
    assert 'unstract_wire_queue_oldest_seconds{queue="empty"} 0.0' in body
    subscription.close()


def test_scrapes_share_one_query_of_the_transport() -> None:
    """Scrapes share a result until it is `every` seconds old."""
    transport = Asked(lambda: [QueueState(QUEUE, 1, 0, 0, None, 0)])
    registry = collected(QueueCollector(transport, [QUEUE], every=3600))  # type: ignore[arg-type]
    for _ in range(5):
        assert value(registry, "queue_messages", queue=QUEUE, state="ready") == 1
    assert transport.names == [[QUEUE]]
    registry = collected(QueueCollector(transport, every=0))  # type: ignore[arg-type]
    for _ in range(5):
        value(registry, "up")
    assert transport.names[1:] == [None] * 5


def test_outage_makes_queue_metrics_absent() -> None:
    """`up` is 0 while the transport cannot answer, and the queue metrics are absent."""
    problem: list[Exception] = []

    def answer() -> Sequence[QueueState]:
        for one in problem:
            raise one
        return [QueueState(QUEUE, 1, 0, 0, None, 0)]

    registry = collected(QueueCollector(Asked(answer), [QUEUE], every=0))  # type: ignore[arg-type]
    for away in (False, True, False):
        problem[:] = [TransportUnavailable(SECRET)] if away else []
        body = exposition(registry)[0].decode()
        assert f"unstract_wire_up {0.0 if away else 1.0}" in body
        assert ("unstract_wire_queue_messages{" in body) is not away
        assert SECRET not in body
    problem[:] = [RuntimeError("unforeseen")]
    assert value(registry, "up") == 0


def test_hanging_transport_does_not_hang_a_scrape() -> None:
    """A scrape waits its patience and reports `up 0`, without a second query meanwhile."""
    go = threading.Event()

    def answer() -> Sequence[QueueState]:
        assert go.wait(60)
        return [QueueState(QUEUE, 1, 0, 0, None, 0)]

    transport = Asked(answer)
    registry = collected(QueueCollector(transport, [QUEUE], every=0, patience=0.05))  # type: ignore[arg-type]
    try:
        for _ in range(10):
            assert value(registry, "up") == 0
        assert len(transport.names) == 1
    finally:
        go.set()
    wait_until(lambda: value(registry, "up") == 1, what="the answer")


def test_queues_beyond_the_limit_are_summed() -> None:
    """Thousands of queues have a bounded number of labels, and their sum is complete."""
    states = [QueueState(f"q-{number:05}", 1, 2, 3, float(number), 4) for number in range(MOST_NAMES + 100)]
    registry = collected(QueueCollector(Asked(lambda: states)))  # type: ignore[arg-type]
    assert value(registry, "queue_messages", queue=OTHER, state="ready") == 100
    assert value(registry, "queue_messages", queue=OTHER, state="delayed") == 300
    assert value(registry, "queue_oldest_seconds", queue=OTHER) == MOST_NAMES + 99
    assert value(registry, "queue_dead_letters", queue=OTHER) == 400
    (family,) = [found for found in registry.collect() if found.name == "unstract_wire_queue_dead_letters"]
    assert len(family.samples) == MOST_NAMES + 1


def test_collector_rejects_a_transport_without_inspection() -> None:
    """The collector raises NotSupported for a transport without `inspection`."""
    with pytest.raises(NotSupported, match="inspection"):
        QueueCollector(Asked(list, Capabilities()))  # type: ignore[arg-type]


# Several processes


COUNTING = """
import sys
from prometheus_client import CollectorRegistry, Summary
from contract_tests.messages import message
from unstract_core import Delivery, Settlement, Verdict
from unstract_core.observability.metrics import Metrics
from unstract_core.observability.observer import TaskFinished, WorkerHeartbeat

metrics = Metrics(CollectorRegistry())
delivery = Delivery("1", "q", 1, message("return", "q").payload, b"")
with metrics.running(delivery):
    metrics.on_task_finished(TaskFinished(delivery, "returned", None, 0.3, 0))
metrics.settled(Settlement(delivery, Verdict.ACK), 0.1)
metrics.running(delivery).__enter__()
metrics.on_heartbeat(WorkerHeartbeat(in_flight=2, running=1, unavailable=False))
Summary("of_the_app", "What the application itself observes.").observe(2)
print("ready", flush=True)
sys.stdin.readline()
"""


def child_environment(directory: str = "") -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path])),
        **({"PROMETHEUS_MULTIPROC_DIR": directory} if directory else {}),
    }


@contextlib.contextmanager
def counting(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has run one task, runs another, and has two messages in flight."""
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(str(directory)),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait(60)
        process.stdin.close()
        process.stdout.close()


def test_metrics_of_several_processes_are_merged(tmp_path: Path) -> None:
    """Counters, histograms and gauges are summed; the heartbeat is the oldest one."""
    before = time.time()
    registry = multiprocess_registry(str(tmp_path))
    with counting(tmp_path), counting(tmp_path):
        assert of(registry, "ran_total", "return", end="returned") == 2
        assert of(registry, "run_seconds_bucket", "return", le="0.5") == 2
        assert of(registry, "run_seconds_sum", "return") == pytest.approx(0.6)
        assert of(registry, "running", "return") == 2
        assert value(registry, "held") == 4
        assert before <= (value(registry, "last_turn_timestamp_seconds") or 0) <= time.time()


def test_ended_process_keeps_only_its_counts(tmp_path: Path) -> None:
    """`forget_process` removes a process's gauges and keeps its counts, in one file of each kind."""
    registry = multiprocess_registry(str(tmp_path))
    with counting(tmp_path):
        for ended in range(1, 4):
            with counting(tmp_path) as process:
                pass
            forget_process(process.pid, str(tmp_path))
            assert of(registry, "ran_total", "return", end="returned") == 1 + ended
            assert of(registry, "run_seconds_count", "return") == 1 + ended
            assert of(registry, "run_seconds_bucket", "return", le="0.1") == 0
            assert of(registry, "settle_seconds_sum", "return") == pytest.approx(0.1 * (1 + ended))
            assert of(registry, "running", "return") == 1
            assert value(registry, "held") == 2
            assert registry.get_sample_value("of_the_app_sum") == 2 * (1 + ended)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert [name for name in names if name.startswith("counter")] != []
        assert len(names) == 3 * 2 + 2, names


def test_forgetting_a_process_without_counts_is_harmless(tmp_path: Path) -> None:
    """A process without files, forgotten twice, with an empty file, or without its directory is ignored."""
    registry = multiprocess_registry(str(tmp_path))
    with counting(tmp_path) as process:
        pass
    (tmp_path / "counter_4711.db").touch()
    for pid in (1, process.pid, process.pid, 4711):
        forget_process(pid, str(tmp_path))
    assert of(registry, "ran_total", "return", end="returned") == 1
    forget_process(1, str(tmp_path / "gone"))


def test_file_that_cannot_be_merged_is_kept(tmp_path: Path) -> None:
    """An error of the file system is not raised, and the counts stay in the process's own file."""
    with counting(tmp_path) as process:
        pass
    (tmp_path / "counter_ended.db").mkdir()
    forget_process(process.pid, str(tmp_path))
    (tmp_path / "counter_ended.db").rmdir()
    assert of(multiprocess_registry(str(tmp_path)), "ran_total", "return", end="returned") == 1


def test_forget_process_needs_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is the argument or the environment's; without both, ConfigurationError is raised."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    with pytest.raises(ConfigurationError, match="PROMETHEUS_MULTIPROC_DIR"):
        forget_process(1)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    (tmp_path / "gauge_livesum_7.db").touch()
    forget_process(7)
    assert list(tmp_path.iterdir()) == []


def test_scrape_during_a_merge_counts_once(tmp_path: Path) -> None:
    """While the counts of ended processes are merged, a scrape includes each of them once."""
    registry = multiprocess_registry(str(tmp_path))
    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(counting(tmp_path)).pid for _ in range(3)]
    seen: set[float | None] = set()
    over = threading.Event()

    def scrape() -> None:
        while not over.is_set():
            seen.add(of(registry, "ran_total", "return", end="returned"))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        for pid in pids:
            forget_process(pid, str(tmp_path))
    finally:
        over.set()
        thread.join(60)
    assert seen == {3.0}


def test_missing_metrics_directory_is_rejected(tmp_path: Path) -> None:
    """A missing directory raises ConfigurationError with its name at start."""
    with pytest.raises(ConfigurationError, match="gone"):
        multiprocess_registry(str(tmp_path / "gone"))


def test_every_end_of_a_task_has_a_series() -> None:
    """Each value of `End` is counted under its name."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for end in get_args(End):
        finish(metrics, QUEUE, "return", end)
        assert value(registry, "ran_total", queue=QUEUE, task=OTHER, end=end) == 1


def test_full_disk_is_an_error_before_counting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A full disk raises OSError at start, because a mapped file without room would end the process by a signal."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    of_the_app = tmp_path / f"counter_{os.getpid()}.db"
    of_the_app.write_bytes(bytes(4096))
    with counting(tmp_path):
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="no space"):
            Metrics(CollectorRegistry())
        assert of(multiprocess_registry(str(tmp_path)), "ran_total", "return", end="returned") == 1
        assert list(tmp_path.glob(f"*_{os.getpid()}.db")) == [of_the_app], "its own, and what the application counts"


def test_files_are_zero_filled_without_posix_fallocate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """macOS has no posix_fallocate: the files are filled with zeros, and can be read."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "darwin")
    Metrics(CollectorRegistry())
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [2**20] * 4
    assert list(multiprocess_registry(str(tmp_path)).collect()) == []


def test_files_have_their_disk_blocks_before_counting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each file has its blocks on the disk, and not only a size."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    Metrics(CollectorRegistry())
    files = list(tmp_path.iterdir())
    assert len(files) == 4
    assert all(file.stat().st_blocks * 512 >= 2**20 for file in files)
