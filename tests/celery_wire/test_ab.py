"""The same dispatch on Postgres with a Consumer, on RabbitMQ with a Consumer, and on RabbitMQ with a Celery worker.

Each of the product's three methods makes every row of the design's table (ab_rows.py), and the product's call sites run
from the view to the event. The visible results are equal on all sides, or are in a closed list with their reasons
(ab_differences.py).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import attrs
import brokers
import pytest
from celery import signature
from celery_wire import ab_product
from celery_wire.ab_differences import DIFFERENCES, Difference, expected
from celery_wire.ab_product import FLOWS
from celery_wire.ab_rows import DOCUMENT, FAIRNESS, KWARGS, LATE, ROWS, TRIALS, Row, Seen, Way, comparable
from celery_wire.ab_sides import (
    Fired,
    OnCelery,
    OnPostgres,
    OnRabbitMQ,
    Side,
    consumer_of,
    continuation,
    fresh_id,
    three_sides,
)
from celery_wire.support import ALIVE, Pipe, real_worker
from consumers import running
from pg_tables import Tables
from proxy import proxy
from queues import queue_name
from servers import fresh_schema

from contract_tests.kit import wait_until
from examples.product import DocumentContext
from transports.celery import CeleryTransport, celery_tasks
from transports.postgres import PostgresTransport
from unstract_core import NotSupported, RoutingDispatcher
from unstract_core.producer.executor import QUEUE_PREFIX

QUIET = 0.2
"""Seconds in which nothing more must happen."""


@pytest.fixture(scope="module")
def sides(embedded_url: str, rabbitmq_url: str, redis_url: str) -> Iterator[dict[str, Side]]:
    with fresh_schema(embedded_url) as schema, contextlib.closing(PostgresTransport(embedded_url, schema)) as transport:
        transport.migrate()
        with three_sides(transport, Tables(embedded_url, schema), rabbitmq_url, redis_url) as sides:
            yield sides


@pytest.mark.parametrize(("row", "way"), [trial for trial in TRIALS if not ROWS[trial[0]].lost])
def test_both_sides_differ_as_listed(sides: dict[str, Side], row: str, way: Way, tmp_path: Path) -> None:
    """Runs, answers, callbacks, texts, statuses and dead letters are the same on both sides, except as listed."""
    awaited = {name: expected(name, row, way) for name in sides}
    trials = {name: Trial(side, ROWS[row], way, tmp_path / name) for name, side in sides.items()}
    for trial in trials.values():
        trial.dispatch()

    def seen() -> dict[str, Seen]:
        return {name: trial.look() for name, trial in trials.items()}

    deadline = time.monotonic() + ALIVE
    while seen() != awaited and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(QUIET)
    assert seen() == awaited


@pytest.mark.parametrize("difference", DIFFERENCES, ids=range(len(DIFFERENCES)))
def test_every_listed_difference_exists(difference: Difference) -> None:
    """Each listed difference shows in a scenario, and no two differences are about the same subject."""
    assert difference.shown
    for row, ways in difference.shown.items():
        for way, shown in ways.items():
            seen = ROWS[row].expected(way)
            assert all(getattr(seen, field) != value for field, value in shown.items())
            others = [one for one in DIFFERENCES if one.side == difference.side and one is not difference]
            assert not any(shown.keys() & one.shown.get(row, {}).get(way, {}).keys() for one in others)


@attrs.define
class Trial:
    """One dispatch, on one side."""

    side: Side
    row: Row
    way: Way
    scratch: Path
    id: str = attrs.field(factory=fresh_id)
    queue: str = attrs.field(factory=queue_name)
    answer: Any = None
    fired: list[Fired] = attrs.field(factory=list)
    dead: list[str] = attrs.field(factory=list)

    def dispatch(self) -> None:
        self.scratch.mkdir()
        row, way = self.row, self.way
        links = {}
        if way in ("callbacks", "on_success alone"):
            links["on_success"] = continuation("complete", KWARGS, self.queue)
        if way in ("callbacks", "on_error alone"):
            links["on_error"] = continuation("error", KWARGS, self.queue)
        if row.injected is not None:
            context = self.context().to_dict()
            self.side.inject(row.injected, [context], self.id, links, answer=way == "a reply")
        elif way == "a reply":
            self.answer = self.called(timeout=0.8 if row.silent else ALIVE)
        elif way == "neither":
            self.id = self.side.methods.dispatch_async(self.context())
        else:
            signatures = {
                name: signature(link["task_name"], kwargs=copy.deepcopy(link["kwargs"]), queue=link["queue"])
                for name, link in links.items()
            }
            headers = {"x-fairness-key": FAIRNESS} if row.for_an_organisation else None
            handle = self.side.methods.dispatch_with_callback(
                self.context(), task_id=self.id, headers=headers, **signatures
            )
            assert handle.id == self.id

    def called(self, timeout: float) -> Any:
        """Return what the caller got; the texts of a timeout are each side's own."""
        result = self.side.methods.dispatch(self.context(), timeout=timeout)
        late = result.error is not None and f"{timeout:g} s" in result.error
        return LATE if late else comparable(result.to_dict())

    def context(self) -> DocumentContext:
        params = {
            "deed": self.row.deed,
            "value": self.row.value,
            "document_id": DOCUMENT,
            "runs": str(self.runs),
            "word": str(self.word),
        }
        return DocumentContext(
            executor_name=self.side.executor,
            run_id="r",
            executor_params=params,
            request_id="q",
            log_events_id="l",
        )

    @property
    def runs(self) -> Path:
        return self.scratch / "runs"

    @property
    def word(self) -> Path:
        """The file whose existence ends a waiting task."""
        return self.scratch / "word"

    def count_runs(self) -> int:
        return len(self.runs.read_text().splitlines()) if self.runs.exists() else 0

    def look(self) -> Seen:
        self.fired += self.side.fired(self.queue)
        self.dead += self.side.buried()
        if self.row.injected is not None and self.way == "a reply":
            self.answer = self.side.answer(self.id)
        return self.masked(
            Seen(
                runs=self.count_runs(),
                caller=self.answer,
                callbacks=tuple(self.fired),
                status=None if self.way == "a reply" else self.status(),
                waiting=self.side.waiting(),
                buried=tuple(self.dead),
            )
        )

    def status(self) -> Any:
        try:
            reply = self.side.methods.status(self.id)
        except NotSupported:
            return "not kept"
        if reply is None:
            return None
        return (reply.status, comparable(reply.result) if reply.status == "completed" else reply.error)

    def masked(self, seen: Seen) -> Seen:
        """Let ids and queues stand for what they name."""
        names = {self.id: "<the id>", QUEUE_PREFIX + self.side.executor: "<the queue>"}

        def mask(value: Any) -> Any:
            if isinstance(value, str):
                return functools.reduce(lambda text, pair: text.replace(*pair), names.items(), value)
            if isinstance(value, list | tuple):
                return type(value)(map(mask, value))
            if isinstance(value, dict):
                return {key: mask(member) for key, member in value.items()}
            if isinstance(value, Fired):
                return attrs.evolve(value, args=mask(comparable(value.args)), kwargs=mask(value.kwargs))
            return value

        return Seen(**{field.name: mask(getattr(seen, field.name)) for field in attrs.fields(Seen)})


