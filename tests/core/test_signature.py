"""Callback signatures, duck-typed, serialised and Celery's own: translated without loss, or refused."""

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
def test_a_signature_becomes_its_task_kwargs_and_queue(
    form: Callable[[dict[str, Any]], Any], task: str, kwargs: dict[str, Any], queue: str
) -> None:
    """What a continuation can carry is carried exactly."""
    spec = signature_to_continuation(form(fields_of(task=task, kwargs=kwargs, options={"queue": queue})))
    assert spec is not None
    assert (spec.task_name, spec.queue) == (task, queue)
    assert some.same(spec.kwargs, kwargs)


def test_none_passes_through() -> None:
    """No callback is no continuation."""
    assert signature_to_continuation(None) is None


@given(kwargs=some.json_objects)
def test_celerys_own_signature_is_understood_however_it_was_made(kwargs: dict[str, Any]) -> None:
    """The forms of the product's call sites, the serialised one and its JSON included, give the same continuation."""
    expected = ContinuationSpec(task_name="ide_prompt_complete", kwargs=kwargs, queue="ide_callback")
    made = celery.signature("ide_prompt_complete", kwargs=kwargs, queue="ide_callback", app=App)
    cloned = celery.signature("ide_prompt_complete", kwargs=kwargs, app=App).set(queue="ide_callback")
    for signature in (made, cloned, made.clone(), dict(made), json.loads(json.dumps(made))):
        assert signature_to_continuation(signature) == expected


def test_the_call_sites_two_signatures_share_a_dict_and_stay_apart() -> None:
    """The same dict serves both signatures; no later change to it reaches the other or the message."""
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
def test_kwargs_are_normalised_and_the_signature_is_left_alone(
    form: Callable[[dict[str, Any]], Any], kwargs: dict[str, Any]
) -> None:
    """The named rules apply to a callback's kwargs; the caller's signature is only read."""
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
def test_what_would_be_lost_is_refused_with_its_path(
    form: Callable[[dict[str, Any]], Any], path: str, changed: dict[str, Any]
) -> None:
    """A signature that asks for more than a continuation carries is refused, and the error says where and what."""
    error = refusal(form(fields_of(**changed)))
    assert error.path == path
    if path.startswith("$.options.") and path != "$.options.queue":
        assert path.rpartition(".")[2] in str(error)


@pytest.mark.parametrize("form", [as_object, as_mapping, as_proxy], ids=lambda form: form.__name__)
@pytest.mark.parametrize("kind", ["chain", "group", "chord", "map", "starmap", "xmap", "chunks"])
def test_a_canvas_is_refused_by_its_kind(form: Callable[[dict[str, Any]], Any], kind: str) -> None:
    """Whatever sets subtask_type is no single task."""
    error = refusal(form(fields_of(subtask_type=kind)))
    assert error.path == "$.subtask_type"
    assert kind in str(error)


def test_celerys_own_canvases_are_refused() -> None:
    """A real chain, group, chord, chunk or map is refused, as an object and serialised."""
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


def test_celerys_own_refinements_are_refused() -> None:
    """Positional args, si(), countdown, expires, links and stamps on a real signature are refused each."""

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
def test_options_that_ask_for_nothing_are_no_reason_to_refuse(form: Callable[[dict[str, Any]], Any]) -> None:
    """An option that is None or empty loses nothing."""
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
def test_a_signature_without_kwargs_has_none(form: Callable[[dict[str, Any]], Any]) -> None:
    """No kwargs, or None, are the empty ones."""
    for kwargs in (dict[str, Any](), None):
        spec = signature_to_continuation(form(fields_of(kwargs=kwargs)))
        assert spec is not None
        assert spec.kwargs == {}


@pytest.mark.parametrize("members", [[("a", 1)], "kwargs", 7, ("a",)], ids=["pairs", "text", "int", "tuple"])
def test_kwargs_or_options_of_another_type_are_refused(members: Any) -> None:
    """kwargs and options are dicts; anything else is refused under its path."""
    assert refusal(as_object(fields_of(kwargs=members))).path == "$.kwargs"
    assert refusal(as_object(fields_of(options=members))).path == "$.options"


@given(
    st.none() | st.booleans() | st.integers() | st.text() | st.builds(object) | st.just({}) | st.lists(st.integers())
)
def test_what_is_no_signature_is_refused(thing: Any) -> None:
    """Anything without a task name is refused as such, and only None is nothing."""
    if thing is not None:
        assert refusal(thing).path == "$.task"


@given(found=some.burying(some.unfit_scalars))
def test_kwargs_that_the_wire_cannot_carry_are_named_by_path(found: some.Planted) -> None:
    """The error of a value outside the domain leads to the value."""
    assert refusal(as_object(fields_of(kwargs={"x": found.whole}))).path == "$.kwargs.x" + found.path[1:]


def test_every_refusal_names_the_callback() -> None:
    """With several callbacks in a view, the text says which one is meant."""
    for _, changed in REFUSED:
        if "task" not in changed:
            assert "'done'" in str(refusal(as_object(fields_of(**changed))))


UNFIT = {"long": "x" * 256, "NUL": "a\x00", "surrogate": "\ud800", "enum": Name.QUEUE, "int": 7}


@pytest.mark.parametrize("unfit", UNFIT.values(), ids=UNFIT.keys())
@pytest.mark.parametrize("part", ["task", "queue"])
def test_a_name_that_the_wire_would_refuse_is_refused_here(part: str, unfit: Any) -> None:
    """Not at the first send: whatever is translated can be sent."""
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
def test_what_is_no_signature_is_named(callback: Any, advice: str) -> None:
    """A list, a name or a function is not taken for a signature without a task name."""
    error = refusal(callback)
    assert re.search(advice, str(error))
    assert "needs a task name" not in str(error)


def test_a_task_instead_of_its_signature_is_named() -> None:
    """A Celery task is refused with the call that makes a signature of it."""
    assert "a task is not a signature: pass task.s()" in str(refusal(work))
