"""The messages in the documents are valid on the wire, and the code in the documents runs."""

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
def test_documented_messages_round_trip(message: dict[str, Any]) -> None:
    """Each documented message is read and written again with the same key order."""
    assert json.dumps(to_wire(from_wire(json.dumps(message)))) == json.dumps(message)


def test_document_shows_every_key() -> None:
    """The examples have each key except `reply_key`, which the table has."""
    shown = {key for message in MESSAGES for key in message}
    assert shown | {"reply_key"} == set(re.findall(r"^\| `(\w+)` \|.*(?:always|when set)", TEXT, re.MULTILINE))


def python_of(document: str) -> list[str]:
    """Return the Python blocks of a document without the indentation of a list item."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in blocks]


def test_first_example_of_the_celery_document_runs(rabbitmq_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The example runs on a real broker with a queue of the test."""
    (code,) = python_of("celery.md")
    queue = queue_name()
    exec(code.replace("amqp://guest:guest@localhost:5672//", rabbitmq_url).replace('"executor"', f'"{queue}"'), {})  # noqa: S102 - the document's own
    assert capsys.readouterr().out == "d-1\n"
    with kombu.Connection(rabbitmq_url) as connection:
        connection.default_channel.queue_delete(queue)
        connection.default_channel.exchange_delete(queue)


@pytest.mark.parametrize("code", python_of("migrating.md"))
def test_imports_of_the_migration_document_exist(code: str) -> None:
    """Each imported name of this package exists in its module."""
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
def test_document_lists_the_known_differences(side: str, heading: str) -> None:
    """The document lists the differences that the A/B test asserts, in its order and words."""
    text = (ROOT / "docs" / "celery.md").read_text(encoding="utf-8")
    shown = re.search(rf"^{heading}\n\n((?:- .*\n)+)", text, re.MULTILINE)
    assert shown is not None
    listed = [line.removeprefix("- ") for line in shown[1].splitlines()]
    assert listed == list(dict.fromkeys(one.reason for one in DIFFERENCES if one.side == side))


def test_conformance_document_lists_every_kit_file() -> None:
    """Each file of the kit is listed with the first line of its docstring, and no other file."""
    listed = re.findall(r"^\| \[(test_\w+\.py)\]\(\.\./contract_tests/\1\) \| (.*) \|$", CONFORMANCE, re.MULTILINE)
    files = sorted((ROOT / "contract_tests").glob("test_*.py"))
    concerns = {file.name: str(ast.get_docstring(ast.parse(file.read_text()))).partition("\n")[0] for file in files}
    assert dict(listed) == concerns


def test_changelog_headings_are_unique_in_a_version() -> None:
    """Each version has each heading and each entry once."""
    for version in (ROOT / "CHANGELOG.md").read_text("utf-8").split("\n## ")[1:]:
        headings = re.findall(r"^### .+$", version, re.MULTILINE)
        assert len(headings) == len(set(headings))
        entries = re.findall(r"^- .+$", version, re.MULTILINE)
        assert len(entries) == len(set(entries))