@pytest.mark.parametrize("way", ROWS["lease lost"].ways)
@pytest.mark.parametrize("name", ["Postgres", "RabbitMQ", "Celery"])
def test_a_lost_claim_differs_as_listed(
    sides: dict[str, Side], name: str, way: Way, rabbitmq_url: str, redis_url: str, tmp_path: Path
) -> None:
    """When another worker runs a task that the first one still runs, each side behaves as listed."""
    awaited = expected(name, "lease lost", way)
    side = sides[name].beside()
    trial = Trial(side, ROWS["lease lost"], way, tmp_path / "trial")
    with one_worker(side, rabbitmq_url, redis_url) as claim_taken, in_background(trial.dispatch):
        wait_until(lambda: trial.count_runs() == 1, timeout=ALIVE, what="the task to run")
        with claim_taken():
            wait_until(lambda: trial.count_runs() == awaited.runs, timeout=ALIVE, what="another to run it")
            trial.word.touch()
            wait_until(lambda: trial.look().waiting == 0, timeout=ALIVE, what="one of them to settle")
            if way != "neither":
                wait_until(
                    lambda: trial.look().callbacks or trial.answer, timeout=ALIVE, what="its outcome to be reported"
                )
        deadline = time.monotonic() + ALIVE
        while trial.look() != awaited and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(QUIET)
        assert trial.look() == awaited
        assert len({one.id for one in trial.fired}) == (way == "callbacks")


