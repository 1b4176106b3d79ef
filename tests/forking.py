"""Tasks that fork in every way that Python offers, for the worker command: `--app forking:tasks`."""

from __future__ import annotations

import atexit
import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from supervised import DIRECTORY, note

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.memory import MemoryTransport
from unstract_core import Tasks

tasks = Tasks()
POOLS = 12
_LONGEST = 60.0


def queued() -> MemoryTransport:
    """Return a transport with a message for each task except the pools, and a small message after each one."""
    transport = MemoryTransport()
    directory = os.environ[DIRECTORY]
    for name in sorted(set(tasks) - {"mark", "pool"}):
        transport.send([message(name, "q", directory, name), message("mark", "q", directory, f"after-{name}")])
    return transport


def pools() -> MemoryTransport:
    transport = MemoryTransport()
    transport.send([message("pool", "q", os.environ[DIRECTORY], "pool") for _ in range(POOLS)])
    return transport


def outcome(child: int) -> int:
    """Wait for a child; return its exit code, or minus the signal that ended it."""
    found: list[int] = []

    def ended() -> bool:
        pid, status = os.waitpid(child, os.WNOHANG)
        found.append(status)
        return pid == child

    try:
        wait_until(ended, timeout=_LONGEST, what="the child to end")
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        raise
    return os.waitstatus_to_exitcode(found[-1])


def handlers() -> str:
    """Return the signal handlers of this process, as a child should have them."""
    return f"{signal.getsignal(signal.SIGTERM)!r} {signal.getsignal(signal.SIGINT)!r}\n"


def write(directory: str, name: str, value: object) -> None:
    Path(directory, f"{name}.value").write_text(str(value))
    note(directory, name)


def forked(directory: str, name: str, child: Callable[[], Any]) -> None:
    """Fork. The child calls `child`; the parent records the exit code of the child."""
    atexit.register(note, directory, "at-exit")
    pid = os.fork()
    if pid == 0:
        child()
        return
    write(directory, name, outcome(pid))


def fail() -> NoReturn:
    raise ValueError("in the child")


@tasks.register("mark")
def mark(directory: str, name: str) -> None:
    note(directory, name)


@tasks.register("pool")
def pool(directory: str, name: str) -> None:
    """Terminate a pool, whose children must end on SIGTERM."""
    with multiprocessing.get_context("fork").Pool(2) as workers:
        assert workers.map(abs, range(-3, 0)) == [3, 2, 1]
        workers.map_async(time.sleep, [_LONGEST] * 2)
    note(directory, name)


@tasks.register("pool.joined")
def joined(directory: str, name: str) -> None:
    with multiprocessing.get_context("fork").Pool(2) as workers:
        assert workers.map(abs, [-1]) == [1]
        workers.close()
        workers.join()
    note(directory, name)


@tasks.register("executor")
def executor(directory: str, name: str) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as workers:
        write(directory, name, workers.submit(handlers).result(_LONGEST))


@tasks.register("forkserver")
def forkserver(directory: str, name: str) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as workers:
        write(directory, name, workers.submit(handlers).result(_LONGEST))


@tasks.register("process.terminated")
def terminated(directory: str, name: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=[_LONGEST])
    process.start()
    process.terminate()
    process.join(_LONGEST)
    write(directory, name, process.exitcode)
    process.kill()


@tasks.register("fork.returns")
def returns(directory: str, name: str) -> None:
    forked(directory, name, lambda: None)


@tasks.register("fork.raises")
def raises(directory: str, name: str) -> None:
    forked(directory, name, fail)


@tasks.register("fork.exits")
def exits(directory: str, name: str) -> None:
    forked(directory, name, lambda: sys.exit(3))


@tasks.register("fork.leaves")
def leaves(directory: str, name: str) -> None:
    forked(directory, name, lambda: os._exit(4))


@tasks.register("fork.killed")
def killed(directory: str, name: str) -> None:
    """Send SIGTERM from the child to itself."""
    forked(directory, name, lambda: os.kill(os.getpid(), signal.SIGTERM))


@tasks.register("fork.handlers")
def of_child(directory: str, name: str) -> None:
    forked(directory, f"{name}.parent", lambda: write(directory, name, handlers()))


@tasks.register("fork.twice")
def twice(directory: str, name: str) -> None:
    def child() -> None:
        grandchild = os.fork()
        if grandchild:
            os._exit(outcome(grandchild) or 5)

    forked(directory, name, child)


@tasks.register("forkpty")
def forkpty(directory: str, name: str) -> None:
    pid, terminal = os.forkpty()
    if pid:
        write(directory, name, outcome(pid))
        os.close(terminal)


@tasks.register("thread")
def of_thread(directory: str, name: str) -> None:
    """Fork on a thread that the task starts; its function returns in the child."""
    thread = threading.Thread(target=forked, args=[directory, name, lambda: None])
    thread.start()
    thread.join(_LONGEST)


@tasks.register("preexec")
def preexec(directory: str, name: str) -> None:
    program = subprocess.Popen(["sleep", "600"], preexec_fn=lambda: write(directory, name, handlers()))
    program.terminate()
    assert program.wait(_LONGEST) == -signal.SIGTERM
