"""/healthz and /metrics of a worker: for probes and scrapers, over the standard library's server.

It serves beside the work and never instead of it. A port that is taken is logged once and tried again; a request that
fails or takes long costs its own thread. When too many connections are open, the oldest is closed for a new one: slow
clients do not keep out a probe, which is answered in milliseconds. Nothing else is served, nothing is read from a
request but its path.
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
from unstract_core.observability.observer import Observer, Turn

logger = logging.getLogger("unstract_wire.http")

DEFAULT_HOST = "127.0.0.1"
RETRY = 30.0
_CLIENT_TIMEOUT = 5.0
_MAX_CONNECTIONS = 16
_MAX_SCRAPES = 4
"""For so many requests at once the metrics are collected: that may wait for a database, and a probe must not."""
_POLL_INTERVAL = 0.5
_TEXT = "text/plain; charset=utf-8"
_HEALTH = ("/healthz", "/health", "/livez")
"""The paths that probes ask, those of the product's workers among them; all three answer alike."""

Exposition = Callable[[], tuple[bytes, str]]
"""Returns what /metrics says, and its content type. Raises a ContractError that names the remedy where it cannot."""


@attrs.frozen
class Health:
    """How a worker is: `reasons` why it is not well, none where it is; and `details` in any case."""

    reasons: Sequence[str]
    details: Mapping[str, Any]


@attrs.frozen
class Address:
    """Where to listen."""

    host: str
    port: int

    @classmethod
    def of(cls, typed: str) -> Address:
        """Read `[HOST:]PORT`, an IPv6 address in brackets. Raises ValueError."""
        host, _, port = typed.rpartition(":")
        if not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError(f"{typed!r} is not [HOST:]PORT, such as 8080 or 0.0.0.0:8080")
        return cls(host.removeprefix("[").removesuffix("]") or DEFAULT_HOST, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ConsumerHealth(Observer):
    """The health of a worker without supervision: whether its consumer still turns."""

    def __init__(self, silence_limit: float) -> None:
        self._silence_limit = silence_limit
        self._turned_at = time.monotonic()
        self._turn: Turn | None = None

    def turned(self, turn: Turn) -> None:
        self._turned_at, self._turn = time.monotonic(), turn

    def health(self) -> Health:
        quiet, turn = time.monotonic() - self._turned_at, self._turn
        reasons = [f"the consumer has done nothing for {quiet:.0f} s"] if quiet >= self._silence_limit else []
        consumer = {"state": "starting" if turn is None else "running", "turned": round(quiet, 1)}
        if turn is not None:
            consumer |= {"held": turn.held, "running": turn.running, "away": turn.away}
        return Health(reasons, {"consumer": consumer})


@contextlib.contextmanager
def serving(
    address: Address, health: Callable[[], Health], metrics: Exposition, *, retry: float = RETRY
) -> Iterator[None]:
    """Serve on a thread beside the block; where the address cannot be had, try again every `retry` seconds."""
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
    request_queue_size = 128  # a burst of slow clients must not have the kernel drop a probe

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
        """Close the port in a process that was forked from this one: it would keep the port after this one's end."""
        self.socket.close()

    @property
    def address(self) -> Address:
        host, port = self.server_address[:2]
        return Address(str(host), int(port))

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # without asking who this host is: that may take long

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
            self._send(404, b"there are /healthz, /health, /livez and /metrics\n")

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
            self._send(503, b"the metrics are being collected for others; ask again later\n")
            return
        status, content_type = 200, _TEXT
        try:
            body, content_type = self.server.metrics()
        except ContractError as exc:
            status, body = 501, f"{exc}\n".encode()
        except Exception as exc:  # a collector may raise anything; its text may hold payload content
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
        """Log nothing: every probe would be a line."""
