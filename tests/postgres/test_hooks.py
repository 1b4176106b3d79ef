"""Observers of the worker command: the examples of docs/monitoring.md, and observers that cannot be loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sentry_sdk
from psycopg import sql
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport as SentryTransport
from supervised import worker

from contract_tests.kit import wait_until
from contract_tests.messages import message
from tools.check_lock import ROOT
from transports.postgres import PostgresTransport
from unstract_core import Consumer

_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def example(named: str) -> str:
    """Return the one block of docs/monitoring.md that defines this class."""
    blocks = _BLOCK.findall((ROOT / "docs" / "monitoring.md").read_text("utf-8"))
    (block,) = [block for block in blocks if f"class {named}(Observer)" in block]
    assert len(block.splitlines()) <= 13
    return str(block)


class Kept(SentryTransport):
    """Keeps what Sentry would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.envelopes: list[Envelope] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        self.envelopes.append(envelope)


@pytest.fixture
def sentry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    """Sentry's own client, which sends nothing anywhere."""
    kept, init = Kept(), sentry_sdk.init
    monkeypatch.setenv("SENTRY_DSN", "http://key@127.0.0.1:9/1")
    monkeypatch.setattr(
        sentry_sdk, "init", lambda *args, **options: init(*args, **options, transport=kept, default_integrations=False)
    )
    yield kept
    init(dsn="", default_integrations=False)  # whose own would wrap Celery in this process, for the other tests


def fail(document: str) -> None:
    raise ValueError("no total")


def test_sentry_example_reports_failed_tasks(postgres: PostgresTransport, queue: str, sentry: Kept) -> None:
    """Sentry gets the exception with its frames and the task's name, and no local variable."""
    space: dict[str, Any] = {}
    exec(example("Sentry"), space)  # noqa: S102 - the example of the docs, run as it stands there
    postgres.send([message("fail", queue, "the secret document")])
    Consumer(postgres, {"fail": fail}, [queue], max_attempts=1, observers=[space["Sentry"]()]).drain(timeout=30)
    (event,) = [event for envelope in sentry.envelopes if (event := envelope.get_event()) is not None]
    (exception,) = event["exception"]["values"]
    assert (exception["type"], exception["value"]) == ("ValueError", "no total")
    assert exception["stacktrace"]["frames"][-1]["function"] == "fail"
    assert event["tags"]["task"] == "fail"
    assert "secret document" not in json.dumps(event, default=str)


@pytest.fixture
def executions(postgres: PostgresTransport, postgres_url: str, schema: str) -> Iterator[str]:
    """A database URL on which `execution` is a table with the executions e1 and e2."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        table = sql.Identifier(schema, "execution")
        connection.execute(sql.SQL("CREATE TABLE {} (id text, status text, error text)").format(table))
        connection.execute(sql.SQL("INSERT INTO {} VALUES ('e1', 'EXECUTING'), ('e2', 'EXECUTING')").format(table))
        yield psycopg.conninfo.make_conninfo(postgres_url, options=f"-csearch_path={schema}")
        connection.execute(sql.SQL("DROP TABLE {}").format(table))


def test_marking_example_marks_failed_executions(
    postgres: PostgresTransport, queue: str, executions: str, postgres_url: str, schema: str, tmp_path: Path
) -> None:
    """In a supervised child, by `--observer`, the failed execution is marked with its error, the other is not."""
    (tmp_path / "marking.py").write_text(example("Marking"))
    (tmp_path / "executor.py").write_text(
        "def execute(context):\n"
        "    if context['execution_id'] == 'e1':\n"
        "        raise ValueError('no total')\n"
        "tasks = {'execute_extraction': execute}\n"
    )
    postgres.send([message("execute_extraction", queue, {"execution_id": f"e{n}"}) for n in (1, 2)])
    url = f"{postgres_url}?schema={schema}"
    arguments = ("--processes", "1", "--max-attempts", "1", "--observer", "marking:Marking")
    with (
        worker(
            *arguments,
            url=url,
            directory=tmp_path,
            app="executor:tasks",
            queues=[queue],
            more_environment={"PRODUCT_DATABASE": executions},
        ),
        psycopg.connect(executions, autocommit=True) as connection,
    ):
        wait_until(
            lambda: (
                connection.execute("SELECT * FROM execution ORDER BY id").fetchall()
                == [("e1", "ERROR", "ValueError: no total"), ("e2", "EXECUTING", None)]
            ),
            timeout=30,
            what="the failed execution to be marked",
        )


@pytest.mark.parametrize(
    ("observer", "reason"),
    [
        ("nosuchmodule:Observer", "nosuchmodule"),
        ("hooks:Nothing", "has no 'Nothing'"),
        ("hooks", "module:name"),
        ("hooks:number", "is a int"),
        ("hooks:stranger", "is not an unstract_core.Observer"),
        ("hooks:broken", "KeyError: 'SENTRY_DSN' ("),
        ("hooks:picky", "picky"),
    ],
)
@pytest.mark.parametrize("processes", [(), ("--processes", "2")], ids=["alone", "supervised"])
def test_unavailable_observer_is_a_one_line_error(
    tmp_path: Path, observer: str, reason: str, processes: tuple[str, ...]
) -> None:
    """The worker does not start: exit code 2, and one line with the option and the reason."""
    (tmp_path / "hooks.py").write_text(
        "number = 7\n"
        "def stranger(): return object()\n"
        "def broken(): raise KeyError('SENTRY_DSN')\n"
        "def picky(argument): pass\n"
    )
    with worker("--observer", observer, *processes, url="memory://", directory=tmp_path) as command:
        assert command.ends() == 2
    (line,) = [line for line in command.log if " INFO " not in line]
    assert line.startswith("unstract-wire: ")
    assert "--observer" in line
    assert reason in line
