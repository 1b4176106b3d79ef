"""The schema against the golden corpus: it describes every message that was ever written."""

from __future__ import annotations

import jsonschema
import pytest

from contract_tests.golden_corpus import Readable, wire_messages
from unstract_core.schema import committed_schema

WRITTEN = [one for one in wire_messages() if isinstance(one, Readable) and one.reads_as is not None]


@pytest.mark.parametrize("golden", WRITTEN, ids=lambda one: one.name)
def test_rewritten_golden_messages_are_valid(golden: Readable) -> None:
    """Another validator accepts each golden message after our writer has written it again."""
    jsonschema.Draft202012Validator(committed_schema()).validate(golden.reads_as)
