"""OpenFeatureGate: what it asks the flag, and that whatever keeps the flag from answering is heard of."""

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
    """A client of a provider of its own."""
    domain = next(domains)
    api.set_provider_and_wait(provider, domain)
    return api.get_client(domain)


def constant(value: Any) -> InMemoryFlag[Any]:
    return InMemoryFlag("it", {"it": value})


def evaluated(evaluate: Callable[[EvaluationContext], Any]) -> InMemoryFlag[Any]:
    """A flag whose value is decided for each context."""
    return InMemoryFlag("on", {"on": True, "off": False}, context_evaluator=lambda flag, context: evaluate(context))


def targeted(decide: Callable[[EvaluationContext], bool]) -> InMemoryFlag[Any]:
    return evaluated(lambda context: FlagResolutionDetails(decide(context), reason=Reason.TARGETING_MATCH))


def gate_of(flag: InMemoryFlag[Any]) -> OpenFeatureGate:
    return OpenFeatureGate(client_of(InMemoryProvider({FLAG: flag})))


def takes(gate: OpenFeatureGate, context: Any = None, **options: Any) -> str:
    """Which side a dispatch takes."""

    def side(name: str) -> Any:
        method = lambda *args, **kwargs: name  # noqa: E731 - four of the same
        return types.SimpleNamespace(
            dispatch=method, dispatch_async=method, dispatch_with_callback=method, status=method
        )

    router = RoutingDispatcher(gate=gate, on=side("on"), off=side("off"), **options)
    return router.dispatch_async(context or Context())


# What the flag says.


@pytest.mark.parametrize("value", [True, False])
def test_the_gate_says_what_the_flag_says(value: bool) -> None:
    """True and False are passed on as they are."""
    assert gate_of(constant(value))(Context()) is value


def test_a_flip_counts_from_the_next_call() -> None:
    """The gate remembers nothing between two calls."""
    values = [False, True, True, False, True]
    left = iter(values)
    gate = gate_of(targeted(lambda context: next(left)))
    assert [takes(gate) for _ in values] == ["off", "on", "on", "off", "on"]


def test_a_provider_that_is_replaced_counts_from_the_next_call() -> None:
    """The client's provider is looked up at every call."""
    domain = next(domains)
    gate = OpenFeatureGate(api.get_client(domain))
    took = []
    for value in (True, False):
        api.set_provider_and_wait(InMemoryProvider({FLAG: constant(value)}), domain)
        took.append(takes(gate))
    assert took == ["on", "off"]


def test_one_organisation_is_let_on_at_a_time() -> None:
    """Targeting by the organisation: its dispatches go on, everybody else's stay off."""
    gate = gate_of(targeted(lambda context: context.targeting_key == "acme"))
    took = [takes(gate, Context(organization_id=name, run_id="acme")) for name in ("acme", "other", "acme", None)]
    assert took == ["on", "off", "on", "on"]


ids = st.none() | st.just("") | some.names


@given(some.names, ids, ids, st.booleans())
def test_the_flag_is_asked_for_the_organisation_else_the_run(
    executor: str, organization: str | None, run: str | None, has_ids: bool
) -> None:
    """Targeting key: organisation, else run, else "default"; attributes: the executor, and the organisation if set."""
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


def test_without_a_client_the_sdks_own_is_asked() -> None:
    """No client: the client of the default domain, with whatever provider it has by then; none means closed."""
    gate = OpenFeatureGate()
    assert gate(Context()) is False
    api.set_provider_and_wait(InMemoryProvider({FLAG: constant(True)}))
    try:
        assert gate(Context()) is True
    finally:
        api.shutdown()
    assert gate(Context()) is False


# What keeps the flag from answering.


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
def test_an_evaluation_that_fails_is_an_error_of_the_gate(name: str) -> None:
    """GateFailed names the flag and OpenFeature's code, where the SDK would quietly give the default."""
    make, code = TROUBLE[name]
    gate = OpenFeatureGate(client_of(make()))
    with pytest.raises(GateFailed, match=f"'{FLAG}'") as caught:
        gate(Context())
    assert caught.value.code == code
    assert code in str(caught.value)
    assert isinstance(caught.value, ContractError)


@pytest.mark.parametrize("name", TROUBLE)
def test_an_evaluation_that_fails_means_off_and_is_heard_of(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Through the router it means off, with one WARNING that has the code and none of the provider's words."""
    make, code = TROUBLE[name]
    gate = OpenFeatureGate(client_of(make()))
    with caplog.at_level(logging.WARNING, "unstract_wire"):
        assert takes(gate) == "off"
    (record,) = [each for each in caplog.records if each.name.startswith("unstract_wire")]
    assert vars(record)["wire.event"] == "gate_failed"
    assert (vars(record)["wire.error_type"], vars(record)["wire.code"]) == ("GateFailed", code)
    assert CONTENT not in f"{record.getMessage()}{vars(record)}"


def test_a_provider_that_is_not_ready_is_an_error_of_the_gate() -> None:
    """A provider that could not be initialised evaluates nothing, and the gate says so."""
    domain = next(domains)
    with contextlib.suppress(ProviderFatalError):  # which the SDK remembers
        api.set_provider_and_wait(NeverReady({FLAG: constant(True)}), domain)
    with pytest.raises(GateFailed) as caught:
        OpenFeatureGate(api.get_client(domain))(Context())
    assert caught.value.code == "PROVIDER_FATAL"


def test_a_provider_that_hangs_means_off_within_the_limit() -> None:
    """A flag server that does not answer costs a caller the limit and no more."""
    released = threading.Event()
    gate = gate_of(targeted(lambda context: released.wait()))
    try:
        assert takes(gate, gate_timeout=0.05) == "off"
    finally:
        released.set()
    assert takes(gate) == "on"


# What cannot work is refused at start.


def test_without_the_sdk_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing SDK says what to install, when the gate is built and not at the first call."""
    monkeypatch.setitem(sys.modules, "openfeature", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'unstract-wire\[openfeature\]'"):
        OpenFeatureGate()


WRONG: list[dict[str, Any]] = [{"client": object()}, {"client": FLAG}, {"flag": ""}, {"flag": None}, {"flag": 7}]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_cannot_be_asked_is_refused_at_start(wrong: dict[str, Any]) -> None:
    """A ConfigurationError names the argument."""
    (name,) = wrong
    with pytest.raises(ConfigurationError, match=name):
        OpenFeatureGate(**wrong)
