"""The HTTP server of a worker: /healthz and /metrics, on the standard library's server.

The server never disturbs the worker. If the port is in use, the server logs it once and tries again. Each request has
its own thread. If too many connections are open, the server closes the oldest one for a new one, so that slow clients
cannot block a probe. It reads only the path of a request.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

import attrs

from unstract_core.errors import ContractError
from unstract_core.forking import reset_in_child
from unstract_core.observability.log_events import emit
from unstract_core.observability.observer import Observer, WorkerHeartbeat

logger = logging.getLogger("unstract_wire.http")

DEFAULT_HOST = "127.0.0.1"
RETRY = 30.0
"""Seconds until the next try when the address cannot be used."""
_CLIENT_TIMEOUT = 5.0
_MAX_CONNECTIONS = 16
_MAX_SCRAPES = 4
"""The highest number of concurrent scrapes. Each may wait for a database, and a probe must not wait for them."""
_POLL_INTERVAL = 0.5
_TEXT = "text/plain; charset=utf-8"
_HEALTH = ("/healthz", "/health", "/livez")
"""The paths of the health check, which answer alike; the product's workers use the last two."""

Exposition = Callable[[], tuple[bytes, str]]
"""Returns the body of /metrics and its content type. A ContractError becomes status 501 with its text."""


@attrs.frozen
class Health:
    """The health of a worker.

    Args:
        reasons: The reasons why the worker is unhealthy; empty if it is healthy.
        details: More fields of the JSON document.
    """

    reasons: Sequence[str]
    details: Mapping[str, Any]


@attrs.frozen
class Address:
    """The address to listen at.

    Args:
        host: The host name or IP address.
        port: The port; 0 for any free one.
    """

    host: str
    port: int

    @classmethod
    def of(cls, typed: str) -> Address:
        """Read `[HOST:]PORT`, with an IPv6 address in brackets. Raises ValueError for other text."""
        host, _, port = typed.rpartition(":")
        if not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError(f"{typed!r} is not [HOST:]PORT, such as 8080 or 0.0.0.0:8080")
        return cls(host.removeprefix("[").removesuffix("]") or DEFAULT_HOST, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ConsumerHealth(Observer):
    """The health of a worker without a supervisor: its consumer is healthy while its loop iterates.

    Args:
        silence_limit: Seconds without an iteration after which the worker is unhealthy.
    """

    def __init__(self, silence_limit: float) -> None:
        self._silence_limit = silence_limit
        self._iterated_at = time.monotonic()
        self._heartbeat: WorkerHeartbeat | None = None

    def on_heartbeat(self, event: WorkerHeartbeat) -> None:
        self._iterated_at, self._heartbeat = time.monotonic(), event

    def health(self) -> Health:
        silent_for, last = time.monotonic() - self._iterated_at, self._heartbeat
        reasons = [f"the consumer has done nothing for {silent_for:.0f} s"] if silent_for >= self._silence_limit else []
        consumer = {"state": "starting" if last is None else "running", "turned": round(silent_for, 1)}
        if last is not None:
            consumer |= {"held": last.in_flight, "running": last.running, "away": last.unavailable}
        return Health(reasons, {"consumer": consumer})


@contextlib.contextmanager
def serving(
    address: Address, health: Callable[[], Health], metrics: Exposition, *, retry: float = RETRY
) -> Iterator[None]:
    """Serve on a thread while the block runs.

    Args:
        address: The address to listen at.
        health: Returns the health of the worker.
        metrics: Returns the metrics of the worker.
        retry: Seconds until the next try when the address cannot be used.
    """
    ended = threading.Event()
    thread = threading.Thread(
        target=_serve, args=[address, health, metrics, retry, ended], name="unstract-wire-http", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2 * _POLL_INTERVAL)


def _serve(
    address: Address, health: Callable[[], Health], metrics: Exposition, retry: float, ended: threading.Event
) -> None:
    logged = False
    while not ended.is_set():
        try:
            server = _Server(address, health, metrics)
        except OSError as exc:
            if not logged:
                logged = True
                error = exc.strerror or type(exc).__name__
                emit(logger, logging.WARNING, "http_port_taken", address=address, error=error, retry_in=retry)
            ended.wait(retry)
            continue
        logged = False
        with server:
            emit(logger, logging.INFO, "http_listening", address=server.address)
            while not ended.is_set():
                server.handle_request()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    timeout = _POLL_INTERVAL
    request_queue_size = 128  # during a burst of slow clients the kernel must not drop a probe

    def __init__(self, address: Address, health: Callable[[], Health], metrics: Exposition) -> None:
        self.health = health
        self.metrics = metrics
        self.address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        self.collecting = threading.BoundedSemaphore(_MAX_SCRAPES)
        self._open: dict[socket.socket, None] = {}  # oldest first
        self._lock = threading.Lock()
        super().__init__((address.host, address.port), _Handler)
        reset_in_child(self)

    def reset_in_child(self) -> None:
        """Close the port in a process that a task has forked, which would otherwise keep it open."""
        self.socket.close()

    @property
    def address(self) -> Address:
        host, port = self.server_address[:2]
        return Address(str(host), int(port))

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer also resolves the host name, which may take long

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = None
            oldest = next(iter(self._open)) if len(self._open) > _MAX_CONNECTIONS else None
            if oldest is not None:
                del self._open[oldest]
        if oldest is not None:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread then ends
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing: a client may close its connection at any time."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _CLIENT_TIMEOUT
    server: _Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in _HEALTH:
            self._send_health()
        elif path == "/metrics":
            self._send_metrics()
        else:
            self._send(404, b"not found; use /healthz, /health, /livez or /metrics\n")

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def _send_health(self) -> None:
        health = self.server.health()
        document = {
            "status": "unhealthy" if health.reasons else "ok",
            "reasons": list(health.reasons),
            **health.details,
        }
        body = json.dumps(document, indent=2).encode() + b"\n"
        self._send(503 if health.reasons else 200, body, "application/json")

    def _send_metrics(self) -> None:
        if not self.server.collecting.acquire(blocking=False):
            self._send(503, b"too many scrapes at once; try again later\n")
            return
        status, content_type = 200, _TEXT
        try:
            body, content_type = self.server.metrics()
        except ContractError as exc:
            status, body = 501, f"{exc}\n".encode()
        except Exception as exc:  # the error text may contain payload content
            status, body = 500, f"the metrics cannot be collected: {type(exc).__name__}\n".encode()
        finally:
            self.server.collecting.release()
        self._send(status, body, content_type)

    def _send(self, status: int, body: bytes, content_type: str = _TEXT) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "unstract-wire"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: each probe would add a line."""
