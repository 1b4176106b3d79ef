"""What the author of a transport writes: a Harness. And how one is found by URL, by name, or as `module:factory`.

A harness stands beside a transport, and does what the protocol does not offer: it stores a message that no writer of
ours would write, ends leases without waiting for them, cuts connections. It imports this module alone, which needs
neither pytest nor hypothesis.
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
"""The entry points at which a harness is found, keyed by a name that is also the scheme of a transport's URLs."""

_DATA = ("name", "capabilities", "moment", "shared")
_HOOKS = ("__enter__", "__exit__", "transport", "inject", "expire", "stored", "sever", "clean", "caller")


class Harness:
    """A transport under test. Inherit from it for the defaults; any object with these members will do.

    `with harness:` surrounds a whole run: create and drop tables here, where there are any. Tests use queues of their
    own, so nothing has to be cleared between them. Every hook gets the transport that the test uses.
    """

    name: str
    """What the tests of this transport are named by."""

    capabilities: Capabilities
    """What the transport claims; the transport's own `capabilities` must say the same."""

    moment: float = 0.0
    """Seconds of silence after which nothing more is expected. 0 for a store, which shows at once what was done to it;
    what a broker sends arrives a moment later."""

    shared: bool = True
    """Whether two transports that are open at once work on the same messages, as two processes do; not so in a store
    that lives in the transport itself."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def transport(self) -> contextlib.AbstractContextManager[Transport]:
        """Return a context manager that opens a transport, and closes it with everything that it started."""
        raise NotImplementedError

    def inject(self, transport: Any, queue: str, text: str) -> None:
        """Store JSON text as a ready message of `queue`, with the default priority, as a foreign writer might.

        Where messages are not stored as the wire's JSON: what that wire's writer would store for such a message.
        """
        raise NotImplementedError

    def expire(self, transport: Any, queue: str) -> None:
        """End every lease and every delay in `queue` now; without leases, what else makes held messages come back."""
        raise NotImplementedError

    def stored(self, transport: Any, queue: str) -> Sequence[RawMessage] | None:
        """Return what is stored for each message of `queue`, oldest first, read behind the transport's back.

        None where messages are not stored as the wire's JSON, or cannot be read without being taken.
        """
        return None

    def sever(self, transport: Any) -> bool:
        """Cut every connection of the transport, as a failing network would; False where there are none."""
        return False

    def reissue(self, transport: Any, id: str, as_id: str) -> bool:
        """Let ids come again, as after a restore: remove the message `as_id`, if it is there, and give that id to the
        ready message `id`, which stays in its queue. False where an id never comes again.

        Asked for where `fencing` is claimed.
        """
        return False

    def clean(self, queues: Sequence[str]) -> None:
        """Remove the queues that a test has used, where they would outlast the run; called after each test."""
        return

    def caller(self, transport: Any) -> contextlib.AbstractContextManager[Any]:
        """Open a DB-API connection, as the application has one, for `send(within=connection.cursor())`.

        Asked for where `transactional_send` is claimed. The tests commit and roll back.
        """
        raise NotImplementedError


def load_harness(spec: str) -> Harness:
    """Return the harness that `spec` names: a URL (`sqlite:///tasks.db`), a name (`memory`), or "module:factory".

    URLs (by their scheme) and names are looked up among the entry points of the group `contract_tests.harnesses`. A
    factory is called with the URL, or else without arguments; a Harness instead of a factory is taken as it is. Raises
    ConfigurationError, which says what is missing and what to do.
    """
    scheme, separator, _ = spec.partition("://")
    if separator or ":" not in spec:
        found = {entry.name: entry for entry in entry_points(group=GROUP)}
        if scheme not in found:
            known = ", ".join(sorted(found)) or "none"
            raise ConfigurationError(
                f"no harness is installed for {scheme!r} (there are: {known}); pass module:factory, or add an entry"
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
        raise ConfigurationError(f"{spec} names a {type(factory).__name__}, which is no harness and makes none")
    try:
        return factory(*arguments)
    except ContractError:
        raise
    except Exception as exc:  # likewise
        raise ConfigurationError(f"{spec}: its harness could not be made: {_described(exc)}") from exc


def _checked(harness: Any, spec: str) -> Harness:
    if missing := _missing(harness):
        hint = "; is it a transport? a harness goes with it" if hasattr(harness, "subscribe") else ""
        raise ConfigurationError(
            f"{spec} gave a {type(harness).__name__}, which is no harness: it has no {', '.join(missing)}{hint}"
        )
    if not isinstance(harness.name, str) or not harness.name:
        raise ConfigurationError(f"{spec}: the name of a harness is a non-empty string, not {harness.name!r}")
    if not isinstance(harness.capabilities, Capabilities):
        raise ConfigurationError(
            f"{spec}: the capabilities of a harness are a Capabilities, not a {type(harness.capabilities).__name__}"
        )
    return harness  # type: ignore[no-any-return]  # whoever has the members is one


def _missing(harness: object) -> list[str]:
    return [name for name in (*_DATA, *_HOOKS) if not hasattr(harness, name)]


def _described(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}"
