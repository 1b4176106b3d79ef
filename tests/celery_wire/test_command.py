"""The `unstract-wire` command over a broker: worker, dead letters, and one line for unsupported operations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import brokers
import pytest
import servers
from celery import Celery, signature
from celery_wire.letters import (
    JSON,
    arguments,
    bury,
    bury_next,
    kit_over,
    letter_headers,
    letter_id,
    numbered,
    put_letters,
    standing,
)
from celery_wire.support import ALIVE, Pipe
from cli.outcomes import Ended, the_one_line
from click.testing import CliRunner, Result
from consumers import running
from queues import queue_name

from transports.celery import CeleryTransport
from unstract_core import Consumer, Tasks
from unstract_core.cli import main

ROOT = Path(__file__).parents[2]
WORKER = ("worker", "--app", "cli.shared:tasks")
WRONG = "s3cret-word"
Run = Callable[..., Result]


@pytest.fixture
def run(rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process, over RabbitMQ by default."""
    for name in ("UNSTRACT_WIRE_URL", "UNSTRACT_WIRE_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def invoke(*arguments: str, url: str = rabbitmq_url) -> Result:
        return CliRunner().invoke(main, [*arguments, "--url", url])

    return invoke


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command as a process with pipes; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def make(*arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-m", "unstract_core", *arguments]
        started.append(subprocess.Popen(command, text=True, env=environment, **pipes))
        return started[-1]

    yield make
    for process in started:
        with process:
            process.kill()


def rows(result: Result) -> Any:
    """Return the JSON document that a command has printed."""
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def with_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{parts.username}:{password}@{parts.netloc.rpartition('@')[2]}").geturl()


@pytest.mark.parametrize("broker", ["rabbitmq", "redis", "memory"])
def test_dead_letter_commands_work_over_a_broker(request: pytest.FixtureRequest, run: Run, broker: str) -> None:
    """The commands list, show, replay and purge the dead letters of a named queue, as over PostgreSQL."""
    ours = kombus = "memory://command"
    if broker == "memory":
        ours = f"celery+{kombus}"
    else:
        ours = kombus = request.getfixturevalue(f"{broker}_url")
    with kit_over(ours) as kit, kit.open() as transport:
        queue = kit.queue()
        for n, reason in enumerate(("first", "second", "third")):
            bury(transport, queue, {"n": n}, reason=f"{reason} reason", result={"paid": n})
        listed = rows(run("dead", "list", "--queue", queue, "--json", url=ours))
        assert [row["reason"] for row in listed] == ["third reason", "second reason", "first reason"]
        assert {(row["queue"], row["task_name"], row["attempts"]) for row in listed} == {(queue, "t", 1)}
        third, second, first = [row["id"] for row in listed]
        shown = run("dead", "show", second, url=ours)
        assert "reason       second reason\n" in shown.stdout
        assert '"paid": 1' in shown.stdout
        assert rows(run("dead", "show", second, "--json", url=ours))["message"]["args"] == [{"n": 1}]
        assert run("dead", "replay", third, first, url=ours).stdout == f"replayed 2\n{first}\n{third}\n"
        assert rows(run("dead", "purge", second, "--yes", "--json", url=ours)) == {"purged": 1}
        assert run("dead", "list", "--queue", queue, url=ours).stderr == "no dead letters\n"
        assert rows(run("dead", "replay", "--queue", queue, "--all", "--json", url=ours)) == {"replayed": []}
        assert [letter.decode()[0] for letter in standing(kombus, queue)] == [[{"n": 0}], [{"n": 2}]]


@pytest.mark.parametrize(
    "arguments", [("dead", "list"), ("dead", "purge", "--all", "--yes"), ("dead", "list", "--json")], ids=" ".join
)
def test_a_missing_queue_name_is_one_line(run: Run, arguments: tuple[str, ...]) -> None:
    """The error says that a broker cannot list its queues, and names --queue NAME as the remedy."""
    assert "name the queue of the dead letters (--queue NAME)" in the_one_line(run(*arguments))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("queues",), "cannot do this: a broker does not report the state of its queues. Use its own tools"),
        (("queues", "--queue", "q", "--json"), "Use its own tools"),
        (("migrate",), "has nothing to migrate; use it as it is"),
    ],
    ids=["queues", "a queue", "migrate"],
)
def test_an_unsupported_command_is_one_line(run: Run, arguments: tuple[str, ...], said: str) -> None:
    """An unsupported command prints one line with the transport's own text and the alternative."""
    assert said in the_one_line(run(*arguments))


