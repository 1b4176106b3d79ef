"""OpenFeatureGate: the evaluation of the flag, and the report of every failure."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import strategies as some
from hypothesis import given
from hypothesis import strategies as st
from openfeature import api
from openfeature.client import OpenFeatureClient
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import ErrorCode, ProviderFatalError
from openfeature.flag_evaluation import FlagResolutionDetails, Reason
from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider

from unstract_core import ConfigurationError, ContractError, GateFailed, OpenFeatureGate, RoutingDispatcher

CONTENT = "the contents of the document"
FLAG = "pg_queue_enabled"
domains = (f"tests-gates-{number}" for number in itertools.count())


@attrs.frozen
class Context:
    executor_name: str = "legacy"
    organization_id: str | None = None
    run_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module", autouse=True)
def _providers() -> Iterator[None]:
    yield
    api.shutdown()


def client_of(provider: InMemoryProvider) -> OpenFeatureClient:
    """Return a client with its own provider."""
    domain = next(domains)
    api.set_provider_and_wait(provider, domain)
    return api.get_client(domain)


def constant(value: Any) -> InMemoryFlag[Any]:
    return InMemoryFlag("it", {"it": value})


def evaluated(evaluate: Callable[[EvaluationContext], Any]) -> InMemoryFlag[Any]:
    """Return a flag with a value for each context."""
    return InMemoryFlag("on", {"on": True, "off": False}, context_evaluator=lambda flag, context: evaluate(context))


def targeted(decide: Callable[[EvaluationContext], bool]) -> InMemoryFlag[Any]:
    return evaluated(lambda context: FlagResolutionDetails(decide(context), reason=Reason.TARGETING_MATCH))


def gate_of(flag: InMemoryFlag[Any]) -> OpenFeatureGate:
    return OpenFeatureGate(client_of(InMemoryProvider({FLAG: flag})))


def takes(gate: OpenFeatureGate, context: Any = None, **options: Any) -> str:
    """Return the side that a dispatch takes."""

    def side(name: str) -> Any:
        method = lambda *args, **kwargs: name  # noqa: E731 - four of the same
        return types.SimpleNamespace(
            dispatch=method, dispatch_async=method, dispatch_with_callback=method, status=method
        )

    router = RoutingDispatcher(gate=gate, on=side("on"), off=side("off"), **options)
    return router.dispatch_async(context or Context())


# The value of the flag.


@pytest.mark.parametrize("value", [True, False])
def test_gate_returns_the_value_of_the_flag(value: bool) -> None:
    """The gate returns True and False unchanged."""
    assert gate_of(constant(value))(Context()) is value


def test_changed_flag_applies_from_the_next_call() -> None:
    """The gate caches nothing between two calls."""
    values = [False, True, True, False, True]
    left = iter(values)
    gate = gate_of(targeted(lambda context: next(left)))
    assert [takes(gate) for _ in values] == ["off", "on", "on", "off", "on"]


def test_new_provider_applies_from_the_next_call() -> None:
    """The gate uses the client's current provider at each call."""
    domain = next(domains)
    gate = OpenFeatureGate(api.get_client(domain))
    took = []
    for value in (True, False):
        api.set_provider_and_wait(InMemoryProvider({FLAG: constant(value)}), domain)
        took.append(takes(gate))
    assert took == ["on", "off"]


def test_flag_can_select_one_organisation() -> None:
    """The dispatches of a targeted organisation go on, and all others go off."""
    gate = gate_of(targeted(lambda context: context.targeting_key == "acme"))
    took = [takes(gate, Context(organization_id=name, run_id="acme")) for name in ("acme", "other", "acme", None)]
    assert took == ["on", "off", "on", "on"]


ids = st.none() | st.just("") | some.names


@given(some.names, ids, ids, st.booleans())
def test_targeting_key_is_organisation_or_run(
    executor: str, organization: str | None, run: str | None, has_ids: bool
) -> None:
    """The key is the organisation, the run, or "default"; the attributes are the executor and the organisation."""
    asked: list[EvaluationContext] = []

    def get_boolean_details(flag: str, default: bool, context: EvaluationContext) -> Any:
        assert (flag, default) == ("my-flag", False)
        asked.append(context)
        return types.SimpleNamespace(error_code=None, reason="STATIC", value=True)

    client: Any = types.SimpleNamespace(get_boolean_details=get_boolean_details)
    gate = OpenFeatureGate(client, flag="my-flag")
    context: Any = Context(executor, organization, run) if has_ids else types.SimpleNamespace(executor_name=executor)
    assert gate(context) is True
    organization, run = (organization, run) if has_ids else (None, None)
    (got,) = asked
    assert got.targeting_key == (organization or run or "default")
    assert got.attributes == {"executor_name": executor, **({"organization_id": organization} if organization else {})}


