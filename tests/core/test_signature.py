"""Callback signatures as objects, as mappings and as Celery's own: translated without loss, or rejected."""

from __future__ import annotations

import copy
import enum
import json
import re
import types
from collections.abc import Callable
from typing import Any

import celery
import pytest
import strategies as some
from celery.canvas import Signature
from core.signatures import as_object, fields_of
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import ContinuationSpec, SignatureError, TaskPayload, signature_to_continuation, to_wire

App = celery.Celery("tests", set_as_current=False)


@App.task(name="work", shared=False)  # type: ignore[untyped-decorator]  # celery has no types
def work(number: int) -> int:
    return number


class Name(str, enum.Enum):  # noqa: UP042 - the older form is what the product's own enums use
    QUEUE = "q"


def as_mapping(fields: dict[str, Any]) -> Any:
    return fields


def as_proxy(fields: dict[str, Any]) -> Any:
    return types.MappingProxyType(fields)


def as_celery(fields: dict[str, Any]) -> Any:
    return Signature.from_dict({"args": (), "kwargs": {}, "options": {}, **fields}, app=App)


FORMS: list[Callable[[dict[str, Any]], Any]] = [as_object, as_mapping, as_proxy, as_celery]
in_every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


def refusal(signature: Any) -> SignatureError:
    with pytest.raises(SignatureError) as caught:
        signature_to_continuation(signature)
    assert isinstance(caught.value, ValueError)
    return caught.value


@in_every_form
@given(task=some.names, kwargs=some.json_objects, queue=some.names)
def test_signature_becomes_task_kwargs_and_queue(
    form: Callable[[dict[str, Any]], Any], task: str, kwargs: dict[str, Any], queue: str
) -> None:
    """A continuation carries the task, the kwargs and the queue unchanged."""
    spec = signature_to_continuation(form(fields_of(task=task, kwargs=kwargs, options={"queue": queue})))
    assert spec is not None
    assert (spec.task_name, spec.queue) == (task, queue)
    assert some.same(spec.kwargs, kwargs)


def test_none_is_no_continuation() -> None:
    """No callback means no continuation."""
    assert signature_to_continuation(None) is None


@given(kwargs=some.json_objects)
def test_every_form_of_celery_signature_is_accepted(kwargs: dict[str, Any]) -> None:
    """Each form of the product's call sites, also the serialised one, gives the same continuation."""
    expected = ContinuationSpec(task_name="ide_prompt_complete", kwargs=kwargs, queue="ide_callback")
    made = celery.signature("ide_prompt_complete", kwargs=kwargs, queue="ide_callback", app=App)
    cloned = celery.signature("ide_prompt_complete", kwargs=kwargs, app=App).set(queue="ide_callback")
    for signature in (made, cloned, made.clone(), dict(made), json.loads(json.dumps(made))):
        assert signature_to_continuation(signature) == expected


def test_signatures_with_shared_kwargs_stay_independent() -> None:
    """Two signatures may share a dict; later changes reach neither the other one nor the message."""
    cb_kwargs: dict[str, Any] = {"executor_task_id": "id", "prompt_ids": ["p"]}
    ok = celery.signature("ok", kwargs={"callback_kwargs": cb_kwargs}, queue="ide_callback", app=App)
    failed = celery.signature("err", kwargs={"callback_kwargs": cb_kwargs}, queue="ide_callback", app=App)
    on_success, on_error = signature_to_continuation(ok), signature_to_continuation(failed)
    payload = TaskPayload(task_name="t", queue="q", on_success=on_success, on_error=on_error)
    before = copy.deepcopy(to_wire(payload))
    cb_kwargs["prompt_ids"].append("late")
    cb_kwargs["late"] = True
    ok.kwargs["late"] = True
    assert to_wire(payload) == before
    assert on_success is not None
    assert on_error is not None
    assert not some.containers_of(on_success.kwargs) & some.containers_of(on_error.kwargs)


