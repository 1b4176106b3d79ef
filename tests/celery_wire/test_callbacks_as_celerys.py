"""The callbacks of a Celery client's task equal those of a Celery worker, field by field.

Each call is made twice: to the queue of a Celery prefork worker and to that of a Consumer. The raw messages in the
callbacks' queue are compared; only ids and origins are masked. `KNOWN` has the known differences with their reasons.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import json
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import strategies as some
from celery import Celery, signature
from celery_wire.support import Pipe, Raw, default_queue
from consumers import running
from hypothesis import given, settings
from hypothesis import strategies as st
from queues import queue_name

from transports.celery import CeleryTransport
from unstract_core import Consumer, Tasks

FAIRNESS = {"org_id": "acme", "workload_type": "api", "pipeline_priority": 7}
tasks = Tasks()


@tasks.register("double")
def double(value: Any) -> Any:
    return [value, value]


@tasks.register("fail")
def fail() -> None:
    raise ValueError("bad")


@attrs.frozen
class Queues:
    """Where the same call is sent to twice, and where its callbacks arrive."""

    real: str
    ours: str
    callbacks: str

    @property
    def default(self) -> str:
        return default_queue(self.real)


@pytest.fixture(scope="module")
def queues(rabbitmq_url: str, worker_queue: str, pipe: Pipe) -> Iterator[Queues]:
    """A real worker and our Consumer, with the same default queue."""
    queues = Queues(worker_queue, pipe.declare(queue_name()), pipe.declare(queue_name()))
    transport = CeleryTransport(rabbitmq_url, default_queue=queues.default)
    with contextlib.closing(transport), running(Consumer(transport, tasks, [queues.ours])):
        yield queues


def fired(
    app: Celery, pipe: Pipe, queues: Queues, task: str, args: list[Any], number: int, options: dict[str, Any]
) -> list[list[dict[str, Any]]]:
    """Make a call twice, and return what the real worker and what ours have published then, masked."""
    published = []
    for queue in (queues.real, queues.ours):
        sent = app.send_task(task, args=args, queue=queue, **copy.deepcopy(options))
        links = [*options.get("link", []), *options.get("link_error", [])]
        source = queues.callbacks if all(link.options.get("queue") for link in links) else queues.default
        raw = pipe.take(source, number)
        groups = {message.headers["group"] for message in raw}
        assert len(groups) == 1  # of one group, or of none
        published.append(sorted((masked(one, sent.id) for one in raw), key=lambda one: json.dumps(one["headers"])))
    assert pipe.left(queues.callbacks) == []
    return published


def masked(raw: Raw, sent: str) -> dict[str, Any]:
    """Return a message in which ids stand for what they name, and nothing else is left out."""
    own = raw.headers["id"]
    known = functools.reduce(
        lambda text, pair: text.replace(*pair),
        [(sent, "<the sent task>"), (own, "<its own id>")],
        json.dumps([raw.headers, raw.properties, raw.body.decode()]),
    )
    headers, properties, text = json.loads(known)
    args, kwargs, embed = json.loads(text)
    if headers["group"] is not None:
        headers["group"] = "<a group>"
    if headers["eta"] is not None:
        headers["eta"] = round(datetime.datetime.fromisoformat(headers["eta"]).timestamp() / 1000)
    headers["origin"] = properties["reply_to"] = "-"
    return {
        "headers": headers,
        "order": list(raw.headers),
        "properties": properties,
        "body": {"args": args, "kwargs": kwargs, "embed": embed},
    }


def differences(real: Any, ours: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the paths at which two messages differ, with what stands there."""
    if real == ours:
        return {}
    if not isinstance(real, dict) or not isinstance(ours, dict):
        return {path: (real, ours)}
    differing: dict[str, tuple[Any, Any]] = {}
    for name in (*real, *(ours.keys() - real.keys())):
        where = f"{path}.{name}" if path else name
        differing.update(differences(real.get(name, "absent"), ours.get(name, "absent"), where))
    return differing


def to(queues: Queues, links: list[dict[str, Any]]) -> list[Any]:
    """Return signatures of a client's; one with `queue=None` names no queue."""
    made = []
    for link in links:
        options = {"queue": queues.callbacks} | link
        name = options.pop("task")
        made.append(signature(name, **{key: value for key, value in options.items() if value is not None}))
    return made


NESTED = {
    "task": "after",
    "args": [1],
    "kwargs": {},
    "options": {"queue": "q"},
    "subtask_type": None,
    "immutable": False,
}
LINKS: dict[str, list[dict[str, Any]]] = {
    "one": [{"task": "ok", "kwargs": {"k": 1}}],
    "several": [{"task": "a"}, {"task": "b", "args": [2]}, {"task": "c", "kwargs": {"callback": {}}}],
    "stored arguments": [{"task": "ok", "args": ["job-1", {"a": None}], "kwargs": {"é": [1.5]}}],
    "immutable": [{"task": "ok", "args": ["job-1"], "immutable": True}],
    "several immutable": [{"task": "a", "args": [1], "immutable": True}, {"task": "b", "immutable": True}],
    "without a queue": [{"task": "ok", "queue": None}],
    "with a link of its own": [{"task": "ok", "link": NESTED}],
    "with links of its own": [{"task": "ok", "link": [NESTED, NESTED], "link_error": [NESTED]}],
    "with a countdown": [{"task": "ok", "countdown": 100_000}],
    "with an id": [{"task": "ok", "task_id": "f0c9b5c1-4d8e-4a52-bb8e-0a6bb1d4c0de"}],
}


