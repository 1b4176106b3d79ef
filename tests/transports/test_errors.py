"""The errors that the transports add to those of the core."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
from typing import Any

import pytest

import transports.celery
import transports.postgres
from transports.celery.errors import InDoubt
from unstract_core.errors import ContractError

MODULES = [
    importlib.import_module(module.name)
    for package in (transports.celery, transports.postgres)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]
CLASSES: dict[str, type[Exception]] = {
    f"{module.__name__}.{name}": found
    for module in MODULES
    for name, found in vars(module).items()
    if isinstance(found, type) and issubclass(found, Exception) and found.__module__ == module.__name__
}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "InDoubt": {"tag": 7, "fate_unknown": True},
    "DuplicateId": {"table": '"public"."pg_task"', "column": "id"},
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_transport_errors_are_picklable_with_their_attributes(name: str, protocol: int) -> None:
    """Guaranteed: every error of a transport can be pickled, and keeps its type, its text and its attributes."""
    error = CLASSES[name]("lost")
    attributes = ATTRIBUTES.get(CLASSES[name].__name__, {})
    if isinstance(error, ContractError):
        attributes = {"effect": "nothing was sent", "remedy": "start the broker"} | attributes
    for attribute, value in attributes.items():
        setattr(error, attribute, value)
    back = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - pickled a moment ago
    assert type(back) is type(error)
    assert (str(back), back.args, vars(back)) == (str(error), error.args, vars(error))


def test_unconfirmed_messages_keep_their_tag_when_pickled() -> None:
    """InDoubt keeps the delivery tag, by which its confirm is read later."""
    back = pickle.loads(pickle.dumps(InDoubt("sent and not confirmed", 7)))  # noqa: S301 - pickled a moment ago
    assert (back.problem, back.tag, back.fate_unknown) == ("sent and not confirmed", 7, True)
