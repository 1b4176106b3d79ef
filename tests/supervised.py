"""The worker's command with children, for the tests that kill and stop them; its tasks speak to a test through files.

`python -m unstract_core worker --app supervised:tasks`: the first argument of each task is a directory of the test's,
the second a name under which it notes the process that it runs in.
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
    with Path(directory, name).open("a") as file:
        file.write(f"{os.getpid()}\n")


def noted(directory: str | Path, name: str) -> list[int]:
    """Return the pids that were noted under a name, one for each time."""
    path = Path(directory, name)
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


@tasks.register("mark")
def mark(directory: str, name: str) -> str:
    note(directory, name)
    return name


@tasks.register("told")
def told(first: Any, directory: str, name: str, **_: Any) -> None:
    """A callback."""
    Path(directory, f"{name}.first").write_text(json.dumps(first))
    note(directory, name)


@tasks.register("hold")
def hold(directory: str, name: str) -> str:
    """Run until the file `<name>.go` is there."""
    note(directory, name)
    wait_until(Path(directory, f"{name}.go").exists, timeout=_LONGEST, what="to be let go")
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
    """Write down what a program sees that a task starts: its environment."""
    out = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    Path(directory, f"{name}.env").write_text(out)
    note(directory, name)


@tasks.register("start_program")
def start_program(directory: str, name: str) -> None:
    """Start a program that hangs, note its pid, and wait for it, or for leave to end this process."""
    with subprocess.Popen(["sleep", "600"]) as program:
        Path(directory, name).write_text(f"{program.pid}\n")
        while program.poll() is None:
            time.sleep(0.05)
            if Path(directory, f"{name}.go").exists():
                os._exit(0)


@tasks.register("leave_thread")
def leave_thread(directory: str, name: str) -> None:
    """Give up waiting for a call that hangs, on a thread that Python waits for at exit."""
    note(directory, name)
    pool = ThreadPoolExecutor()
    with contextlib.suppress(TimeoutError):
        pool.submit(time.sleep, _LONGEST).result(timeout=0)


class Dying(MemoryTransport):
    """A transport whose subscriber dies, for as long as the file `die` is there."""

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
    """A transport that is away, for as long as the file `away` is there."""

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        if Path(os.environ[DIRECTORY], "away").exists():
            raise TransportUnavailable("no answer")
        return super().subscribe(queues, lease=lease)


def away() -> Away:
    return Away()


def with_messages(*tasks_and_names: tuple[str, str], **fields: Any) -> MemoryTransport:
    """A transport with one message for each task, and the name under which it notes its process."""
    transport = MemoryTransport()
    transport.send([message(task, "q", os.environ[DIRECTORY], name, **fields) for task, name in tasks_and_names])
    return transport


def holding() -> MemoryTransport:
    return with_messages(("hold", "held"))


def recycling() -> MemoryTransport:
    """Beside the task that waits to be let go there is one that is done at once."""
    return with_messages(("hold", "held"), ("mark", "marked"))


def held_up() -> MemoryTransport:
    return with_messages(("leave_thread", "left"))


def hanging() -> MemoryTransport:
    return with_messages(("hang", "hung"))


def starting() -> MemoryTransport:
    return with_messages(("start_program", "program"), on_error=then("told", "nowhere"))


def looking() -> MemoryTransport:
    return with_messages(("look_around", "looked"))


@attrs.define
class Command:
    """A run of the command: its process, and what it and its children have logged."""

    process: subprocess.Popen[str]
    log: list[str] = attrs.field(factory=list)
    _reader: threading.Thread | None = None

    def events(self, name: str) -> list[dict[str, str]]:
        """Return the fields of each event of that name so far."""
        mark = f" wire.{name}"
        found = [line.partition(mark)[2] for line in list(self.log) if mark + " " in line + " "]
        return [dict(field.split("=", 1) for field in shlex.split(rest) if "=" in field) for rest in found]

    def event(self, name: str, number: int = 1, **fields: str) -> dict[str, str]:
        """Wait for so many events of that name, with these fields; return the last of them."""
        found: list[dict[str, str]] = []

        def enough() -> bool:
            found[:] = [one for one in self.events(name) if fields.items() <= one.items()]
            assert len(found) >= number or self.process.poll() is None or self._reread(), self.log
            return len(found) >= number

        wait_until(enough, timeout=_LONGEST, what=f"{number} {name} in {self.log[-30:]}")
        return found[number - 1]

    def children(self, count: int = 1) -> list[int]:
        """Wait until so many children have started; return their pids."""
        self.event("child_started", count)
        return [int(one["pid"]) for one in self.events("child_started")]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self) -> int:
        """Wait until it has ended, and return its exit code."""
        code = self.process.wait(_LONGEST)
        self.read_to_the_end()
        return code

    def read_to_the_end(self) -> None:
        """Wait until nobody is left who could write to its log, and close that."""
        if self._reader is not None and self.process.stderr is not None:
            self._reader.join(_LONGEST)
            assert not self._reader.is_alive(), "somebody still holds the log of a worker that has ended"
            self.process.stderr.close()

    def asks(self, path: str) -> tuple[int, str]:
        """Ask it over HTTP; return the status and the body."""
        return ask(self.event("http_listening")["address"], path)

    def healthy(self) -> bool:
        return self.asks("/healthz")[0] == 200

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.asks("/healthz")[1])
        return found

    def _reread(self) -> bool:
        """Whether there may be more to read of a process that has ended."""
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
    """Whether a process is there and is no zombie."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(found.strip()) and not found.startswith("Z")


def gone(*pids: int) -> None:
    """Wait until these processes have ended."""
    wait_until(lambda: not any(map(lives, pids)), timeout=_LONGEST, what=f"{pids} to end")


def program(before: str = "") -> list[str]:
    """The command, after `before`, Python that runs first in its process."""
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
"""Python for a process that is to get a signal at a moment at which no exception reaches anybody."""


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
    """Start the command, and leave none of its processes behind. `before` is Python that runs in the parent first;
    `path` is on everybody's import path; `start` is another way to start the command, with `path` alone added to it."""
    named = [option for queue in queues for option in ("--queue", queue)]
    found = os.pathsep.join(filter(None, [str(path or ""), str(ROOT), str(ROOT / "tests"), *sys.path]))
    env = os.environ | {
        "PYTHONPATH": str(path or "") if start else found,
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
        pids = {int(one["pid"]) for one in command.events("child_started")}
        process.kill()
        process.wait()
        for pid in filter(lives, pids):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        command.read_to_the_end()
