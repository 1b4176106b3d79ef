"""The checks of a message that all transports share, and the values that they exchange."""

from __future__ import annotations

import copy
import datetime
import math
import pickle
from typing import Any

import attrs
import pytest
import strategies as some
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import (
    Capabilities,
    Delivery,
    Message,
    PayloadError,
    Reply,
    Settlement,
    TaskPayload,
    Verdict,
    from_wire,
)
from unstract_core.transport import LONGEST_DELAY, DeadLetter, check_delay, write_message

messages = st.builds(
    Message,
    some.payloads(),
    some.names,
    org_id=st.just("") | some.names,
    priority=st.integers(1, 10),
    delay=st.floats(0, LONGEST_DELAY) | st.integers(0, 10**8),
)
PLAIN = Message(TaskPayload(task_name="t", queue="q"), "q")


@given(messages)
def test_message_text_is_its_payload(message: Message) -> None:
    """The text of a message is its payload's, independent of its queue."""
    assert from_wire(write_message(message)) == message.payload


VALUES: dict[str, list[Any]] = {
    "priority": [0, 11, -1, 5.0, "5", True, None],
    "delay": [-1, -0.1, math.nan, math.inf, -math.inf, 1e300, "5", None],
    "queue": ["", "x" * 256, "a\x00", None, 7],
    "org_id": ["x" * 256, "\ud800", 7],
}
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name} {value!r}"[:40]: (f"$.{name}", {name: value}) for name, values in VALUES.items() for value in values
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_message_is_rejected_by_path(name: str) -> None:
    """Invalid priorities, delays, queues and org_ids are rejected with their path."""
    path, changed = BAD[name]
    with pytest.raises(PayloadError) as caught:
        write_message(attrs.evolve(PLAIN, **changed))
    assert caught.value.path == path


@given(st.floats() | st.integers())
def test_delay_is_a_finite_number_of_seconds(delay: float) -> None:
    """A delay is 0 seconds to ten years; any other value is rejected."""
    if 0 <= delay <= 315_360_000:
        check_delay(delay)
    else:
        with pytest.raises(PayloadError):
            check_delay(delay)


@given(messages, some.deliveries(), some.json_values)
def test_exchanged_values_are_immutable_and_picklable(message: Message, delivery: Delivery, result: Any) -> None:
    """Messages, deliveries, replies and settlements are frozen, equal by content, and can be copied and pickled."""
    reply = Reply("key", "completed", result=result)
    settlement = Settlement(delivery, Verdict.ACK, follow_up=message, reply=reply)
    for value in (message, delivery, reply, settlement, Capabilities(delay=True)):
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value  # noqa: S301 - pickled a moment ago
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            value.added = 1  # type: ignore[union-attr]  # what is tested


def test_capabilities_are_off_by_default() -> None:
    """A transport has to claim each capability."""
    assert set(attrs.asdict(Capabilities()).values()) == {False}


@given(some.json_values)
def test_dead_letter_has_its_task_if_known(stored: Any) -> None:
    """A dead letter has the task name of its message, or None if that has none."""
    now = datetime.datetime.now(datetime.UTC)
    letter = DeadLetter("1", "q", stored, "why", 1, None, "", 5, now, now)
    assert letter.task_name is None or letter.task_name == stored["task_name"]
    kinds: list[Any] = [{"task_name": "t"}, {"task_name": 7}, "text", None]
    for kept, name in zip(kinds, ["t", None, None, None], strict=True):
        assert attrs.evolve(letter, message=kept).task_name == name
