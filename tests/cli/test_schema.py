"""`unstract-wire schema`: what it prints, and how a comparison ends."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.outcomes import Ended, the_one_line

from tools.check_lock import ROOT
from unstract_core.schema import FILE, committed_schema

SCHEMA = committed_schema()
RELEASED = ROOT / "tests" / "releases" / FILE


def older(change: Callable[[dict[str, Any]], object]) -> str:
    """The text of a schema from which today's differs by one change."""
    old = copy.deepcopy(SCHEMA)
    change(old)
    return json.dumps(old)


BREAKS_OLD = older(lambda old: old["$defs"]["FairnessKey"]["properties"]["pipeline_priority"].update(maximum=9))
BREAKS_NEW = older(lambda old: old["$defs"]["name"].update(maxLength=300))
BREAKS_BOTH = older(lambda old: old["properties"].update(queue={"type": "integer"}))
FINE = older(lambda old: old["properties"].pop("task_id"))


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_the_schema_is_printed_as_it_is_packed(run: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    """One JSON document, to the byte; no transport is needed."""
    ended = run("schema", *arguments, url=None)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout == (ROOT / "unstract_core" / "schema" / FILE).read_text()


def test_the_schema_of_the_last_release_is_compatible(run: Callable[..., Any]) -> None:
    """As `make check` asks; what is fine may be told."""
    ended = run("schema", "--check-against", str(RELEASED))
    assert (ended.exit_code, ended.stderr) == (0, "")


def test_nothing_has_changed_since_the_schema_itself(start: Callable[..., subprocess.Popen[str]]) -> None:
    """What one process prints, another one compares."""
    process = start("schema", "--check-against", "-")
    assert process.communicate(json.dumps(SCHEMA)) == ("nothing has changed\n", "")
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("old", "line"),
    [
        (BREAKS_OLD, "$.fairness.pipeline_priority: breaks old readers of new rows: maximum was 9, is 10; "),
        (BREAKS_NEW, "$.queue: breaks new readers of old rows: maxLength was 300, is 255; "),
        (BREAKS_BOTH, "$.queue: breaks old readers of new rows and new readers of old rows: it was integer, "),
    ],
    ids=["old readers", "new readers", "both"],
)
def test_what_breaks_is_told_with_its_side_and_ends_with_1(
    run: Callable[..., Any], tmp_path: Path, old: str, line: str
) -> None:
    """One line each on standard output, nothing on standard error, from a file as from standard input."""
    (tmp_path / "old.json").write_text(old)
    ended = run("schema", "--check-against", str(tmp_path / "old.json"))
    assert (ended.exit_code, ended.stderr) == (1, "")
    assert any(printed.startswith(line) for printed in ended.stdout.splitlines())
    assert run("schema", "--check-against", "-", input=old).stdout == ended.stdout


def test_what_is_fine_is_told_as_fine_and_ends_with_0(run: Callable[..., Any]) -> None:
    """A new optional key."""
    ended = run("schema", "--check-against", "-", input=FINE)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout == "$.task_id: fine: a new optional key, which old readers ignore\n"


def test_json_says_the_same(run: Callable[..., Any]) -> None:
    """One document: whether it is compatible, and each change."""
    ended = run("schema", "--json", "--check-against", "-", input=BREAKS_OLD)
    assert ended.exit_code == 1
    document = json.loads(ended.stdout)
    (change,) = document["changes"]
    assert not document["compatible"]
    assert change["path"] == "$.fairness.pipeline_priority"
    assert change["breaks"] == ["old readers of new rows"]
    assert (change["change"], bool(change["remedy"])) == ("maximum was 9, is 10", True)
    ended = run("schema", "--json", "--check-against", "-", input=json.dumps(SCHEMA))
    assert (ended.exit_code, json.loads(ended.stdout)) == (0, {"compatible": True, "changes": []})


@pytest.mark.parametrize(
    ("old", "said"),
    [
        (b"", ["is not JSON"]),
        (b"\xff", ["is not JSON"]),
        (b'{"$schema": NaN}', ["is not JSON", "NaN"]),
        (b"[" * 100_000, ["nested too deep"]),
        (b"[]", ["is not a JSON Schema", "a JSON object"]),
        (b"{}", ["is not a JSON Schema", "2020-12"]),
        (BREAKS_OLD.replace('"type": "array"', '"type": "list"').encode(), ["is not a JSON Schema", "array", ".type"]),
        (b'{"$schema": "https://json-schema.org/draft/2020-12/schema", "$ref": "x.json"}', ['["$ref"]', "a reference"]),
    ],
    ids=range(8),
)
def test_what_is_no_schema_is_one_line_with_the_place(
    run: Callable[..., Any], tmp_path: Path, old: bytes, said: list[str]
) -> None:
    """With the name of the file, and exit code 2."""
    (tmp_path / "old.json").write_bytes(old)
    for name, line in (
        ("old.json", the_one_line(run("schema", "--check-against", str(tmp_path / "old.json")))),
        ("standard input", the_one_line(run("schema", "--check-against", "-", input=old))),
    ):
        for part in (name, *said):
            assert part in line


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_a_file_that_cannot_be_read_is_one_line(run: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """Missing, or no file."""
    assert "'--check-against'" in the_one_line(run("schema", "--check-against", str(tmp_path / name)))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="the system has no file that opens and cannot be read")
def test_a_file_that_opens_and_cannot_be_read_is_one_line(run: Callable[..., Any]) -> None:
    """The system's own reason is told."""
    assert "/proc/self/mem cannot be read: " in the_one_line(run("schema", "--check-against", "/proc/self/mem"))


def test_what_a_schema_says_cannot_steer_a_terminal(start: Callable[..., subprocess.Popen[str]]) -> None:
    """Control characters in the names of its keys are escaped."""
    process = start("schema", "--check-against", "-")
    out, _ = process.communicate(older(lambda old: old["properties"].update({"\x1b[2J\n\u202e": True})))
    assert process.returncode == 1
    assert out.rstrip("\n").isprintable()
    assert Ended(process.returncode, out, "").out.count("\n") == 1
