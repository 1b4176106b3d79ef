"""The errors: one root, a complete tree in the docstring, and pickling."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest

import unstract_core
from unstract_core import RetryLater, errors

CLASSES: dict[str, type[Exception]] = {
    name: found
    for name, found in vars(errors).items()
    if isinstance(found, type) and issubclass(found, Exception) and found.__module__ == errors.__name__
}

OPTIONS: dict[str, dict[str, Any]] = {
    "PayloadError": {"path": "$.kwargs.x"},
    "SignatureError": {"path": "$.options.queue"},
    "MalformedPayload": {"path": "$.fairness", "problems": ("expected an object @ $.fairness",)},
    "GateFailed": {"code": "FLAG_NOT_FOUND"},
    "TransportError": {"effect": "nothing was sent", "remedy": "start the broker"},
    "TransportUnavailable": {"fate_unknown": True, "effect": "nothing was sent", "remedy": "start the broker"},
    "TransportNotReady": {"remedy": "run `unstract-wire migrate`"},
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_are_picklable_with_their_attributes(name: str, protocol: int) -> None:
    """Guaranteed: every error can be pickled, and keeps its type, its text and all of its attributes."""
    error = CLASSES[name]("what went wrong", **OPTIONS.get(name, {}))
    error.__cause__ = ValueError("the driver's own")
    back = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - pickled a moment ago
    assert type(back) is type(error)
    assert (str(back), back.args, vars(back)) == (str(error), error.args, vars(error))
    for attribute, value in OPTIONS.get(name, {}).items():
        assert getattr(back, attribute) == value


@pytest.mark.parametrize("name", CLASSES)
def test_errors_can_be_copied_and_need_no_arguments(name: str) -> None:
    """An error can be copied, created without arguments, and printed."""
    error = copy.deepcopy(CLASSES[name]())
    assert isinstance(str(error), str)
    assert vars(error) == vars(CLASSES[name]())


@pytest.mark.parametrize("name", CLASSES)
def test_errors_have_one_root_and_are_exported(name: str) -> None:
    """Every error is a ContractError, and the package exports it."""
    assert issubclass(CLASSES[name], errors.ContractError)
    assert name in unstract_core.__all__
    assert getattr(unstract_core, name) is CLASSES[name]


def test_docstring_tree_equals_the_class_tree() -> None:
    """The module docstring shows every class below its base, with its built-in bases, and no other class."""
    drawn: dict[str, tuple[str | None, tuple[str, ...]]] = {}
    branch: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"( +(?:\| +)*(?:\+-- )?)([A-Z]\w+)(?: \((\w+)\))?(?:  |$)", line)
        if match is None:
            continue
        depth, name, builtin = len(match[1]), match[2], match[3]
        branch = [(at, parent) for at, parent in branch if at < depth]
        drawn[name] = (branch[-1][1] if branch else None, (builtin,) if builtin else ())
        branch.append((depth, name))
    real = {
        name: (
            next((base.__name__ for base in found.__bases__ if base in CLASSES.values()), None),
            tuple(base.__name__ for base in found.__bases__ if base not in CLASSES.values() and base is not Exception),
        )
        for name, found in CLASSES.items()
    }
    assert drawn == real


def test_payload_error_text_begins_with_its_path() -> None:
    """The text of a PayloadError begins with the path, so that a log line is enough to find the value."""
    assert str(errors.PayloadError("too large", path="$.args[0]")) == "$.args[0]: too large"


def test_transport_error_keeps_problem_effect_and_remedy() -> None:
    """The text of a transport error has its problem, its effect and its remedy, and each is an attribute."""
    error = errors.TransportNotReady("no table", remedy="run the migration")
    assert (str(error), error.problem, error.remedy) == ("no table; run the migration", "no table", "run the migration")
    lost = errors.TransportUnavailable("lost", effect="nothing was sent", remedy="Is it running?")
    assert (str(lost), lost.problem) == ("lost; nothing was sent. Is it running?", "lost")
    assert str(errors.TransportUnavailable("lost")) == "lost"


def test_errors_can_be_caught_as_built_in_errors() -> None:
    """PayloadError is a ValueError, and ReplyTimeout a TimeoutError."""
    assert issubclass(errors.PayloadError, ValueError)
    assert issubclass(errors.SignatureError, ValueError)
    assert issubclass(errors.ReplyTimeout, TimeoutError)


def test_retry_later_is_picklable_with_its_delay() -> None:
    """RetryLater keeps its delay when it is pickled."""
    back = pickle.loads(pickle.dumps(RetryLater(2.5)))  # noqa: S301 - pickled a moment ago
    assert back.delay == 2.5
    assert str(back) == str(RetryLater(2.5))


PUBLIC = [
    "CallbackSignature",
    "Capabilities",
    "Clock",
    "Consumer",
    "ContinuationSpec",
    "DeadLetter",
    "DeadLetters",
    "Delivery",
    "DispatchHandle",
    "Dispatcher",
    "ExecutionContext",
    "ExecutionResult",
    "ExecutorDispatcher",
    "FairnessKey",
    "Gate",
    "Inspection",
    "JSONValue",
    "LeaseLostEvent",
    "Message",
    "Observer",
    "OpenFeatureGate",
    "QueueState",
    "Reply",
    "RetryLater",
    "RoutingDispatcher",
    "Settlement",
    "Subscription",
    "TaskFinished",
    "TaskPayload",
    "Tasks",
    "Transport",
    "Verdict",
    "WorkerHeartbeat",
    "current_delivery",
    "from_wire",
    "load_transport",
    "normalise",
    "signature_to_continuation",
    "to_wire",
]


def test_package_exports_every_public_name() -> None:
    """The package exports each public name and each error once, in order."""
    assert set(unstract_core.__all__) == {*PUBLIC, *CLASSES}
    assert sorted(set(unstract_core.__all__)) == unstract_core.__all__
    assert all(hasattr(unstract_core, name) for name in unstract_core.__all__)
