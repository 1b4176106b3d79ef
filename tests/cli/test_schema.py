"""`unstract-wire schema`: its output, and the exit code of a comparison."""

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
    """Return a schema from which today's differs by one change."""
    old = copy.deepcopy(SCHEMA)
    change(old)
    return json.dumps(old)


BREAKS_OLD = older(lambda old: old["$defs"]["FairnessKey"]["properties"]["pipeline_priority"].update(maximum=9))
BREAKS_NEW = older(lambda old: old["$defs"]["name"].update(maxLength=300))
BREAKS_BOTH = older(lambda old: old["properties"].update(queue={"type": "integer"}))
FINE = older(lambda old: old["properties"].pop("task_id"))


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_schema_prints_the_packaged_file(run: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    """The output is the packaged schema, byte for byte, and needs no transport."""
    ended = run("schema", *arguments, url=None)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout == (ROOT / "unstract_core" / "schema" / FILE).read_text()


def test_the_schema_of_the_last_release_is_compatible(run: Callable[..., Any]) -> None:
    """Today's schema breaks nothing of the last release's schema."""
    ended = run("schema", "--check-against", str(RELEASED))
    assert (ended.exit_code, ended.stderr) == (0, "")


def test_a_schema_has_no_changes_from_itself(start: Callable[..., subprocess.Popen[str]]) -> None:
    """Another process compares the printed schema, and finds no change."""
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
def test_a_breaking_change_names_its_side(run: Callable[..., Any], tmp_path: Path, old: str, line: str) -> None:
    """Each breaking change is one line with the side that it breaks, and the exit code is 1."""
    (tmp_path / "old.json").write_text(old)
    ended = run("schema", "--check-against", str(tmp_path / "old.json"))
    assert (ended.exit_code, ended.stderr) == (1, "")
    assert any(printed.startswith(line) for printed in ended.stdout.splitlines())
    assert run("schema", "--check-against", "-", input=old).stdout == ended.stdout


def test_a_compatible_change_exits_with_0(run: Callable[..., Any]) -> None:
    """A new optional key is printed as fine, and the exit code is 0."""
    ended = run("schema", "--check-against", "-", input=FINE)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout == "$.task_id: fine: a new optional key, which old readers ignore\n"


def test_the_json_comparison_lists_the_same_changes(run: Callable[..., Any]) -> None:
    """The document says whether the schema is compatible, and lists each change."""
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
def test_a_file_that_is_no_schema_is_refused(
    run: Callable[..., Any], tmp_path: Path, old: bytes, said: list[str]
) -> None:
    """The error is one line with the name of the file, and the exit code is 2."""
    (tmp_path / "old.json").write_bytes(old)
    for name, line in (
        ("old.json", the_one_line(run("schema", "--check-against", str(tmp_path / "old.json")))),
        ("standard input", the_one_line(run("schema", "--check-against", "-", input=old))),
    ):
        for part in (name, *said):
            assert part in line


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_a_missing_schema_file_is_one_line(run: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """A missing file or a directory is one line with exit code 2."""
    assert "'--check-against'" in the_one_line(run("schema", "--check-against", str(tmp_path / name)))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="the system has no file that opens and cannot be read")
def test_a_read_error_is_one_line(run: Callable[..., Any]) -> None:
    """The error line has the operating system's reason."""
    assert "/proc/self/mem cannot be read: " in the_one_line(run("schema", "--check-against", "/proc/self/mem"))


def test_control_characters_of_a_schema_are_escaped(start: Callable[..., subprocess.Popen[str]]) -> None:
    """Control characters in the keys of a schema are escaped."""
    process = start("schema", "--check-against", "-")
    out, _ = process.communicate(older(lambda old: old["properties"].update({"\x1b[2J\n\u202e": True})))
    assert process.returncode == 1
    assert out.rstrip("\n").isprintable()
    assert Ended(process.returncode, out, "").out.count("\n") == 1
