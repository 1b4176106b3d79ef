"""The messages that the documents show are messages of the wire."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tools.check_lock import ROOT
from unstract_core import from_wire, to_wire

TEXT = (ROOT / "docs" / "wire.md").read_text()
MESSAGES: list[dict[str, Any]] = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)]


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_a_message_of_the_document_is_read_and_written_as_it_stands(message: dict[str, Any]) -> None:
    """To the key order."""
    assert json.dumps(to_wire(from_wire(json.dumps(message)))) == json.dumps(message)


def test_the_document_shows_every_key_that_can_be_written() -> None:
    """All but `reply_key`, which never stands beside the callbacks, in its examples; and that one in its table."""
    shown = {key for message in MESSAGES for key in message}
    assert shown | {"reply_key"} == set(re.findall(r"^\| `(\w+)` \|.*(?:always|when set)", TEXT, re.MULTILINE))
