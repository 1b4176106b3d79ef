"""Metrics: what is counted, under labels that cannot grow without bound, in one process and in several."""

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
    """Return a sample by its name without the prefix, None where there is none."""
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
    """Run everything that waits, and return what was counted."""
    registry = CollectorRegistry()
    Consumer(transport, TASKS, [QUEUE], observers=[Metrics(registry)], **options).drain()
    return registry


def test_each_dispatch_run_and_settlement_is_counted_once_by_queue_and_task() -> None:
    """What was sent, started, run and acknowledged, and how long that took, under the names of its queue and task."""
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


def test_a_failure_is_counted_by_the_type_of_its_error_alone() -> None:
    """Retries, the burial and the status of a task that raises; nothing of what it said is anywhere."""
    transport = MemoryTransport()
    transport.send([message("fail", QUEUE, SECRET, task_id="d-1")])
    registry = worked(transport, max_attempts=3, backoff=0.0)
    assert of(registry, "ran_total", "fail", end="raised") == 3
    assert of(registry, "failed_total", "fail", error="ValueError") == 3
    assert of(registry, "retried_total", "fail") == 2
    assert of(registry, "buried_total", "fail") == 1
    assert of(registry, "replies_total", "fail", status="failed") == 1
    assert SECRET not in exposition(registry)[0].decode()


def test_a_task_that_asks_to_be_run_again_has_not_failed() -> None:
    """RetryLater is an end of its own, but where the task may not be run again: then it has failed."""
    transport = MemoryTransport()
    transport.send([message("later", QUEUE)])
    registry = worked(transport, max_attempts=2)
    assert of(registry, "ran_total", "later", end="retry_asked") == 1
    assert of(registry, "ran_total", "later", end="raised") == 1
    assert of(registry, "failed_total", "later", error="RetryLater") == 1
    assert (of(registry, "retried_total", "later"), of(registry, "buried_total", "later")) == (1, 1)


def test_a_continuation_is_counted_for_its_parent() -> None:
    """One follow-up and one status for a dispatch with callbacks, none for the callback itself."""
    transport = MemoryTransport()
    transport.send([message("return", QUEUE, on_success=then("nan", QUEUE), task_id="d-1")])
    registry = worked(transport)
    assert of(registry, "follow_ups_total", "return") == 1
    assert of(registry, "replies_total", "return", status="completed") == 1
    assert of(registry, "follow_ups_total", "nan") == 0
    assert of(registry, "replaced_total", "nan") == 2


def test_what_is_not_registered_is_one_label_whatever_it_is_called() -> None:
    """A foreign sender cannot make series: an unknown task and an unreadable message count as `(other)`."""
    transport = MemoryTransport()
    transport.send([message(f"unknown-{number}", QUEUE) for number in range(20)])
    registry = worked(transport)
    assert of(registry, "rejected_total", OTHER, error="UnknownTask") == 20
    assert of(registry, "buried_total", OTHER) == 20
    assert "unknown-" not in exposition(registry)[0].decode()


def test_a_registered_task_that_was_never_run_here_has_its_name() -> None:
    """`tasks` are known beforehand: one that comes too often is counted under its name."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, frozenset({"return"}))
    delivery = Delivery("1", QUEUE, 9, message("return", QUEUE).payload, b"{}")
    metrics.rejected(delivery, "TooManyAttempts")
    metrics.settled(Settlement(delivery, Verdict.BURY), 0.0)
    assert of(registry, "rejected_total", "return", error="TooManyAttempts") == 1
    assert of(registry, "buried_total", "return") == 1


def test_a_lost_lease_and_what_is_given_back_are_counted() -> None:
    """Neither counts as settled, and what was handed back unstarted has no settle latency."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, {"return"})
    delivery = Delivery("1", QUEUE, 1, message("return", QUEUE).payload, b"{}")
    metrics.on_lease_lost(LeaseLostEvent(delivery))
    metrics.settled(Settlement(delivery, Verdict.RETRY, counted=False), 3.0)
    assert of(registry, "leases_lost_total", "return") == 1
    assert of(registry, "given_back_total", "return") == 1
    assert of(registry, "retried_total", "return") == 0
    assert of(registry, "settle_seconds_count", "return") == 0


