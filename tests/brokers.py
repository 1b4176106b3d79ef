"""Private RabbitMQ and Redis servers, which tests may stop, kill and freeze without effect on the machine's servers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from servers import free_port, miss, wait_until_stopped

from contract_tests.kit import wait_until

_STARTS = 60.0
"""Seconds that a start may take on a busy machine."""
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
_CONFIGURATION = """\
listeners.tcp.1 = 127.0.0.1:{port}
disk_free_limit.absolute = 1MB
consumer_timeout = {held}
"""
_ADVANCED = "[{rabbit, [{channel_tick_interval, 500}]}].\n"  # ms between two checks for unacknowledged deliveries
LONGEST_HELD = 3.0
"""Seconds after which a private broker redelivers unacknowledged messages; RabbitMQ's default is half an hour."""


class PrivateBroker:
    """One node with its own ports, name, cookie, data, log and Erlang port mapper.

    It has no plugins. Its processes form one group, so that a signal reaches all of them.
    """

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self._directory = directory
        self._names = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        (directory / "rabbitmq.conf").write_text(_CONFIGURATION.format(port=self.port, held=int(LONGEST_HELD * 1000)))
        (directory / "advanced.config").write_text(_ADVANCED)
        (directory / "plugins").write_text("[].\n")
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")},
            "HOME": str(directory),  # where Erlang keeps its cookie
            "ERL_EPMD_PORT": str(self._names),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"unstract-wire-{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",  # else the machine's own is read
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
        }

    def start(self) -> None:
        """Start, and wait until connections are accepted; do nothing if it already runs."""
        if self._process is not None:
            return
        with (self._directory / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [str(_program())],
                env=self._environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait_until(self._started, timeout=_STARTS, what="RabbitMQ to start")

    def stop(self) -> None:
        """Shut down normally, as an administrator would."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill every process, frozen or not, like a power failure."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Suspend it: connections are accepted, but not answered, until `thaw`."""
        self._signal(signal.SIGSTOP)
        wait_until_stopped(self._group())

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def alarm(self, on: bool = True) -> None:
        """Set or clear the memory alarm, which blocks publishing connections."""
        self._control("set_vm_memory_high_watermark", "0.000001" if on else "0.6")

    def hold(self, seconds: float = LONGEST_HELD) -> None:
        """Set the seconds after which unacknowledged messages are redelivered, for channels opened later."""
        self._control("eval", f"application:set_env(rabbit, consumer_timeout, {int(seconds * 1000)}).")

    def _control(self, *arguments: str) -> None:
        command = [str(_program().with_name("rabbitmqctl")), "-n", self._environment["RABBITMQ_NODENAME"], *arguments]
        subprocess.run(command, env=self._environment, check=True, stdout=subprocess.DEVNULL)

    def remove(self) -> None:
        """Kill the node and its Erlang port mapper."""
        self.kill()
        with contextlib.suppress(OSError):
            subprocess.run(["epmd", "-port", str(self._names), "-kill"], stdout=subprocess.DEVNULL, check=False)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def _group(self) -> list[int]:
        """Return the process ids of its group."""
        if self._process is None:
            return []
        listed = subprocess.run(["ps", "-e", "-o", "pgid=,pid="], capture_output=True, text=True, check=True)
        pairs = [line.split() for line in listed.stdout.splitlines()]
        return [int(pid) for group, pid in pairs if int(group) == self._process.pid]

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._signal(number)
            self._process.wait(timeout=_STARTS)
            wait_until(lambda: not _listens(self.port), what="the broker's port to be free")
            self._process = None

    def _started(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            said = (self._directory / "output").read_text(errors="replace")
            raise AssertionError(f"RabbitMQ exited: {said[-2000:]}")
        return _listens(self.port)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def private_broker() -> Iterator[PrivateBroker]:
    """Start a private broker, and remove it afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="wire-mq-"))
    try:
        broker = PrivateBroker(directory)
        try:
            broker.start()
            yield broker
        finally:
            broker.remove()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def installed() -> bool:
    """Return whether RabbitMQ is installed."""
    return shutil.which("rabbitmq-server", path=_PATH) is not None


def behind(url: str, port: int) -> str:
    """Return a broker's URL with 127.0.0.1 and this port instead of its own address."""
    address = urlsplit(url)
    user = address.netloc.rpartition("@")[0]
    return urlunsplit(address._replace(netloc=f"{user}@127.0.0.1:{port}"))


def _program() -> Path:
    """Return the server's own script. Debian's wrapper changes the user and reads the machine's settings."""
    found = shutil.which("rabbitmq-server", path=_PATH)
    if found is None:
        raise FileNotFoundError("rabbitmq-server is not installed")
    return Path(found).resolve().with_name("rabbitmq-server")


class PrivateRedis:
    """A private Redis without persistence."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: _listens(self.port), timeout=_STARTS, what="Redis to start")

    def freeze(self) -> None:
        """Suspend it: connections are accepted, but not answered, until `thaw`."""
        self._process.send_signal(signal.SIGSTOP)
        wait_until_stopped([self._process.pid])

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def private_redis(*options: str) -> Iterator[PrivateRedis]:
    """Start a private Redis with these command-line options, and remove it afterwards."""
    if shutil.which("redis-server") is None:
        miss("redis-server is not installed: apt-get install redis-server")
    server = PrivateRedis(*options)
    try:
        yield server
    finally:
        server.remove()
