"""Payload content is never logged: by this package or a driver, at any level, for any outcome of a task."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import kombu
import pytest
import servers
from celery_wire.support import delete_queues
from cli.records import EveryRecord
from core.signatures import as_object, fields_of
from pg_tables import Tables
from queues import queue_name

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from unstract_core import (
    Dispatcher,
    ExecutorDispatcher,
    RoutingDispatcher,
    Transport,
    TransportError,
    load_transport,
)

MARK = uuid.uuid4().hex[:8]
"""Part of every secret and of nothing else, so output with it shows a secret."""
_NUMBERS = itertools.count(1)
BOTH = {"task_raised", "task_retry_asked", "message_rejected", "result_made_to_fit"}
POSTGRESQL = BOTH | {"lease_lost", "settlement_refused", "transport_away", "transport_back"}


def secret(where: str) -> str:
    """Return a new secret, which names the place where it is used."""
    return f"{where}-{next(_NUMBERS)}-{MARK}"


def leaks(text: str) -> list[str]:
    """Return the lines that show a secret in any encoding."""
    forms = (MARK, MARK.encode().hex(), MARK[::-1])
    return [line for line in text.splitlines() if any(form in line for form in forms)]


def callbacks(queue: str) -> dict[str, Any]:
    return {
        "on_success": then("note", queue, secret=secret("success"), callback_kwargs={"k": secret("nested")}),
        "on_error": then("note", queue, secret=secret("error"), callback_kwargs={"k": secret("nested")}),
    }


def every_outcome(transport: Transport, queue: str) -> None:
    """Send messages for every outcome: with a reply, with continuations, and with neither."""
    for task in ("give", "fail", "give_unfit", "ask_again", "unknown"):
        sent = {"args": [secret("args")], "kwargs": {"more": secret("kwargs")} if task in ("give", "fail") else {}}
        for more in (callbacks(queue), {"reply_key": f"key-{uuid.uuid4()}"}, {}):
            task_id = {} if "reply_key" in more else {"task_id": str(uuid.uuid4())}
            transport.send([message(task, queue, *sent["args"], **{**task_id, **more}, kwargs=sent["kwargs"])])


@attrs.define
class Executing:
    """An execution context like the product's, with secrets."""

    executor_name: str
    run_id = request_id = operation = organization_id = "r"

    def to_dict(self) -> dict[str, Any]:
        return {"run_id": "r", "secret": secret("context"), "executor_name": self.executor_name}


def produce(transport: Transport, queue: str) -> None:
    """Dispatch by every method, also with refused arguments, with secrets in all of them."""
    dispatcher = Dispatcher(transport)
    executors = ExecutorDispatcher(dispatcher)

    def gate(context: Any) -> bool:
        raise ValueError(secret("gate"))

    signature = as_object(fields_of(kwargs={"k": secret("signature")}, options={"queue": queue}))
    dispatcher.send_with_callback("give", args=[secret("args")], queue=queue, on_success=signature, on_error=signature)
    routing = RoutingDispatcher(gate=gate, on=executors, off=executors)
    for dispatching in (executors, routing):
        dispatching.dispatch_with_callback(Executing(queue), on_success=signature)
        dispatching.dispatch(Executing(queue), timeout=0.1)
    for unfit in ({"k": object()}, {"k": float("nan")}, {"k": f"{secret('bad')}\0"}):
        with contextlib.suppress(ValueError):
            dispatcher.send("give", kwargs=unfit | {"other": secret("kwargs")}, queue=queue)