def test_a_dispatch_that_fails_is_counted_and_its_error_let_out() -> None:
    """By the type of this package's errors; what was refused as a name does not become a label."""
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
def test_no_name_makes_a_scrape_fail(names: list[str]) -> None:
    """Whatever senders and classes are called: the exposition can be read, and has no more values than were seen."""
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


def test_the_labels_are_bounded() -> None:
    """A sender that makes up a task name, a queue and an error for each dispatch makes so many series and no more."""
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


def test_what_runs_now_is_told_while_it_runs() -> None:
    """`running` is by queue and task; `held` what the consumer has taken."""
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


def test_a_turn_tells_that_the_consumer_lives_and_whether_its_transport_is_away() -> None:
    """The moment is that of the last turn; a process that merely dispatches has no such gauges."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    assert value(registry, "last_turn_timestamp_seconds") is None
    before = time.time()
    metrics.on_heartbeat(WorkerHeartbeat(in_flight=3, running=1, unavailable=True))
    assert (value(registry, "held"), value(registry, "transport_away")) == (3, 1)
    assert before <= (value(registry, "last_turn_timestamp_seconds") or 0.0) <= time.time()
    metrics.on_heartbeat(WorkerHeartbeat(in_flight=0, running=0, unavailable=False))
    assert (value(registry, "held"), value(registry, "transport_away")) == (0, 0)


def test_two_in_one_registry_are_refused_with_the_remedy() -> None:
    """Not a ValueError of the library's, but what to do."""
    registry = CollectorRegistry()
    Metrics(registry)
    with pytest.raises(ConfigurationError, match=r"CollectorRegistry\(\)"):
        Metrics(registry)


def test_a_missing_extra_is_named() -> None:
    """Without prometheus_client the import says what to install."""
    script = "import sys; sys.modules['prometheus_client'] = None; import unstract_core.observability.metrics"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=child_environment()
    )
    assert "ConfigurationError" in ended.stderr
    assert "pip install 'unstract-wire[metrics]'" in ended.stderr


# What stands in the queues


@attrs.define
class Asked:
    """A transport that is asked for its queues alone; `answer` gives or raises what it answers."""

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


def test_the_state_of_each_queue_is_told() -> None:
    """Ready, in flight, delayed, the age of the oldest and the dead letters, by queue; an empty queue tells zeros."""
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


def test_a_transport_is_asked_once_in_a_while_however_often_it_is_scraped() -> None:
    """Scrapes share an answer until it is `every` seconds old."""
    transport = Asked(lambda: [QueueState(QUEUE, 1, 0, 0, None, 0)])
    registry = collected(QueueCollector(transport, [QUEUE], every=3600))  # type: ignore[arg-type]
    for _ in range(5):
        assert value(registry, "queue_messages", queue=QUEUE, state="ready") == 1
    assert transport.names == [[QUEUE]]
    registry = collected(QueueCollector(transport, every=0))  # type: ignore[arg-type]
    for _ in range(5):
        value(registry, "up")
    assert transport.names[1:] == [None] * 5


def test_an_outage_is_an_absent_value_and_never_a_failed_scrape() -> None:
    """`up` is 0 while the transport cannot answer, the queues are absent and not what they once were."""
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
    problem[:] = [RuntimeError("nobody foresaw it")]
    assert value(registry, "up") == 0


def test_a_transport_that_hangs_does_not_hang_a_scrape() -> None:
    """A scrape waits its patience and tells `up 0`; nobody asks a second time meanwhile."""
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


def test_many_queues_are_so_many_labels_and_no_more() -> None:
    """All that hold anything may be thousands: those beyond count as one, and nothing of them is left out."""
    states = [QueueState(f"q-{number:05}", 1, 2, 3, float(number), 4) for number in range(MOST_NAMES + 100)]
    registry = collected(QueueCollector(Asked(lambda: states)))  # type: ignore[arg-type]
    assert value(registry, "queue_messages", queue=OTHER, state="ready") == 100
    assert value(registry, "queue_messages", queue=OTHER, state="delayed") == 300
    assert value(registry, "queue_oldest_seconds", queue=OTHER) == MOST_NAMES + 99
    assert value(registry, "queue_dead_letters", queue=OTHER) == 400
    (family,) = [found for found in registry.collect() if found.name == "unstract_wire_queue_dead_letters"]
    assert len(family.samples) == MOST_NAMES + 1