@pytest.mark.parametrize("shape", LINKS)
def test_links_are_sent_as_by_celery(product: Celery, queues: Queues, pipe: Pipe, shape: str) -> None:
    """After a success the links have the arguments, kwargs, queue, options, group and lineage of Celery."""
    options = {"link": to(queues, LINKS[shape])}
    real, ours = fired(product, pipe, queues, "double", [{"é": 5}], len(LINKS[shape]), options)
    assert ours == real


@pytest.mark.parametrize("shape", LINKS)
def test_errbacks_are_sent_as_by_celery(product: Celery, queues: Queues, pipe: Pipe, shape: str) -> None:
    """After a failure the errbacks have the id and their arguments, and are always a group, as from a Celery worker."""
    options = {"link_error": to(queues, LINKS[shape])}
    real, ours = fired(product, pipe, queues, "fail", [], len(LINKS[shape]), options)
    assert all(one["headers"]["group"] for one in ours)
    assert ours == real


@pytest.mark.parametrize(("task", "option"), [("double", "link"), ("fail", "link_error")])
def test_a_callback_has_celerys_lineage(product: Celery, queues: Queues, pipe: Pipe, task: str, option: str) -> None:
    """The parent of a callback is the task, its root is the task's root, and it does not join the task's group."""
    lineage = {"root_id": "the-root", "parent_id": "the-parent", "group_id": "the-group", "group_index": 3}
    options = {option: to(queues, [{"task": "a"}, {"task": "b"}]), **lineage}
    real, ours = fired(product, pipe, queues, task, [1] if task == "double" else [], 2, options)
    assert ours == real
    assert {one["headers"]["root_id"] for one in ours} == {"the-root"}
    assert {one["headers"]["parent_id"] for one in ours} == {"<the sent task>"}


link_lists = st.lists(
    st.fixed_dictionaries(
        {"task": some.names, "args": some.json_arrays, "kwargs": some.json_objects, "immutable": st.booleans()}
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda link: link["task"],
)


@settings(max_examples=40)
@given(links=link_lists, failing=st.booleans(), value=some.json_values)
def test_any_links_are_sent_as_by_celery(
    product: Celery, queues: Queues, pipe: Pipe, links: list[dict[str, Any]], failing: bool, value: Any
) -> None:
    """For every result and every link the messages equal those of a Celery worker, field by field."""
    options = {"link_error" if failing else "link": to(queues, links)}
    task, args = ("fail", []) if failing else ("double", [value])
    real, ours = fired(product, pipe, queues, task, args, len(links), options)
    assert ours == real


KNOWN: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], dict[str, tuple[Any, Any]]]] = {
    "a continuation has the priority of its parent": (
        "double",
        {"priority": 7},
        [{"task": "ok"}],
        {"properties.priority": (0, 7)},
    ),
    "an errback too": ("fail", {"priority": 7}, [{"task": "ok"}], {"properties.priority": (0, 7)}),
    "a continuation keeps the fairness of its parent": (
        "double",
        {"headers": {"x-fairness-key": FAIRNESS}},
        [{"task": "ok"}],
        {"headers.x-fairness-key": ("absent", FAIRNESS)},
    ),
    "a continuation is in the trace of its parent": (
        "double",
        {"headers": {"traceparent": "00-1-2-01"}},
        [{"task": "ok"}],
        {
            "headers.traceparent": ("absent", "00-1-2-01"),
            "headers.x-wire-headers": ("absent", {"traceparent": "00-1-2-01"}),
        },
    ),
    "the product's callbacks find the error's text where they look for it": (
        "fail",
        {},
        [{"task": "ok", "kwargs": {"callback_kwargs": {"run_id": "r"}}}],
        {
            "headers.kwargsrepr": (
                "{'callback_kwargs': {'run_id': 'r'}}",
                "{'callback_kwargs': {'run_id': 'r', 'error': 'ValueError: bad'}}",
            ),
            "body.kwargs.callback_kwargs.error": ("absent", "ValueError: bad"),
        },
    ),
}
"""By its reason: the task, the options of its call, its links, and where the real message differs from ours."""


@pytest.mark.parametrize("reason", KNOWN)
def test_callbacks_differ_only_as_listed(product: Celery, queues: Queues, pipe: Pipe, reason: str) -> None:
    """Callbacks have the additions of this package's design and no other difference from Celery's."""
    task, options, links, known = KNOWN[reason]
    option = {"link_error" if task == "fail" else "link": to(queues, links)}
    args = [] if task == "fail" else [1]
    ((real,), (ours,)) = fired(product, pipe, queues, task, args, 1, {**option, **options})
    differing = differences(real, ours)
    differing.pop("order", None)  # where a header is more
    assert differing == known