def test_gate_uses_the_default_client() -> None:
    """Without a client, the gate uses that of the default domain; without a provider it is closed."""
    gate = OpenFeatureGate()
    assert gate(Context()) is False
    api.set_provider_and_wait(InMemoryProvider({FLAG: constant(True)}))
    try:
        assert gate(Context()) is True
    finally:
        api.shutdown()
    assert gate(Context()) is False


# Failures of the flag.


class NeverReady(InMemoryProvider):
    def initialize(self, evaluation_context: EvaluationContext) -> None:
        raise ProviderFatalError(CONTENT)


def raising(error: Exception) -> InMemoryFlag[Any]:
    def evaluate(context: EvaluationContext) -> Any:
        raise error

    return evaluated(evaluate)


def failing(**details: Any) -> InMemoryFlag[Any]:
    return evaluated(lambda context: FlagResolutionDetails(True, error_message=CONTENT, **details))


TROUBLE: dict[str, tuple[Callable[[], InMemoryProvider], str]] = {
    "no such flag": (lambda: InMemoryProvider({}), "FLAG_NOT_FOUND"),
    "a text": (lambda: InMemoryProvider({FLAG: constant("true")}), "TYPE_MISMATCH"),
    "a number": (lambda: InMemoryProvider({FLAG: constant(1)}), "TYPE_MISMATCH"),
    "an object": (lambda: InMemoryProvider({FLAG: constant({"on": True})}), "TYPE_MISMATCH"),
    "null": (lambda: InMemoryProvider({FLAG: constant(None)}), "TYPE_MISMATCH"),
    "no such variant": (lambda: InMemoryProvider({FLAG: InMemoryFlag("gone", {"on": True})}), "GENERAL"),
    "raises": (lambda: InMemoryProvider({FLAG: raising(ConnectionError(CONTENT))}), "GENERAL"),
    "says error": (lambda: InMemoryProvider({FLAG: failing(error_code=ErrorCode.PARSE_ERROR)}), "PARSE_ERROR"),
    "has error for a reason": (lambda: InMemoryProvider({FLAG: failing(reason=Reason.ERROR)}), ""),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_failed_evaluation_raises_gate_failed(name: str) -> None:
    """GateFailed has the flag and OpenFeature's code where the SDK would return the default."""
    make, code = TROUBLE[name]
    gate = OpenFeatureGate(client_of(make()))
    with pytest.raises(GateFailed, match=f"'{FLAG}'") as caught:
        gate(Context())
    assert caught.value.code == code
    assert code in str(caught.value)
    assert isinstance(caught.value, ContractError)


@pytest.mark.parametrize("name", TROUBLE)
def test_failed_evaluation_means_off_with_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The dispatch goes off, and one WARNING has the code, without the provider's text."""
    make, code = TROUBLE[name]
    gate = OpenFeatureGate(client_of(make()))
    with caplog.at_level(logging.WARNING, "unstract_wire"):
        assert takes(gate) == "off"
    (record,) = [each for each in caplog.records if each.name.startswith("unstract_wire")]
    assert vars(record)["wire.event"] == "gate_failed"
    assert (vars(record)["wire.error_type"], vars(record)["wire.code"]) == ("GateFailed", code)
    assert CONTENT not in f"{record.getMessage()}{vars(record)}"


def test_provider_that_is_not_ready_raises() -> None:
    """A provider that failed to initialise makes the gate raise GateFailed."""
    domain = next(domains)
    with contextlib.suppress(ProviderFatalError):  # which the SDK remembers
        api.set_provider_and_wait(NeverReady({FLAG: constant(True)}), domain)
    with pytest.raises(GateFailed) as caught:
        OpenFeatureGate(api.get_client(domain))(Context())
    assert caught.value.code == "PROVIDER_FATAL"


def test_hanging_provider_means_off_within_the_limit() -> None:
    """A flag server that does not answer delays a caller by at most the limit."""
    released = threading.Event()
    gate = gate_of(targeted(lambda context: released.wait()))
    try:
        assert takes(gate, gate_timeout=0.05) == "off"
    finally:
        released.set()
    assert takes(gate) == "on"


# Invalid arguments.


def test_gate_without_the_sdk_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra to install when the gate is created."""
    monkeypatch.setitem(sys.modules, "openfeature", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'unstract-wire\[openfeature\]'"):
        OpenFeatureGate()


WRONG: dict[str, dict[str, Any]] = {
    "an object as client": {"client": object()},
    "a name as client": {"client": FLAG},
    "an empty flag": {"flag": ""},
    "no flag": {"flag": None},
    "a number as flag": {"flag": 7},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_invalid_gate_argument_is_rejected(wrong: dict[str, Any]) -> None:
    """A ConfigurationError names the argument."""
    (name,) = wrong
    with pytest.raises(ConfigurationError, match=name):
        OpenFeatureGate(**wrong)