def test_a_transport_that_tells_nothing_of_its_queues_is_refused() -> None:
    """What is not claimed is not asked for."""
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
    """A process that has run one task, runs another, and holds two messages."""
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


def test_several_processes_are_told_as_one(tmp_path: Path) -> None:
    """Counters and histograms add up; what runs and is held is summed; the last turn is that of the quietest."""
    before = time.time()
    registry = multiprocess_registry(str(tmp_path))
    with counting(tmp_path), counting(tmp_path):
        assert of(registry, "ran_total", "return", end="returned") == 2
        assert of(registry, "run_seconds_bucket", "return", le="0.5") == 2
        assert of(registry, "run_seconds_sum", "return") == pytest.approx(0.6)
        assert of(registry, "running", "return") == 2
        assert value(registry, "held") == 4
        assert before <= (value(registry, "last_turn_timestamp_seconds") or 0) <= time.time()


def test_of_a_process_that_has_ended_only_its_counts_stay(tmp_path: Path) -> None:
    """`forget_process` takes away what it said of its present, and keeps what it has counted: nothing goes backwards.

    However many have ended, their counts lie in one file of each kind.
    """
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


def test_forgetting_a_process_that_counted_nothing_does_no_harm(tmp_path: Path) -> None:
    """A pid that never wrote, one forgotten twice, a file that it had no time to fill, a directory that is gone."""
    registry = multiprocess_registry(str(tmp_path))
    with counting(tmp_path) as process:
        pass
    (tmp_path / "counter_4711.db").touch()
    for pid in (1, process.pid, process.pid, 4711):
        forget_process(pid, str(tmp_path))
    assert of(registry, "ran_total", "return", end="returned") == 1
    forget_process(1, str(tmp_path / "gone"))


def test_what_cannot_be_put_together_is_left_as_it_is(tmp_path: Path) -> None:
    """No error of the file system gets out to a supervisor; what the process counted stays in its own file."""
    with counting(tmp_path) as process:
        pass
    (tmp_path / "counter_ended.db").mkdir()
    forget_process(process.pid, str(tmp_path))
    (tmp_path / "counter_ended.db").rmdir()
    assert of(multiprocess_registry(str(tmp_path)), "ran_total", "return", end="returned") == 1


def test_forgetting_needs_to_know_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is that of the environment unless it is named; with neither the error says so."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    with pytest.raises(ConfigurationError, match="PROMETHEUS_MULTIPROC_DIR"):
        forget_process(1)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    (tmp_path / "gauge_livesum_7.db").touch()
    forget_process(7)
    assert list(tmp_path.iterdir()) == []


def test_a_scrape_beside_an_ending_process_sees_each_count_once(tmp_path: Path) -> None:
    """While the counts of those that ended are put together, no scrape sees them twice or not at all."""
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


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    """At start, and naming it."""
    with pytest.raises(ConfigurationError, match="gone"):
        multiprocess_registry(str(tmp_path / "gone"))


def test_every_end_is_counted_under_its_name() -> None:
    """No end of a task is unknown here: one more in observer.py has to be given its series."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for end in get_args(End):
        finish(metrics, QUEUE, "return", end)
        assert value(registry, "ran_total", queue=QUEUE, task=OTHER, end=end) == 1


def test_where_there_is_no_room_for_a_process_it_is_told_before_anything_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The files are mapped: what cannot be stored in one later would be a signal that ends the process."""

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


def test_where_room_cannot_be_asked_for_it_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """macOS has no posix_fallocate: there the files are filled with zeros, which hold nothing, and can be read."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "darwin")
    Metrics(CollectorRegistry())
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [2**20] * 4
    assert list(multiprocess_registry(str(tmp_path)).collect()) == []


def test_the_room_of_a_process_is_taken_before_anything_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each of its files has its blocks on the disk, and not only a size."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    Metrics(CollectorRegistry())
    files = list(tmp_path.iterdir())
    assert len(files) == 4
    assert all(file.stat().st_blocks * 512 >= 2**20 for file in files)
