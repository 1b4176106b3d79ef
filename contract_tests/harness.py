"""`Harness`: the adapter that the author of a transport writes for the kit, and `load_harness`, which finds it.

A harness opens the transport and offers operations that the protocol lacks: it stores foreign messages, ends leases at
once, and cuts connections. This module needs neither pytest nor hypothesis, so a harness may ship with its transport.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib.metadata import entry_points
from types import TracebackType
from typing import Any, Self

from unstract_core.codec import RawMessage
from unstract_core.discovery import import_object
from unstract_core.errors import ConfigurationError, ContractError
from unstract_core.transport import Capabilities, Transport

GROUP = "contract_tests.harnesses"
"""The entry point group of harnesses. The name of an entry point is also the scheme of the transport's URLs."""

_DATA = ("name", "capabilities", "moment", "shared")
_HOOKS = ("__enter__", "__exit__", "transport", "inject", "expire", "stored", "sever", "clean", "caller")


class Harness:
    """Adapter between the kit and a transport. Inherit for the defaults; any object with these members is accepted.

    The kit enters the harness once for a whole run: create tables in `__enter__` and drop them in `__exit__`. Each test
    uses queues of its own, so nothing has to be cleared between tests. Each hook gets the transport that the test uses.
    """

    name: str
    """Identifies the transport in test ids and in the report. A non-empty string."""

    capabilities: Capabilities
    """The capabilities that the transport claims. Must equal `transport.capabilities`."""

    moment: float = 0.0
    """Seconds without a message after which the kit expects no more. 0 for a store, where messages are visible at once;
    a broker needs a short delay, such as 0.1."""

    shared: bool = True
    """Whether two open transports work on the same messages, as two processes do. False if each transport has messages
    of its own, as an in-memory one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def transport(self) -> contextlib.AbstractContextManager[Transport]:
        """Return a context manager that opens a new transport and closes it, with every thread that it started.

        Called often; two transports may be open at the same time.
        """
        raise NotImplementedError

    def inject(self, transport: Any, queue: str, text: str) -> None:
        """Store a ready message with the default priority, bypassing the transport, as another program might.

        Args:
            transport: The open transport.
            queue: The queue of the message.
            text: The message as JSON. It may be malformed. If the store uses another format than the wire's JSON,
                store the equivalent of such a message.
        """
        raise NotImplementedError

    def expire(self, transport: Any, queue: str) -> None:
        """End every lease and every delay in `queue` now.

        Without leases: make claimed messages ready again in the way that the store does it, for example by closing the
        connections of their holders.
        """
        raise NotImplementedError

    def stored(self, transport: Any, queue: str) -> Sequence[RawMessage] | None:
        """Read the stored messages of `queue`, bypassing the transport.

        Returns:
            The wire JSON of each message, oldest first; None if the store uses another format, or if messages cannot
            be read without claiming them. Then the tests of stored messages are skipped.
        """
        return None

    def sever(self, transport: Any) -> bool:
        """Cut every connection of the transport, as a network failure would.

        Returns:
            False if there are no connections. Then the tests of outages are skipped.
        """
        return False

    def reissue(self, transport: Any, id: str, as_id: str) -> bool:
        """Reuse an id, as a restore from a backup can: remove the message `as_id`, and give its id to another message.

        Needed for `fencing` only.

        Args:
            transport: The open transport.
            id: The ready message that gets the id; it stays in its queue.
            as_id: The id to reuse. Its message is removed, if it still exists.

        Returns:
            False if ids are never reused. Then the test is skipped.
        """
        return False

    def clean(self, queues: Sequence[str]) -> None:
        """Remove the queues that a test has used, if they would outlast the run. Called after each test."""
        return

    def caller(self, transport: Any) -> contextlib.AbstractContextManager[Any]:
        """Open a DB-API connection of the application, for `send(within=connection.cursor())`.

        Needed for `transactional_send` only. The tests commit and roll back.
        """
        raise NotImplementedError


def load_harness(spec: str) -> Harness:
    """Return the harness for a spec.

    Names and the schemes of URLs are looked up in the entry point group `contract_tests.harnesses`. A factory is
    called with the URL, if the spec is one, else without arguments.

    Args:
        spec: A URL (`sqlite:///tasks.db`), a name (`memory`), or "module:factory", whose object is a factory or a
            harness.

    Raises:
        ConfigurationError: No harness was found, or it has missing or invalid members. The text names the remedy.
    """
    scheme, separator, _ = spec.partition("://")
    if separator or ":" not in spec:
        found = {entry.name: entry for entry in entry_points(group=GROUP)}
        if scheme not in found:
            known = ", ".join(sorted(found)) or "none"
            raise ConfigurationError(
                f"no harness is installed for {scheme!r} (installed: {known}). Pass module:factory, or add an entry"
                f" point {scheme!r} to the group {GROUP!r}"
            )
        try:
            factory = found[scheme].load()
        except Exception as exc:  # the author's module may raise anything when it is imported
            raise ConfigurationError(f"the harness {scheme!r} cannot be imported: {_described(exc)}") from exc
    else:
        factory = import_object(spec, "harness")
    shown = f"{scheme}://" if separator else spec
    return _checked(_made(factory, [spec] if separator else [], shown), shown)


def _made(factory: Any, arguments: list[str], spec: str) -> Any:
    if not isinstance(factory, type) and _missing(factory) == []:
        return factory
    if not callable(factory):
        raise ConfigurationError(
            f"{spec} is a {type(factory).__name__}, not a harness. Name a Harness or a function that returns one"
        )
    try:
        return factory(*arguments)
    except ContractError:
        raise
    except Exception as exc:  # the author's factory may raise anything
        raise ConfigurationError(f"{spec}: the factory of the harness raised {_described(exc)}") from exc


def _checked(harness: Any, spec: str) -> Harness:
    if missing := _missing(harness):
        hint = ". It looks like a transport: name its harness" if hasattr(harness, "subscribe") else ""
        raise ConfigurationError(
            f"{spec} returned a {type(harness).__name__}, not a harness: it has no {', '.join(missing)}{hint}"
        )
    if not isinstance(harness.name, str) or not harness.name:
        raise ConfigurationError(f"{spec}: the `name` of a harness must be a non-empty string, not {harness.name!r}")
    if not isinstance(harness.capabilities, Capabilities):
        raise ConfigurationError(
            f"{spec}: `capabilities` of a harness must be a Capabilities, not a {type(harness.capabilities).__name__}"
        )
    return harness  # type: ignore[no-any-return]  # any object with the members is a harness


def _missing(harness: object) -> list[str]:
    return [name for name in (*_DATA, *_HOOKS) if not hasattr(harness, name)]


def _described(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}"
