"""Log events: a name and fields, for a person and for a log pipeline."""

from __future__ import annotations

import logging

import pytest

from unstract_core.events import emit

logger = logging.getLogger("tests.events")


def test_an_event_is_readable_and_has_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    """The message is `wire.<event> key=value ...`, and each field stands in the record under `wire.<key>`."""
    emit(logger, logging.WARNING, "lease_lost", queue="q", attempt=2)
    (record,) = caplog.records
    assert record.getMessage() == "wire.lease_lost queue=q attempt=2"
    fields = {name: value for name, value in vars(record).items() if name.startswith("wire.")}
    assert fields == {"wire.event": "lease_lost", "wire.queue": "q", "wire.attempt": 2}
    assert (record.levelno, record.funcName) == (logging.WARNING, "test_an_event_is_readable_and_has_its_fields")


def test_a_percent_sign_in_a_field_is_no_format(caplog: pytest.LogCaptureFixture) -> None:
    """A field may hold anything that a name may hold."""
    emit(logger, logging.WARNING, "odd", task="100%s %(x)d")
    assert caplog.records[0].getMessage() == "wire.odd task=100%s %(x)d"


def test_a_level_that_is_not_logged_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Below the logger's level nothing is formatted and nothing written."""

    class Expensive:
        def __str__(self) -> str:
            raise AssertionError("formatted for nothing")

    with caplog.at_level(logging.ERROR, logger.name):
        emit(logger, logging.DEBUG, "quiet", field=Expensive())
    assert caplog.records == []
