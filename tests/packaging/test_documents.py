"""The messages that the documents show are messages of the wire, and their code runs."""

from __future__ import annotations

import ast
import importlib
import json
import re
from typing import Any

import kombu
import pytest
from celery_wire.ab_differences import DIFFERENCES
from queues import queue_name

from tools.check_lock import ROOT
from unstract_core import from_wire, to_wire

TEXT = (ROOT / "docs" / "wire.md").read_text()
CONFORMANCE = (ROOT / "docs" / "conformance.md").read_text()
MESSAGES: list[dict[str, Any]] = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)]


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_a_message_of_the_document_is_read_and_written_as_it_stands(message: dict[str, Any]) -> None:
    """To the key order."""
    assert json.dumps(to_wire(from_wire(json.dumps(message)))) == json.dumps(message)


def test_the_document_shows_every_key_that_can_be_written() -> None:
    """All but `reply_key`, which never stands beside the callbacks, in its examples; and that one in its table."""
    shown = {key for message in MESSAGES for key in message}
    assert shown | {"reply_key"} == set(re.findall(r"^\| `(\w+)` \|.*(?:always|when set)", TEXT, re.MULTILINE))


def python_of(document: str) -> list[str]:
    """Return the Python blocks of a document, with the indentation of a list item taken off."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in blocks]


def test_the_first_lines_of_celerys_document_run(rabbitmq_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On a real broker, with a queue of the test's own: what is sent is run."""
    (code,) = python_of("celery.md")
    queue = queue_name()
    exec(code.replace("amqp://guest:guest@localhost:5672//", rabbitmq_url).replace('"executor"', f'"{queue}"'), {})  # noqa: S102 - the document's own
    assert capsys.readouterr().out == "d-1\n"
    with kombu.Connection(rabbitmq_url) as connection:
        connection.default_channel.queue_delete(queue)
        connection.default_channel.exchange_delete(queue)


@pytest.mark.parametrize("code", python_of("migrating.md"))
def test_what_the_document_on_migrating_imports_of_ours_is_there(code: str) -> None:
    """Every name, from where it says; what is the product's own is not looked for."""
    imports = [node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom) and node.module is not None]
    ours = [node for node in imports if str(node.module).startswith(("unstract_core", "transports"))]
    assert ours
    for node in ours:
        module = importlib.import_module(str(node.module))
        assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize(
    ("side", "heading"),
    [("RabbitMQ", "On RabbitMQ, with our Consumer:"), ("Celery", "On RabbitMQ, with a Celery worker:")],
)
def test_the_document_lists_the_known_differences_and_no_others(side: str, heading: str) -> None:
    """Those that the A/B test asserts, in its order and words."""
    text = (ROOT / "docs" / "celery.md").read_text(encoding="utf-8")
    shown = re.search(rf"^{heading}\n\n((?:- .*\n)+)", text, re.MULTILINE)
    assert shown is not None
    listed = [line.removeprefix("- ") for line in shown[1].splitlines()]
    assert listed == list(dict.fromkeys(one.reason for one in DIFFERENCES if one.side == side))


def test_the_document_on_conformance_lists_every_concern_of_the_kit() -> None:
    """Each file of the kit with the first line of its docstring, and no other."""
    listed = re.findall(r"^\| \[(test_\w+\.py)\]\(\.\./contract_tests/\1\) \| (.*) \|$", CONFORMANCE, re.MULTILINE)
    files = sorted((ROOT / "contract_tests").glob("test_*.py"))
    concerns = {file.name: str(ast.get_docstring(ast.parse(file.read_text()))).partition("\n")[0] for file in files}
    assert dict(listed) == concerns


def test_no_heading_of_the_changelog_repeats_in_a_version() -> None:
    """Each version has each heading once, and each entry once."""
    for version in (ROOT / "CHANGELOG.md").read_text("utf-8").split("\n## ")[1:]:
        headings = re.findall(r"^### .+$", version, re.MULTILINE)
        assert len(headings) == len(set(headings))
        entries = re.findall(r"^- .+$", version, re.MULTILINE)
        assert len(entries) == len(set(entries))