class Worker:
    """The command as a process; `output` has all its output."""

    def __init__(self, url: str, queue: str, output: Path, *options: str) -> None:
        self.output = output
        with output.open("wb") as stream:
            app = ("--app", "cli.secretive:tasks", "--queue", queue, "--url", url)
            limits = ("--log-level", "DEBUG", "--max-attempts", "2", "--lease", "30", *options)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "unstract_core", "worker", *app, *limits],
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
            )

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def tells(self, event: str, times: int = 1) -> None:
        wait_until(
            lambda: self.said.count(f"wire.{event}") >= times, timeout=60, what=f"{event} in {self.said[-2000:]}"
        )

    def ends(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def make(url: str, queue: str, *options: str) -> Worker:
        started.append(Worker(url, queue, tmp_path / f"worker-{len(started)}", *options))
        return started[-1]

    yield make
    for worker in started:
        worker.kill()


def events(text: str) -> set[str]:
    return set(re.findall(r" wire\.(\w+)", text))


def test_no_payload_content_is_logged_over_postgresql(work: Callable[..., Worker], tmp_path: Path) -> None:
    """No process logs payload content at any level, for every outcome of a task and during an outage."""
    queue = queue_name()
    with servers.private_server() as server, EveryRecord() as records:
        tables = Tables(server.url, "unstract")
        password = secret("password")
        url = server.url.replace("postgres@", f"postgres:{password}@")
        with contextlib.closing(load_transport(url)) as transport:
            transport.migrate()  # type: ignore[attr-defined]
            tables.execute("ALTER TABLE {messages} ADD CONSTRAINT closed CHECK (queue_name !~ '-closed$')")
            every_outcome(transport, queue)
            produce(transport, queue)
            tables.inject(queue, json.dumps({"task_name": 7, "kwargs": secret("malformed"), secret("key"): 1}))
            tables.inject(queue, json.dumps([secret("malformed")]))
            refused = then("note", f"{queue}-closed", secret=secret("refused"))
            transport.send([message("give", queue, secret("args"), on_success=refused, task_id=secret("id")[:8])])
            with contextlib.suppress(TransportError):
                transport.send([message("give", f"{queue}-closed", secret("args"))])
            worker = work(url, queue, "--concurrency", "4")
            for name in ("lost", "away"):
                path = str(tmp_path / name)
                transport.send([message("hold", queue, secret("args"), path, task_id=name, **callbacks(queue))])
                wait_until(Path(f"{path}.runs").exists, timeout=60, what="the task to run")
                if name == "lost":
                    tables.execute("UPDATE {messages} SET read_ct = read_ct + 1 WHERE message ->> 'task_id' = %s", name)
                    Path(path).touch()
                    worker.tells("lease_lost")
            server.stop("immediate")
            Path(path).touch()
            worker.tells("transport_away")
            with contextlib.suppress(TransportError):
                transport.send([message("give", queue, secret("args"))])
            ExecutorDispatcher(Dispatcher(transport)).dispatch(Executing(queue), timeout=0.1)
            server.start()
            worker.tells("transport_back")
            wait_until(lambda: tables.count(queue) <= 1, timeout=60, what="the queue to be worked off")  # one was lost
            assert tables.rows("SELECT count(*) FROM {dead} WHERE message::text LIKE %s", f"%{MARK}%")[0][0] > 3
            assert worker.ends() == 0
        assert events(worker.said) >= POSTGRESQL
        assert leaks(worker.said) == []
        assert leaks(records.text()) == []
        assert "gate_failed" in records.text()


def test_no_payload_content_is_logged_over_a_broker(
    rabbitmq_url: str, work: Callable[..., Worker], tmp_path: Path
) -> None:
    """No process logs payload content over RabbitMQ, with kombu and amqp at DEBUG."""
    queue = queue_name()
    try:
        with EveryRecord() as records, contextlib.closing(load_transport(rabbitmq_url)) as transport:
            every_outcome(transport, queue)
            produce(transport, queue)
            with kombu.Connection(rabbitmq_url) as connection:
                headers = {"lang": "py", "task": "give", "id": "1", "argsrepr": secret("repr")}
                for body, more in ((secret("malformed"), {}), (json.dumps([[], secret("malformed")]), headers)):
                    connection.Producer().publish(
                        body, routing_key=queue, headers=more, content_type="application/json", serializer=None
                    )
            last = tmp_path / "last"
            last.touch()
            worker = work(rabbitmq_url, queue)
            for event in BOTH:
                worker.tells(event)
            transport.send([message("hold", queue, secret("args"), str(last))])
            wait_until(Path(f"{last}.runs").exists, timeout=60, what="the last task to run")
            assert worker.ends() == 0
        assert leaks(worker.said) == []
        assert leaks(records.text()) == []
        assert "amqp" in records.text()
    finally:
        delete_queues(rabbitmq_url, [queue])
