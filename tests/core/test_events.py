"""Log events: a name and fields, for a person and for a log pipeline."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    emit(logger, logging.WARNING, "odd", task="100%s%(x)d")
    assert caplog.records[0].getMessage() == "wire.odd task=100%s%(x)d"


@given(st.text() | st.characters(exclude_categories=()))
def test_a_field_stays_on_its_line_and_in_its_place(name: str) -> None:
    """What a foreign message calls its task can neither forge a line or a field, nor fill the log; `extra` has it."""
    records: list[logging.LogRecord] = []

    def take(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    logger.addFilter(take)
    try:
        emit(logger, logging.WARNING, "odd", task=name, attempt=1)
        emit(logger, logging.WARNING, "odd", task=name * 1000, attempt=1)
    finally:
        logger.filters.clear()
    for record in records:
        text = record.getMessage()
        assert text.isprintable()
        assert len(text) < 12 * 500 + 100
        shown = text.removeprefix("wire.odd task=").removesuffix(" attempt=1")
        assert " " not in shown or shown.startswith('"')
    assert vars(records[0])["wire.task"] == name


def test_logging_never_decides_about_a_message() -> None:
    """A filter or handler that raises is somebody's fault, and nobody's loss."""

    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise ValueError("broken")

    broken = Broken()
    logger.addFilter(broken)
    try:
        emit(logger, logging.WARNING, "odd", task="t")
    finally:
        logger.removeFilter(broken)


def test_a_level_that_is_not_logged_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Below the logger's level nothing is formatted and nothing written."""

    class Expensive:
        def __str__(self) -> str:
            raise AssertionError("formatted for nothing")

    with caplog.at_level(logging.ERROR, logger.name):
        emit(logger, logging.DEBUG, "quiet", field=Expensive())
    assert caplog.records == []