@in_every_form
@given(kwargs=some.convertibles.map(lambda value: {"x": value}))
def test_kwargs_are_normalised_in_a_copy(form: Callable[[dict[str, Any]], Any], kwargs: dict[str, Any]) -> None:
    """The kwargs are normalised, and the caller's signature is not modified."""
    signature = form(fields_of(kwargs=kwargs))
    spec = signature_to_continuation(signature)
    assert spec is not None
    assert some.outside(spec.kwargs) is None
    held = signature.kwargs if form in (as_object, as_celery) else signature["kwargs"]
    assert held is kwargs or held == kwargs


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("$.task", {"task": ""}),
    ("$.task", {"task": None}),
    ("$.task", {"task": 7}),
    ("$.options.queue", {"options": {}}),
    ("$.options.queue", {"options": {"queue": ""}}),
    ("$.options.queue", {"options": {"queue": None}}),
    ("$.options.queue", {"options": {"queue": 7}}),
    ("$.args", {"args": (1,)}),
    ("$.args", {"args": [None]}),
    ("$.immutable", {"immutable": True}),
    ("$.kwargs.x", {"kwargs": {"x": object()}}),
    ("$.kwargs.a[1]", {"kwargs": {"a": [1, float("nan")]}}),
    *((f"$.options.{name}", {"options": {"queue": "q", name: value}}) for name, value in {
        "countdown": 5, "eta": "2026-01-01T00:00:00", "expires": 60, "priority": 3, "retry": True, "serializer": "json",
        "link": [{"task": "next"}], "link_error": [{"task": "next"}], "routing_key": "r", "exchange": "e", "headers":
        {"a": 1}, "task_id": "id", "time_limit": 5, "soft_time_limit": 5, "chord": {"task": "c"}, "group_id": "g",
        "stamped_headers": ["s"], "ignore_result": True, "reply_to": "r", "shadow": "s", "compression": "gzip",
        "an_option_of_the_future": 1,
    }.items()),
]  # fmt: skip


@in_every_form
@pytest.mark.parametrize(
    ("path", "changed"), REFUSED, ids=[f"{number} {path}" for number, (path, _) in enumerate(REFUSED)]
)
def test_lossy_signature_is_rejected_with_its_path(
    form: Callable[[dict[str, Any]], Any], path: str, changed: dict[str, Any]
) -> None:
    """A signature with more than a continuation carries is rejected with the part that would be lost."""
    error = refusal(form(fields_of(**changed)))
    assert error.path == path
    if path.startswith("$.options.") and path != "$.options.queue":
        assert path.rpartition(".")[2] in str(error)


@pytest.mark.parametrize("form", [as_object, as_mapping, as_proxy], ids=lambda form: form.__name__)
@pytest.mark.parametrize("kind", ["chain", "group", "chord", "map", "starmap", "xmap", "chunks"])
def test_canvas_is_rejected_by_its_kind(form: Callable[[dict[str, Any]], Any], kind: str) -> None:
    """A signature with a subtask_type is rejected."""
    error = refusal(form(fields_of(subtask_type=kind)))
    assert error.path == "$.subtask_type"
    assert kind in str(error)


def test_celery_canvases_are_rejected() -> None:
    """A real chain, group, chord, chunk or map is rejected, as an object and serialised."""
    one = celery.signature("one", queue="q", app=App)
    for canvas in (
        celery.chain(one, one.clone(), app=App).set(queue="q"),
        celery.group([one, one.clone()], app=App).set(queue="q"),
        celery.chord([one.clone()], one.clone(), app=App).set(queue="q"),
    ):
        assert refusal(canvas).path == "$.subtask_type"
        assert refusal(dict(canvas)).path == "$.subtask_type"
    for tasks in (work.map([1, 2]), work.starmap([(1,), (2,)]), work.chunks([(1,), (2,)], 1)):
        refusal(tasks.set(queue="q"))
        refusal(dict(tasks.set(queue="q")))


