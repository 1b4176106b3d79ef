"""The worker command for tests that kill and stop its processes, and its tasks, which write files for the test.

The first argument of each task is a directory of the test. The second is the name of the file in which the task notes
the pid of its process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import attrs

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.memory import MemoryTransport
from transports.memory.subscription import MemorySubscription
from unstract_core import Delivery, RetryLater, Tasks, TransportUnavailable

ROOT = Path(__file__).parents[1]
DIRECTORY = "SUPERVISED_DIRECTORY"
_LONGEST = 120.0

tasks = Tasks()
others = {"something.else": print}


def note(directory: str | Path, name: str) -> None:
    """Append the pid of this process to a file."""
    with Path(directory, name).open("a") as file:
        file.write(f"{os.getpid()}\n")


def noted(directory: str | Path, name: str) -> list[int]:
    """Return the pids in the file of this name, one for each call of `note`."""
    path = Path(directory, name)
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


@tasks.register("mark")
def mark(directory: str, name: str) -> str:
    note(directory, name)
    return name


@tasks.register("callback")
def callback(first: Any, directory: str, name: str, **_: Any) -> None:
    """A callback."""
    Path(directory, f"{name}.first").write_text(json.dumps(first))
    note(directory, name)


@tasks.register("hold")
def hold(directory: str, name: str) -> str:
    """Run until the file `<name>.go` exists."""
    note(directory, name)
    wait_until(Path(directory, f"{name}.go").exists, timeout=_LONGEST, what="the file that ends the task")
    note(directory, f"{name}.done")
    return name


@tasks.register("hang")
def hang(directory: str, name: str) -> NoReturn:
    note(directory, name)
    while True:
        time.sleep(_LONGEST)


@tasks.register("take_memory")
def take_memory(directory: str, name: str, megabytes: int) -> None:
    note(directory, name)
    bytes(bytearray(b"x") * (megabytes << 20))


@tasks.register("fail")
def fail(directory: str, name: str) -> NoReturn:
    note(directory, name)
    raise ValueError("it failed")


@tasks.register("ask_again")
def ask_again(directory: str, name: str) -> NoReturn:
    note(directory, name)
    raise RetryLater(0)


@tasks.register("look_around")
def look_around(directory: str, name: str) -> None:
    """Write the environment variables of a program that a task starts to a file."""
    out = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    Path(directory, f"{name}.env").write_text(out)
    note(directory, name)


@tasks.register("start_program")
def start_program(directory: str, name: str) -> None:
    """Start a program that hangs, note its pid, and wait for it, or exit when the file `<name>.go` exists."""
    with subprocess.Popen(["sleep", "600"]) as program:
        Path(directory, name).write_text(f"{program.pid}\n")
        while program.poll() is None:
            time.sleep(0.05)
            if Path(directory, f"{name}.go").exists():
                os._exit(0)


@tasks.register("leave_thread")
def leave_thread(directory: str, name: str) -> None:
    """Stop waiting for a hanging call, on a thread that Python waits for at exit."""
    note(directory, name)
    pool = ThreadPoolExecutor()
    with contextlib.suppress(TimeoutError):
        pool.submit(time.sleep, _LONGEST).result(timeout=0)


class Dying(MemoryTransport):
    """A transport whose subscriber dies while the file `die` exists."""

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        class Deadly(MemorySubscription):
            def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
                if Path(os.environ[DIRECTORY], "die").exists():
                    os._exit(3)
                return super().receive(limit=limit, wait=min(wait, 0.1))

        return Deadly(self._store, queues, lease)


def dying() -> Dying:
    return Dying()


class Away(MemoryTransport):
    """A transport that is unavailable while the file `away` exists."""

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        if Path(os.environ[DIRECTORY], "away").exists():
            raise TransportUnavailable("no answer")
        return super().subscribe(queues, lease=lease)


def away() -> Away:
    return Away()


def with_messages(*tasks_and_names: tuple[str, str], **fields: Any) -> MemoryTransport:
    """Return a transport with one message for each pair of a task and its file name."""
    transport = MemoryTransport()
    transport.send([message(task, "q", os.environ[DIRECTORY], name, **fields) for task, name in tasks_and_names])
    return transport


def holding() -> MemoryTransport:
    return with_messages(("hold", "held"))


def recycling() -> MemoryTransport:
    """Return a transport with a task that waits and one that ends at once."""
    return with_messages(("hold", "held"), ("mark", "marked"))


def held_up() -> MemoryTransport:
    return with_messages(("leave_thread", "left"))


def hanging() -> MemoryTransport:
    return with_messages(("hang", "hung"))


def starting() -> MemoryTransport:
    return with_messages(("start_program", "program"), on_error=then("callback", "nowhere"))


def looking() -> MemoryTransport:
    return with_messages(("look_around", "looked"))


@attrs.define
class Command:
    """A run of the command: its process, and its log with that of its children."""

    process: subprocess.Popen[str]
    log: list[str] = attrs.field(factory=list)
    _reader: threading.Thread | None = None

    def events(self, name: str) -> list[dict[str, str]]:
        """Return the fields of each event of this name so far."""
        mark = f" wire.{name}"
        matches = [line.partition(mark)[2] for line in list(self.log) if mark + " " in line + " "]
        return [dict(field.split("=", 1) for field in shlex.split(rest) if "=" in field) for rest in matches]

    def event(self, name: str, number: int = 1, **fields: str) -> dict[str, str]:
        """Wait for `number` events of this name with these fields; return the last one."""
        matches: list[dict[str, str]] = []

        def enough() -> bool:
            matches[:] = [event for event in self.events(name) if fields.items() <= event.items()]
            assert len(matches) >= number or self.process.poll() is None or self._reread(), self.log
            return len(matches) >= number

        wait_until(enough, timeout=_LONGEST, what=f"{number} {name} in {self.log[-30:]}")
        return matches[number - 1]

    def children(self, count: int = 1) -> list[int]:
        """Wait until `count` children have started; return their pids."""
        self.event("child_started", count)
        return [int(event["pid"]) for event in self.events("child_started")]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self) -> int:
        """Wait until the command has exited, and return its exit code."""
        code = self.process.wait(_LONGEST)
        self.read_to_the_end()
        return code

    def read_to_the_end(self) -> None:
        """Wait until no process writes to the log, and close the log."""
        if self._reader is not None and self.process.stderr is not None:
            self._reader.join(_LONGEST)
            assert not self._reader.is_alive(), "a process still has the log of an ended worker open"
            self.process.stderr.close()

    def asks(self, path: str) -> tuple[int, str]:
        """Send an HTTP request; return the status and the body."""
        return ask(self.event("http_listening")["address"], path)

    def healthy(self) -> bool:
        return self.asks("/healthz")[0] == 200

    def health(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.asks("/healthz")[1])
        return document

    def _reread(self) -> bool:
        """Whether the log of an ended process may have more lines."""
        return self._reader is not None and self._reader.is_alive()

    def read(self) -> None:
        def read() -> None:
            assert self.process.stderr is not None
            for line in self.process.stderr:
                self.log.append(line.rstrip("\n"))

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()


def ask(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    request = urllib.request.Request(f"http://{address}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - it is http
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


def lives(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def gone(*pids: int) -> None:
    """Wait until these processes have ended."""
    wait_until(lambda: not any(map(lives, pids)), timeout=_LONGEST, what=f"{pids} to end")


def program(before: str = "") -> list[str]:
    """Return the command; `before` is Python code that runs first in its process."""
    if before:
        return [sys.executable, "-c", f"{before}\nfrom unstract_core.__main__ import main\nmain()"]
    return [sys.executable, "-m", "unstract_core"]


SIGNALLED_WHILE_FINALIZING = """
import os, signal, time