@contextlib.contextmanager
def in_background(work: Callable[[], None]) -> Iterator[None]:
    """Do it beside the block, for it may wait for what the block does; what it raises is raised at the end."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        yield
        done.result(ALIVE)


Taken: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def one_worker(side: Side, broker: str, backend: str) -> Iterator[Taken]:
    """Run one executor worker for a side; yield what takes its claim from it, with another worker at hand."""
    tasks = celery_tasks(ab_product.executor)
    address = urlsplit(broker)
    with contextlib.ExitStack() as cleanup:
        between = cleanup.enter_context(proxy(address.hostname or "127.0.0.1", address.port or 5672))
        far = brokers.behind(broker, between.port)

        @contextlib.contextmanager
        def expired() -> Iterator[None]:
            assert isinstance(side, OnPostgres)
            with running(consumer_of(side.transport, tasks, side.queue)):
                side.tables.execute("UPDATE {messages} SET vt = now() WHERE queue_name = %s", side.queue)
                yield

        @contextlib.contextmanager
        def cut_off() -> Iterator[None]:
            assert isinstance(side, OnRabbitMQ)
            with running(consumer_of(side.transport, tasks, side.queue)):
                between.away = True
                between.cut()
                yield
            between.away = False

        @contextlib.contextmanager
        def cut() -> Iterator[None]:
            time.sleep(1.0)  # the worker acknowledges when it hears that the task has begun
            between.cut()
            yield

        match side:
            case OnPostgres():
                cleanup.enter_context(running(consumer_of(side.transport, tasks, side.queue)))
                yield expired
            case OnRabbitMQ():
                transport = cleanup.enter_context(contextlib.closing(CeleryTransport(far)))
                side.pipe.declare(side.queue)
                cleanup.enter_context(running(consumer_of(transport, tasks, side.queue)))
                yield cut_off
            case OnCelery():
                side.pipe.declare(side.queue)
                worker = real_worker(broker, [side.queue], app="ab_product:executor", backend=backend, through=far)
                cleanup.enter_context(worker)
                yield cut


@pytest.mark.parametrize("deed", ["succeed", "do_not_succeed", "raise_one"])
@pytest.mark.parametrize("flow", FLOWS)
def test_a_product_view_shows_the_same_event(sides: dict[str, Side], flow: str, deed: str, tmp_path: Path) -> None:
    """The product's view, dispatch, executor and callback send one event, with the same fields on both sides."""
    rooms = {name: tmp_path / name for name in sides}
    ids = {name: view(side, flow, deed, rooms[name]) for name, side in sides.items()}

    def events() -> dict[str, list[Any]]:
        return {name: read_room(room, ids[name]) for name, room in rooms.items()}

    wait_until(lambda: all(events().values()), timeout=ALIVE, what="an event in every room")
    time.sleep(QUIET)
    shown = events()
    known = shown["Postgres"][0].get("error")
    if deed == "raise_one":  # known: a callback of Celery's asks the result backend, which has no type
        assert known == "ValueError: it does not add up"
        shown["Celery"] = [{**event, "error": f"ValueError: {event['error']}"} for event in shown["Celery"]]
    assert {len(shown[name]) for name in shown} == {1}
    assert shown["RabbitMQ"] == shown["Postgres"]
    assert shown["Celery"] == shown["Postgres"]


