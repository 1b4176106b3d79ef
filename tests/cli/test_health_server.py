"""/healthz and /metrics: their answers, and the limits for slow clients."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import servers
from hypothesis import given
from hypothesis import strategies as st
from supervised import ask, noted, worker

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.postgres import PostgresTransport
from unstract_core import ConfigurationError
from unstract_core.cli.context import CliContext
from unstract_core.cli.health_server import Address, ConsumerHealth, Health, serving
from unstract_core.cli.metrics_export import ChildrenMetrics
from unstract_core.observability.observer import Turn

WELL = Health([], {"children": []})
HTTP = ("--http", "127.0.0.1:0")


def metrics() -> tuple[bytes, str]:
    return b"one 1\n", "text/plain; version=0.0.4"


@contextlib.contextmanager
def served(
    caplog: pytest.LogCaptureFixture,
    health: Callable[[], Health] = lambda: WELL,
    metrics: Callable[[], tuple[bytes, str]] = metrics,
) -> Iterator[str]:
    """Serve on a free port, and yield the address."""
    caplog.set_level(logging.INFO)
    caplog.clear()
    with serving(Address("127.0.0.1", 0), health, metrics):
        wait_until(lambda: events(caplog, "http_listening"), what="it to listen")
        yield str(getattr(events(caplog, "http_listening")[0], "wire.address"))


def events(caplog: pytest.LogCaptureFixture, name: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if getattr(record, "wire.event", "") == name]


@pytest.mark.parametrize(
    ("typed", "host", "port"),
    [
        ("8080", "127.0.0.1", 8080),
        (":8080", "127.0.0.1", 8080),
        ("0.0.0.0:1", "0.0.0.0", 1),  # noqa: S104 - what a cluster's probes need
        ("[::1]:65535", "::1", 65535),
        ("a.host:0", "a.host", 0),
    ],
)
def test_an_address_needs_no_host(typed: str, host: str, port: int) -> None:
    """Without a host the address is 127.0.0.1."""
    assert Address.of(typed) == Address(host, port)


@given(st.text().filter(lambda text: not text.rpartition(":")[2].isdigit()) | st.integers(65536).map(str))
def test_an_address_without_a_valid_port_is_refused(typed: str) -> None:
    """Text that does not end in a port raises ValueError, which names the expected form."""
    with pytest.raises(ValueError, match="HOST:"):
        Address.of(typed)


def test_healthz_is_200_or_503_with_its_reasons(caplog: pytest.LogCaptureFixture) -> None:
    """The JSON document has the status, the reasons and the details."""
    reasons: list[str] = []
    with served(caplog, lambda: Health(reasons, {"children": [1]})) as address:
        status, body = ask(address, "/healthz")
        assert (status, json.loads(body)) == (200, {"status": "ok", "reasons": [], "children": [1]})
        reasons.append("it is not well")
        status, body = ask(address, "/healthz?verbose=1")
        assert (status, json.loads(body)["status"], json.loads(body)["reasons"]) == (503, "unhealthy", reasons)
        assert ask(address, "/health") == ask(address, "/livez?verbose=1") == (503, body)
        reasons.clear()
        assert ask(address, "/health")[0] == ask(address, "/livez")[0] == 200


def test_the_server_has_no_other_paths_or_methods(caplog: pytest.LogCaptureFixture) -> None:
    """Other paths are 404, other methods are refused, and the Server header names no software version."""
    with served(caplog) as address:
        assert ask(address, "/metrics") == (200, "one 1\n")
        assert ask(address, "/metrics", "HEAD") == (200, "")
        for path in ("/", "/healthz/", "/../healthz", "/metrics.txt", "/healthz/metrics"):
            assert ask(address, path)[0] == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(address, "/healthz", method)[0] == 501
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"HEAD /healthz HTTP/1.0\r\n\r\n")
            head = connection.makefile().read().lower()
        assert "server: unstract-wire\n" in head
        assert "python" not in head
        assert head.endswith("\n\n")


def test_metrics_report_missing_extras_and_errors(caplog: pytest.LogCaptureFixture) -> None:
    """A missing extra is status 501 with the remedy; an error of a collector is 500 without its text."""

    def missing() -> tuple[bytes, str]:
        raise ConfigurationError("pip install something")

    def broken() -> tuple[bytes, str]:
        raise RuntimeError("payload content")

    with served(caplog, metrics=missing) as address:
        assert ask(address, "/metrics") == (501, "pip install something\n")
        assert ask(address, "/healthz")[0] == 200
    with served(caplog, metrics=broken) as address:
        assert ask(address, "/metrics") == (500, "the metrics cannot be collected: RuntimeError\n")


def test_slow_clients_are_disconnected(caplog: pytest.LogCaptureFixture) -> None:
    """Connections that send no whole request are closed, and other requests are answered meanwhile."""
    with served(caplog) as address, contextlib.ExitStack() as stack:
        host, _, port = address.rpartition(":")
        slow = [stack.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(8)]
        for connection in slow[:4]:
            connection.sendall(b"GET /healthz")
        assert ask(address, "/healthz")[0] == 200
        for connection in slow:
            assert connection.recv(1) == b""


def test_many_idle_connections_take_few_threads(caplog: pytest.LogCaptureFixture) -> None:
    """Sixty idle connections take a limited number of threads, and the server answers again after some seconds."""
    with served(caplog) as address, contextlib.ExitStack() as stack:
        host, _, port = address.rpartition(":")
        before = threading.active_count()
        for _ in range(60):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
        time.sleep(0.5)
        # Each has a timer that ends it. A thread lives on for a moment after its connection was closed.
        wait_until(lambda: threading.active_count() - before <= 2 * 16, timeout=3, what="no more threads than that")

        def answered() -> bool:
            with contextlib.suppress(OSError):
                return ask(address, "/healthz")[0] == 200
            return False

        wait_until(answered, timeout=120, what="it to answer again")


def test_slow_connections_do_not_keep_out_a_probe(caplog: pytest.LogCaptureFixture) -> None:
    """With more than sixteen slow connections open, /healthz answers at once, each time."""
    with served(caplog) as address, contextlib.ExitStack() as stack:
        host, _, port = address.rpartition(":")
        for number in range(40):
            slow = stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
            if number % 2:
                slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: slow\r\n")
            if number % 8 == 7:
                began = time.monotonic()
                assert ask(address, "/healthz")[0] == 200
                assert time.monotonic() - began < 4


def test_waiting_scrapes_do_not_keep_out_a_probe(caplog: pytest.LogCaptureFixture) -> None:
    """While four scrapes wait, further scrapes get 503, and /healthz answers at once."""
    collecting, go_on = threading.Semaphore(0), threading.Event()

    def slow() -> tuple[bytes, str]:
        collecting.release()
        go_on.wait(60)
        return metrics()

    with served(caplog, metrics=slow) as address, ThreadPoolExecutor(20) as pool:
        first = [pool.submit(ask, address, "/metrics") for _ in range(4)]
        for _ in first:
            assert collecting.acquire(timeout=60)
        assert {ask(address, "/metrics")[0] for _ in range(15)} == {503}
        assert ask(address, "/healthz")[0] == 200
        go_on.set()
        assert {scrape.result()[0] for scrape in first} == {200}


def test_clients_that_read_nothing_keep_out_no_scrape(caplog: pytest.LogCaptureFixture) -> None:
    """While twenty clients ask for large metrics and read nothing, /metrics and /healthz answer at once."""
    asked, large = threading.Semaphore(0), b"x" * (16 << 20)

    def metrics() -> tuple[bytes, str]:
        asked.release()
        return large, "text/plain"

    with served(caplog, metrics=metrics) as address, contextlib.ExitStack() as stack:
        host, _, port = address.rpartition(":")
        for _ in range(20):
            slow = stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
            slow.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert asked.acquire(timeout=60)
        began = time.monotonic()
        assert [ask(address, path)[0] for path in ("/metrics", "/healthz")] == [200, 200]
        assert time.monotonic() - began < 4


def test_a_taken_port_is_logged_once_and_retried(caplog: pytest.LogCaptureFixture) -> None:
    """A taken port is one WARNING, and the server listens as soon as the port is free."""
    caplog.set_level(logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = Address("127.0.0.1", other.getsockname()[1])
        with serving(address, lambda: WELL, metrics, retry=0.05):
            wait_until(lambda: events(caplog, "http_port_taken"), what="the warning")
            time.sleep(0.5)
            other.close()
            wait_until(lambda: events(caplog, "http_listening"), what="it to listen after all")
            assert ask(str(address), "/healthz")[0] == 200
    (taken,) = events(caplog, "http_port_taken")
    assert taken.levelname == "WARNING"
    assert getattr(taken, "wire.error") == "Address already in use"


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_an_unusable_address_is_a_warning(caplog: pytest.LogCaptureFixture, host: str) -> None:
    """A worker runs on if the address cannot be used, and the WARNING gives the reason."""
    with serving(Address(host, 1), lambda: WELL, metrics):
        wait_until(lambda: events(caplog, "http_port_taken"), what="the warning")
    assert getattr(events(caplog, "http_port_taken")[0], "wire.error")


def test_a_consumer_without_iterations_is_unhealthy() -> None:
    """A consumer is unhealthy without an iteration in time, and healthy while the transport is unavailable."""
    watched = ConsumerHealth(silence_limit=0.0)
    assert "the consumer has done nothing for 0 s" in watched.health().reasons
    watched = ConsumerHealth(silence_limit=600.0)
    assert watched.health().details["consumer"]["state"] == "starting"
    watched.turned(Turn(3, 2, away=True))
    health = watched.health()
    assert (health.reasons, health.details["consumer"]["away"]) == ([], True)
    assert (health.details["consumer"]["held"], health.details["consumer"]["running"]) == (3, 2)


def test_a_worker_without_supervisor_serves_health_and_metrics(tmp_path: Path) -> None:
    """A worker without a supervisor answers /healthz and /metrics in its own process."""
    with worker(*HTTP, url="supervised:holding", directory=tmp_path) as command:
        wait_until(lambda: noted(tmp_path, "held"), what="the task")
        wait_until(lambda: command.health()["consumer"].get("held") == 1, what="a turn of the loop")
        assert command.asks("/metrics")[0] == 200
        assert 'unstract_wire_running{queue="q",task="hold"} 1.0' in command.asks("/metrics")[1]
        assert 'unstract_wire_queue_messages{queue="q",state="in_flight"} 1.0' in command.asks("/metrics")[1]
        (tmp_path / "held.go").touch()
        command.signal(signal.SIGTERM)
        assert command.ends() == 0


@pytest.mark.parametrize("options", [(), ("--processes", "1")])
def test_metrics_without_the_extra_name_the_package(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Without the extra, /metrics is 501 with the remedy, and /healthz and the tasks work."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nsys.modules['prometheus_client'] = None\n")
    with worker(*options, *HTTP, url="supervised:holding", directory=tmp_path, path=hidden) as command:
        wait_until(lambda: noted(tmp_path, "held"), what="the task")
        wait_until(command.healthy, what="it to be well")
        status, body = command.asks("/metrics")
        assert (status, "pip install 'unstract-wire[metrics]'" in body) == (501, True)
        (tmp_path / "held.go").touch()
        command.signal(signal.SIGTERM)
        assert command.ends() == 0


def test_metrics_add_up_the_counts_of_all_children(embedded_url: str, tmp_path: Path) -> None:
    """/metrics has the counts of all children, replaced ones included, and the state of their queue."""
    with (
        servers.fresh_schema(embedded_url) as schema,
        contextlib.closing(PostgresTransport(embedded_url, schema)) as transport,
    ):
        transport.migrate()
        transport.send([message("mark", "q", str(tmp_path), "m") for _ in range(7)])
        url = f"{embedded_url}?schema={schema}"
        with worker("--processes", "2", "--max-tasks", "2", *HTTP, url=url, directory=tmp_path) as command:
            wait_until(lambda: len(noted(tmp_path, "m")) == 7, what="all to be run")
            ran = 'unstract_wire_ran_total{end="returned",queue="q",task="mark"} 7.0'
            wait_until(lambda: ran in command.asks("/metrics")[1], what="the count of all children")
            command.event("child_recycled", 3)
            wait_until(lambda: ran in command.asks("/metrics")[1], what="the count of those that have gone")
            empty = 'unstract_wire_queue_messages{queue="q",state="ready"} 0.0'
            wait_until(lambda: empty in command.asks("/metrics")[1], what="the state of the queue")
            command.signal(signal.SIGTERM)
            assert command.ends() == 0


def test_metrics_without_a_writable_directory_name_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a writable directory there is one WARNING, tasks run, and /metrics names the remedy."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with ChildrenMetrics(CliContext(), ["q"]) as children_metrics:
        assert children_metrics.environment == {}
        children_metrics.forget(1)
        with pytest.raises(ConfigurationError, match="TMPDIR"):
            children_metrics.exposition()
    assert [vars(record)["wire.event"] for record in caplog.records] == ["metrics_not_gathered"]