def test_celery_options_are_rejected() -> None:
    """Positional args, si(), countdown, expires, links and stamps of a real signature are rejected."""

    def sig(*args: Any, **options: Any) -> Signature:
        return celery.signature("one", args=args, queue="q", app=App, **options)

    linked = sig()
    linked.link(sig())
    errlinked = sig()
    errlinked.link_error(sig())
    assert refusal(sig(1)).path == "$.args"
    assert refusal(sig(immutable=True)).path == "$.immutable"
    assert refusal(work.si().set(queue="q")).path == "$.immutable"
    assert refusal(sig(countdown=5)).path == "$.options.countdown"
    assert refusal(sig().set(expires=5)).path == "$.options.expires"
    assert refusal(sig().set(priority=0)).path == "$.options.priority"
    assert refusal(linked).path == "$.options.link"
    assert refusal(errlinked).path == "$.options.link_error"
    assert refusal(celery.signature("one", app=App)).path == "$.options.queue"


@in_every_form
def test_empty_options_are_accepted(form: Callable[[dict[str, Any]], Any]) -> None:
    """An option that is None or empty is ignored."""
    options: dict[str, Any] = {
        "queue": "q",
        "countdown": None,
        "eta": None,
        "link": [],
        "link_error": None,
        "headers": {},
    }
    assert signature_to_continuation(form(fields_of(options=options))) is not None


@in_every_form
def test_signature_without_kwargs_has_empty_ones(form: Callable[[dict[str, Any]], Any]) -> None:
    """Absent kwargs and None become an empty dict."""
    for kwargs in (dict[str, Any](), None):
        spec = signature_to_continuation(form(fields_of(kwargs=kwargs)))
        assert spec is not None
        assert spec.kwargs == {}


@pytest.mark.parametrize("members", [[("a", 1)], "kwargs", 7, ("a",)], ids=["pairs", "text", "int", "tuple"])
def test_kwargs_or_options_must_be_dicts(members: Any) -> None:
    """kwargs or options of another type are rejected with their path."""
    assert refusal(as_object(fields_of(kwargs=members))).path == "$.kwargs"
    assert refusal(as_object(fields_of(options=members))).path == "$.options"


@given(
    st.none() | st.booleans() | st.integers() | st.text() | st.builds(object) | st.just({}) | st.lists(st.integers())
)
def test_object_without_task_name_is_rejected(thing: Any) -> None:
    """An object without a task name is rejected, and only None means no callback."""
    if thing is not None:
        assert refusal(thing).path == "$.task"


@given(found=some.burying(some.unfit_scalars))
def test_invalid_kwargs_are_rejected_by_path(found: some.Planted) -> None:
    """The error has the path of the value that the wire cannot carry."""
    assert refusal(as_object(fields_of(kwargs={"x": found.whole}))).path == "$.kwargs.x" + found.path[1:]


def test_every_error_names_the_callback() -> None:
    """The error names the callback, for a view with several."""
    for _, changed in REFUSED:
        if "task" not in changed:
            assert "'done'" in str(refusal(as_object(fields_of(**changed))))


UNFIT = {"long": "x" * 256, "NUL": "a\x00", "surrogate": "\ud800", "enum": Name.QUEUE, "int": 7}


@pytest.mark.parametrize("unfit", UNFIT.values(), ids=UNFIT.keys())
@pytest.mark.parametrize("part", ["task", "queue"])
def test_invalid_names_are_rejected_before_the_send(part: str, unfit: Any) -> None:
    """A task name or queue that the wire cannot carry is rejected by the translation."""
    changed = {"task": unfit} if part == "task" else {"options": {"queue": unfit}}
    assert refusal(as_object(fields_of(**changed))).path == ("$.task" if part == "task" else "$.options.queue")


@pytest.mark.parametrize(
    ("callback", "advice"),
    [
        ([{"task": "t", "options": {"queue": "q"}}], "got list; a dispatch has one callback"),
        (({"task": "t"}, {"task": "u"}), "got tuple; a dispatch has one callback"),
        ([], "got list; a dispatch has one callback"),
        ("my_task", r"got str; pass signature\("),
        (print, r"pass signature\("),
        (7, "got int; pass signature"),
    ],
)
def test_error_names_the_type_of_a_non_signature(callback: Any, advice: str) -> None:
    """A list, a text or a function is named in the error."""
    error = refusal(callback)
    assert re.search(advice, str(error))
    assert "needs a task name" not in str(error)


def test_task_is_rejected_with_the_right_call() -> None:
    """A Celery task is rejected with the call that makes its signature."""
    assert "a task is not a signature: pass task.s()" in str(refusal(work))