def view(side: Side, flow: str, deed: str, room: Path) -> str:
    """Dispatch as a view of the product does before it answers 202; both signatures share one dict."""
    operation, on_success, on_error = FLOWS[flow]
    context = DocumentContext(
        executor_name=side.executor,
        operation=operation,
        run_id="run-1",
        executor_params={"deed": deed, "document_id": DOCUMENT, "runs": os.devnull},
        request_id="request-1",
        log_events_id=str(room),
    )
    task_id = fresh_id()
    cb_kwargs: dict[str, Any] = {
        "log_events_id": str(room),
        "request_id": "request-1",
        "org_id": context.organization_id,
        "user_id": "user-1",
        "document_id": DOCUMENT,
        "tool_id": "tool-1",
        "run_id": context.run_id,
        "profile_manager_id": "profile-1",
        **MORE.get(operation, {}),
    }
    cb_kwargs["executor_task_id"] = task_id
    handle = side.methods.dispatch_with_callback(
        context,
        on_success=signature(on_success, kwargs={"callback_kwargs": cb_kwargs}, queue=side.callbacks),
        on_error=signature(on_error, kwargs={"callback_kwargs": cb_kwargs}, queue=side.callbacks),
        task_id=task_id,
    )
    return handle.id


MORE: dict[str, dict[str, Any]] = {
    "ide_index": {"doc_id_key": "key-1", "file_name": "résumé.pdf"},
    "answer_prompt": {
        "operation": "answer_prompt",
        "prompt_ids": ["p-1", "p-2"],
        "is_single_pass": False,
        "dispatch_time": 1767323045.25,
    },
    "single_pass_extraction": {
        "operation": "single_pass_extraction",
        "prompt_ids": ["p-1"],
        "is_single_pass": True,
        "dispatch_time": 1767323045.25,
    },
}
"""The kwargs of a call site's callbacks besides the common ones."""


def read_room(room: Path, task_id: str) -> list[Any]:
    """Return the events that were pushed into a room, each of the dispatch that the view answered with."""
    events = [json.loads(line) for line in room.read_text().splitlines()] if room.exists() else []
    assert {event.pop("task_id") for event in events} <= {task_id}
    return events


@pytest.mark.parametrize("deed", ["succeed", "raise_one"])
@pytest.mark.parametrize("on", [True, False])
def test_a_status_is_found_after_a_flag_change(sides: dict[str, Side], on: bool, deed: str, tmp_path: Path) -> None:
    """Work in flight keeps its transport: the status is found for both positions of the flag."""
    flag = on
    router = RoutingDispatcher(
        gate=lambda context: flag, on=sides["Postgres"].methods, off=sides["Celery"].methods, gate_timeout=None
    )
    trial = Trial(sides["Postgres" if on else "Celery"], Row(deed), "callbacks", tmp_path)
    queue = trial.queue
    handle = router.dispatch_with_callback(
        trial.context(),
        on_success=signature("complete", kwargs=KWARGS, queue=queue),
        on_error=signature("error", kwargs=KWARGS, queue=queue),
    )
    flag = not on
    wait_until(lambda: router.status(handle.id), timeout=ALIVE, what="the status of a dispatch before the flip")
    reply = router.status(handle.id)
    assert reply is not None
    assert (reply.status, reply.error) == (
        ("completed", "") if deed == "succeed" else ("failed", "ValueError: it does not add up")
    )


def test_an_unanswered_dispatch_fails_at_its_deadline(sides: dict[str, Side], pipe: Pipe) -> None:
    """`dispatch` returns a failure at its deadline, which names the queue and the seconds, and does not raise."""
    for side in sides.values():
        nobody = queue_name()
        context = DocumentContext(
            executor_name=nobody, run_id="r", executor_params={}, request_id="q", log_events_id="l"
        )
        pipe.declare(QUEUE_PREFIX + nobody)
        result = side.methods.dispatch(context, timeout=0.3)
        assert not result.success
        assert result.error is not None
        assert f"{QUEUE_PREFIX}{nobody}" in result.error
        assert "0.3 s" in result.error