def test_unknown_ids_stop_the_command(run: Run, transport: CeleryTransport, queue: str) -> None:
    """An unknown id, also one of another queue, is printed, and nothing is replayed or purged."""
    (id,) = bury(transport, queue, 1)
    others = [id.replace(queue, "absent"), "17", os.fsdecode(b"\xff/x"), f"{'q' * 300}/x"]
    for other in others:
        named = f"no dead letter {other}".encode("ascii", "backslashreplace").decode()
        for command in (("replay",), ("purge", "--yes")):
            assert named in the_one_line(run("dead", *command, id, other))
    assert "no dead letter x (see 'unstract-wire dead list')" in the_one_line(run("dead", "show", "x"))
    assert arguments(transport, queue) == [1]


def test_unreadable_messages_are_listed_and_shown(run: Run, queue: str, pipe: Pipe) -> None:
    """The list has the reason and `show` has the body, and no control character reaches the terminal."""
    pipe.declare(f"{queue}.dead")
    text = ("[[], {\x1b[2J", letter_headers(1, {"x-dead-reason": "why\n\x1b[2J"}), JSON)
    put_letters(pipe, queue, text, (b"\x80\x04\xff", letter_headers(2), "application/x-python-serialize"))
    _, newest, oldest = run("dead", "list", "--queue", queue).stdout.splitlines()
    assert newest.startswith(letter_id(queue, 2))
    assert oldest.endswith("why\\n\\x1b[2J")
    shown = run("dead", "show", letter_id(queue, 1)).stdout
    assert '"body": "[[], {\\u001b[2J"' in shown
    assert all(line.isprintable() for line in shown.splitlines())
    assert rows(run("dead", "show", letter_id(queue, 2), "--json"))["message"]["body"] == "gAT/"


def test_purge_uses_the_age(run: Run, queue: str, pipe: Pipe) -> None:
    """--older-than counts from the burial of a dead letter."""
    pipe.declare(f"{queue}.dead")
    put_letters(pipe, queue, *numbered(0, 500, 990))  # buried 1000, 500 and 10 seconds ago
    purge = ("dead", "purge", "--queue", queue, "--yes", "--json")
    assert rows(run(*purge, "--older-than", "600")) == {"purged": 1}
    assert rows(run(*purge, "--older-than", "600")) == {"purged": 0}
    assert [row["id"] for row in rows(run("dead", "list", "--queue", queue, "--json"))] == [
        letter_id(queue, 990),
        letter_id(queue, 500),
    ]
    assert rows(run(*purge)) == {"purged": 2}


def test_a_replay_answers_a_real_client(
    run: Run, product: Celery, transport: CeleryTransport, queue: str, make_queue: Callable[[], str], pipe: Pipe
) -> None:
    """The replayed task runs, its link is sent, and `AsyncResult.get()` returns."""
    callback_queue = make_queue()
    asked = product.send_task("double", args=[21], queue=queue, link=signature("saved", queue=callback_queue))
    asked_too = product.send_task("double", args=[4], queue=queue)
    bury_next(transport, queue, 2)
    tasks = Tasks()
    tasks.register("double")(lambda n: 2 * n)
    with running(Consumer(transport, tasks, [queue])):
        assert len(rows(run("dead", "replay", "--queue", queue, "--all", "--json"))["replayed"]) == 2
        assert asked_too.get(timeout=ALIVE) == 8
        callback = pipe.one(callback_queue)
    assert (callback.headers["task"], callback.headers["parent_id"], callback.args) == ("saved", asked.id, [42])


