"""The schema against the golden corpus: what was ever written is what it describes."""

from __future__ import annotations

import jsonschema
import pytest

from contract_tests.golden_corpus import Readable, wire_messages
from unstract_core.schema import committed_schema

WRITTEN = [one for one in wire_messages() if isinstance(one, Readable) and one.reads_as is not None]


@pytest.mark.parametrize("golden", WRITTEN, ids=lambda one: one.name)
def test_every_golden_message_is_valid_as_it_is_written_again(golden: Readable) -> None:
    """Another validator than ours finds nothing wrong with what our writer makes of it."""
    jsonschema.Draft202012Validator(committed_schema()).validate(golden.reads_as)