class Signalled:
    def __del__(self):
        os.kill(os.getpid(), self.number)
        time.sleep(0.01)

def signalled_while_finalizing(number):
    one = Signalled()
    one.number = number
    del one
"""
"""Python code that sends a signal to its own process while an object is finalized, which discards exceptions."""


@contextlib.contextmanager
def worker(
    *arguments: str,
    url: str,
    directory: Path,
    app: str = "supervised:tasks",
    queues: Sequence[str] = ("q",),
    before: str = "",
    path: Path | None = None,
    more_environment: Mapping[str, str] | None = None,
    start: Sequence[str] = (),
    **options: Any,
) -> Iterator[Command]:
    """Start the command, and end all its processes after the block.

    Args:
        arguments: Further options of the worker.
        url: The URL of the transport.
        directory: The current directory, and that of the files of the tasks.
        app: The tasks.
        queues: The queues.
        before: Python code that runs first in the supervisor.
        path: A further directory on the import path of all processes.
        more_environment: Further environment variables.
        start: Another way to start the command; only `path` is then added to its import path.
        options: Further options of `subprocess.Popen`.
    """
    named = [option for queue in queues for option in ("--queue", queue)]
    import_path = os.pathsep.join(filter(None, [str(path or ""), str(ROOT), str(ROOT / "tests"), *sys.path]))
    env = os.environ | {
        "PYTHONPATH": str(path or "") if start else import_path,
        DIRECTORY: str(directory),
        "UNSTRACT_WIRE_URL": url,
        **(more_environment or {}),
    }
    process = subprocess.Popen(
        [*(start or program(before)), "worker", "--app", app, *named, *arguments],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=directory,
        **options,
    )
    command = Command(process)
    command.read()
    try:
        yield command
    finally:
        pids = {int(event["pid"]) for event in command.events("child_started")}
        process.kill()
        process.wait()
        for pid in filter(lives, pids):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        command.read_to_the_end()