def test_a_plain_url_lists_quorum_dead_letters(run: Run, rabbitmq_url: str, pipe: Pipe) -> None:
    """A replay, which declares the queue, names the missing URL option, and works with it."""
    queue = queue_name()
    for name in (queue, f"{queue}.dead"):
        pipe.declare(name, **{"x-queue-type": "quorum"})
    put_letters(pipe, queue, *numbered(0, 1))
    for _ in range(3):
        assert len(rows(run("dead", "list", "--queue", queue, "--json"))) == 2
    replay = ("dead", "replay", "--queue", queue, "--all")
    said = the_one_line(run(*replay))
    assert f"declare queue '{queue}': the queue exists with other arguments: x-queue-type is" in said
    assert "?x-queue-type=quorum" in said
    assert run(*replay, url=f"{rabbitmq_url}?x-queue-type=quorum").stdout.startswith("replayed 2\n")
    assert [message.args for message in pipe.take(queue, 2)] == [[0], [1]]


def test_a_worker_finishes_on_sigterm(
    start: Callable[..., subprocess.Popen[str]], rabbitmq_url: str, product: Celery, queue: str, pipe: Pipe
) -> None:
    """Running tasks end and are answered, no new one starts, the rest stays in the queue, and the exit code is 0."""
    first, second = [product.send_task("wait_for_line", queue=queue) for _ in range(2)]
    process = start(*WORKER, "--queue", queue, "--url", rabbitmq_url)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate("the end\nanother\n", timeout=ALIVE)
    assert (process.returncode, out) == (0, "")
    assert first.get(timeout=ALIVE) == "the end"
    assert pipe.one(queue).headers["id"] == second.id
    password = urlsplit(rabbitmq_url).password
    (started,) = [line for line in err.splitlines() if "wire.worker_started" in line]
    assert f"transport={rabbitmq_url.replace(f':{password}@', ':***@')} queues={queue}" in started
    assert "wire.worker_stopped" in err
    assert "ran=1 settled=1" in err


def test_a_worker_without_broker_prints_one_line(
    start: Callable[..., subprocess.Popen[str]], rabbitmq_url: str
) -> None:
    """The exit code is 2, and the line has no password."""
    process = start(
        *WORKER, "--queue", "q", "--url", brokers.behind(with_password(rabbitmq_url, WRONG), servers.free_port())
    )
    out, err = process.communicate(timeout=ALIVE)
    line = the_one_line(Ended(process.returncode, out, err))
    assert "connect to the broker" in line
    assert "refused" in line
    assert WRONG not in line


COMMANDS = [(*WORKER, "--queue", "q"), ("dead", "list", "--queue", "q"), ("dead", "replay", "q/x")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_denied_access_is_one_line(run: Run, rabbitmq_url: str, command: tuple[str, ...]) -> None:
    """A wrong password and a missing virtual host print one line with the remedy and without the password."""
    line = the_one_line(run(*command, url=with_password(rabbitmq_url, WRONG)))
    assert "ACCESS_REFUSED" in line
    assert "Check the user, password, virtual host and permissions" in line
    assert WRONG not in line
    assert "vhost nowhere not found" in the_one_line(run(*command, url=f"{rabbitmq_url.rstrip('/')}/nowhere"))


def test_a_worker_explains_other_queue_arguments(run: Run, rabbitmq_url: str, pipe: Pipe) -> None:
    """One line names the queue, the argument, both values, and the URL option."""
    queue = pipe.declare(queue_name(), **{"x-max-priority": 10})
    line = the_one_line(run(*WORKER, "--queue", queue))
    assert f"declare queue '{queue}': the queue exists with other arguments: x-max-priority is" in line
    assert "'10'" in line
    assert "?x-max-priority=10" in line
    started = the_one_line(run(*WORKER, "--queue", queue, url=f"{rabbitmq_url}?x-max-priority=9"))
    assert "'9'" in started


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("declare=perhaps", "declare='perhaps'"),
        ("confirm_timeout=-1", "confirm_timeout must be a positive number"),
        ("pool_size=none", "pool_size='none'"),
    ],
)
def test_a_bad_url_option_is_one_line(run: Run, rabbitmq_url: str, query: str, said: str) -> None:
    """The line names the option."""
    assert said in the_one_line(run("dead", "list", "--queue", "q", url=f"{rabbitmq_url}?{query}"))


def test_a_missing_undeclared_queue_is_one_line(run: Run, rabbitmq_url: str) -> None:
    """With declare=no in the URL the line names a queue that does not exist."""
    queue = queue_name()
    line = the_one_line(run(*WORKER, "--queue", queue, url=f"{rabbitmq_url}?declare=no"))
    assert f"no queue '{queue}'" in line
