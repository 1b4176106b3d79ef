"""Errors of the command: one line on standard error, exit code 2, and no traceback."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from cli import shared
from cli.outcomes import Ended, the_one_line
from click.testing import CliRunner
from hypothesis import assume, given
from hypothesis import strategies as st

from unstract_core import cli

WORKER = ("worker", "--queue", "q", "--app")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), ["Missing command", "'unstract-wire --help'"]),
        (("dead",), ["Missing command", "'unstract-wire dead --help'"]),
        (("quues",), ["No such command 'quues'"]),
        (("queues", "--jsn"), ["No such option", "--jsn", "--json", "'unstract-wire queues --help'"]),
        (("worker", "--queue", "q"), ["Missing option '--app'", "'unstract-wire worker --help'"]),
        (("worker", "--app", "cli.shared:tasks"), ["Missing option '--queue'"]),
        ((*WORKER, "cli.shared:tasks", "--concurrency", "0"), ["--concurrency", "0 is not in the range"]),
        ((*WORKER, "cli.shared:tasks", "--concurrency", "two"), ["--concurrency", "'two'"]),
        ((*WORKER, "cli.shared:tasks", "--lease", "nan"), ["lease must be a positive number"]),
        ((*WORKER, "cli.shared:tasks", "--lease", "-1"), ["--lease"]),
        ((*WORKER, "cli.shared:tasks", "--prefetch", "1", "--concurrency", "2"), ["prefetch", "concurrency"]),
        ((*WORKER, "cli.shared:tasks", "--log-level", "loud"), ["--log-level", "'loud'"]),
        (("worker", "--app", "cli.shared:tasks", "--queue", ""), ["queues", "non-empty"]),
        ((*WORKER, "tasks"), ["--app takes module:name", "'tasks'"]),
        ((*WORKER, "cli.shared:"), ["--app takes module:name"]),
        ((*WORKER, "cli.shared:nothing"), ["cli.shared", "has no 'nothing'"]),
        ((*WORKER, "no_such_module:tasks"), ["No module named 'no_such_module'", "current directory"]),
        ((*WORKER, ".relative:tasks"), ["--app '.relative:tasks'", "module:name"]),
        ((*WORKER, "cli.shared:not_a_mapping"), ["cli.shared:not_a_mapping is a list", "mapping of task names"]),
        ((*WORKER, "cli.shared:fail"), ["cli.shared:fail is a function", "mapping of task names"]),
        ((*WORKER, "cli.shared:badly_named_tasks"), ["name is not a string: 7"]),
        (("migrate",), ["nothing to migrate"]),
        (("dead", "show", "17"), ["no dead letter 17", "unstract-wire dead list"]),
        (("dead", "show"), ["Missing argument 'ID'"]),
        (("dead", "list", "--limit", "0"), ["--limit"]),
        (("dead", "replay"), ["either IDs, or --queue NAME --all"]),
        (("dead", "replay", "1", "--all"), ["either IDs, or --queue NAME --all"]),
        (("dead", "replay", "1", "--queue", "q"), ["either IDs, or --queue NAME --all"]),
        (("dead", "replay", "1", "--queue", "q", "--all"), ["either IDs, or --queue NAME --all"]),
        (("dead", "replay", "--queue", "q"), ["either IDs, or --queue NAME --all"]),
        (("dead", "replay", "--all"), ["either IDs, or --queue NAME --all"]),
        ((*WORKER, "cli.shared:tasks", "--status-payload", "all"), ["--status-payload", "'all'"]),
        ((*WORKER, "cli.shared:tasks", "--returned-failure", "none"), ["--returned-failure", "'none'"]),
        (
            (*WORKER, "cli.shared:tasks", "--allow-continuation", ":task"),
            ["':task' lacks a queue or a task", '"queue:task"'],
        ),
        ((*WORKER, "cli.shared:tasks", "--allow-continuation", "queue:"), ["'queue:' lacks a queue or a task"]),
        (("dead", "replay", "17", "x"), ["no dead letters 17, x"]),
        (("dead", "purge"), ["either IDs, or --queue NAME, or --all"]),
        (("dead", "purge", "1", "--all"), ["either IDs, or --queue NAME, or --all"]),
        (("dead", "purge", "1", "--older-than", "5"), ["--older-than works with"]),
        (("dead", "purge", "17", "--yes"), ["no dead letter 17"]),
        (("dead", "purge", "--all"), ["no terminal to ask on", "--yes"]),
        (("dead", "purge", "--all", "--older-than", "-1", "--yes"), ["--older-than"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_argument_is_one_error_line(
    run: Callable[..., Any], arguments: tuple[str, ...], said: list[str]
) -> None:
    """A wrong command, option, app or id is one line that names it."""
    line = the_one_line(run(*arguments))
    for part in said:
        assert part in line


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (None, ["--url", "UNSTRACT_WIRE_URL", "postgresql://"]),
        ("", ["--url", "UNSTRACT_WIRE_URL"]),
        ("nosuch://host", ["nosuch://", "installed:", "memory", "postgresql"]),
        ("memory://host", ["memory://", "no host"]),
        ("postgresql://[half", ["cannot be parsed"]),
        ("postgresql://localhost/db?nonsense=1", ["unknown option 'nonsense'", "poll_interval"]),
        ("postgresql://localhost/db?listen=perhaps", ["listen='perhaps'"]),
        ("postgresql://nobody@127.0.0.1:1/db", ["cannot connect", "127.0.0.1", "refused"]),
        ("host=localhost", ["neither a URL nor of the form module:name"]),
        ("no_such_module:make", ["No module named 'no_such_module'", "current directory"]),
        ("cli.shared:nothing", ["has no 'nothing'"]),
        ("cli.shared:not_a_transport", ["capabilities, send"]),
        ("cli.shared:broken", ["cli.shared:broken", "KeyError: 'DATABASE_URL'", "shared.py:"]),
        ("cli.shared:claimless", ["cli.shared:claimless", "does not claim", "'inspection'"]),
        ("cli.shared:explaining", ["cli.shared:explaining cannot do this: ask the broker's own tools"]),
        ("cli.shared:faulty", ["unexpected RuntimeError", "shared.py:", "--debug"]),
    ],
    ids=str,
)
def test_an_unusable_transport_is_one_error_line(run: Callable[..., Any], url: str | None, said: list[str]) -> None:
    """A missing, wrong or unknown URL, or an unreachable server, is one line with the remedy."""
    line = the_one_line(run("queues", url=url))
    for part in said:
        assert part in line


@pytest.mark.parametrize(
    "arguments", [("dead", "list"), ("dead", "show", "1"), ("dead", "replay", "1"), ("dead", "purge", "1", "--yes")]
)
def test_dead_refuses_transports_without_dead_letters(run: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    """A transport that does not claim dead letters is not asked for them."""
    assert "'dead_letters'" in the_one_line(run(*arguments, url="cli.shared:claimless"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import absent_library", ["No module named 'absent_library'", "broken_app.py:2"]),
        ("from json import absent_name", ["absent_name", "broken_app.py:2"]),
        ("import psycopg_pool_absent.x", ["No module named 'psycopg_pool_absent'", "broken_app.py:2"]),
        ("tasks = {}[1]", ["KeyError: 1", "broken_app.py:2"]),
        ("def tasks(:", ["SyntaxError", "broken_app.py, line 2"]),
        ("raise SystemExit(0)", ["SystemExit", "broken_app.py:2"]),
        ("tasks = {}", ["no tasks are registered"]),
        ("async def task(): pass\ntasks = {'t': task}", ["'t' is an async function"]),
        ("tasks = {'t': 5}", ["'t' is not callable"]),
    ],
)
def test_import_errors_of_the_app_name_the_line(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: list[str]
) -> None:
    """The error names the file and line in the user's module, not the import in this package."""
    (tmp_path / "broken_app.py").write_text(f"'An app.'\n{source}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_app", raising=False)
    line = the_one_line(run(*WORKER, "broken_app:tasks"))
    for part in said:
        assert part in line


def test_debug_shows_the_traceback_of_a_bug(run: Callable[..., Any]) -> None:
    """--debug or UNSTRACT_WIRE_DEBUG prints the traceback before the error line; without it no error text is shown."""
    silent = run("queues", url="cli.shared:faulty")
    assert "payload content" not in silent.stderr
    for result in (
        run("--debug", "queues", url="cli.shared:faulty"),
        run("queues", "--debug", url="cli.shared:faulty"),
        CliRunner().invoke(cli.main, ["--url", "cli.shared:faulty", "queues"], env={"UNSTRACT_WIRE_DEBUG": "1"}),
    ):
        first, *_, last = result.stderr.splitlines()
        assert (result.exit_code, first) == (2, "Traceback (most recent call last):")
        assert "RuntimeError: payload content" in result.stderr
        assert last.startswith("unstract-wire: unexpected RuntimeError (")


def test_the_last_url_option_wins(run: Callable[..., Any]) -> None:
    """The sub-command's --url wins over the group's, and that over the environment variable."""
    good = "cli.shared:transport"
    assert run("queues", "--url", good, url="wrong://").exit_code == 0
    assert run("--url", good, "queues", url="wrong://").exit_code == 0
    assert run("--url", "wrong://", "queues", "--url", good).exit_code == 0
    assert run("--url", "wrong://", "dead", "--url", good, "list").exit_code == 0
    assert run("--url", "wrong://", "dead", "--url", "wrong://", "list", "--url", good).exit_code == 0
    assert "worse://" in the_one_line(run("--url", "wrong://", "queues", "--url", "worse://", url=good))


LETTERS = st.characters(
    min_codepoint=32, max_codepoint=0x2FF, exclude_characters="@/?#[]:%\\", categories=("L", "N", "P", "S", "Zs")
)
PASSWORDS = st.text(LETTERS, min_size=6)


@given(password=PASSWORDS, scheme=st.sampled_from(["echo", "crash"]), quoted=st.booleans(), debug=st.booleans())
def test_a_password_is_never_printed(password: str, scheme: str, quoted: bool, debug: bool) -> None:
    """A password that a driver repeats appears neither in the error line nor in the traceback."""

    def fail(secret: str) -> str:
        arguments = ["queues", "--url", f"{scheme}://user:{secret}@host:1/db", *(["--debug"] if debug else [])]
        ended = CliRunner().invoke(cli.main, arguments)
        assert (ended.exit_code, ended.stdout) == (2, "")
        return ended.stderr

    written = quote(password, safe="") if quoted else password
    assume(password not in fail("XXXXXX"))
    printed = fail(written)
    assert written in shared.seen_urls[-1] or scheme == "crash"
    assert password not in printed
    assert written not in printed
    assert "***" in printed


def test_log_records_are_not_printed_beside_an_error(start: Callable[..., subprocess.Popen[str]]) -> None:
    """A command other than worker prints its error line, and no log record."""
    process = start("queues", "--url", "echo://user:s3cret-word@host/db")
    out, err = process.communicate()
    assert "***" in the_one_line(Ended(process.returncode, out, err))


def test_a_worker_masks_the_log_of_a_driver(start: Callable[..., subprocess.Popen[str]]) -> None:
    """A driver's record in the log of a worker is one line without the password."""
    process = start(*WORKER, "cli.shared:tasks", "--url", "echo://user:s3cret-word@host/db")
    _, err = process.communicate()
    logged, _ = err.splitlines()
    assert logged.endswith("WARNING driver cannot connect to echo://user:***@host/db\\nwill try again")
    assert "s3cret-word" not in err


@pytest.mark.parametrize(
    "url",
    [
        "echo://user@company:{}@host/db",
        "echo://:{}@host/db",
        "echo://user:p@rt/{}@host/db",
        "echo://host/db?user=u&password={}&sslmode=require",
        "echo://host/db?sslpassword={}",
        "host=h user=u password={} dbname=d",
        "host=h password='{}' dbname=d",
        "no_such_module:make?://user:{}@host",
        "postgresql://nobody:{}@127.0.0.1:1/db",
        "postgresql://nobody:{}%zz@127.0.0.1:1/db",
        "postgresql://nobody:x@{}@127.0.0.1:1/db",
        "nosuch://user:{}@host/db",
    ],
)
def test_passwords_are_masked_throughout_a_url(run: Callable[..., Any], url: str) -> None:
    """A password is masked in a query, in a key=value string, beside an unquoted separator and in a driver's error."""
    assert "s3cret-word" not in the_one_line(run("queues", url=url.format("s3cret-word")))


def test_a_url_without_its_option_is_masked(run: Callable[..., Any]) -> None:
    """A usage error about a URL without --url does not repeat the password."""
    line = the_one_line(run("postgresql://user:s3cret-word@host/db"))
    assert "postgresql://user:***@host/db" in line
    assert "s3cret" not in line


def test_a_user_name_equal_to_the_password_stays(run: Callable[..., Any]) -> None:
    """An error text still names the user if the password equals the user name."""
    line = the_one_line(run("queues", url="echo://postgres:postgres@host/db"))
    assert "echo://postgres:***@host/db" in line


def test_a_closed_pipe_ends_the_command_quietly(start: Callable[..., subprocess.Popen[str]]) -> None:
    """If the pipe is closed early, as by `| head`, the command prints no error."""
    process = start("dead", "list", "--limit", "2000", "--url", "cli.shared:crowded")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("ID")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(10) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_unwritable_output_is_one_error(start: Callable[..., subprocess.Popen[str]]) -> None:
    """A full disk is one error line."""
    with open("/dev/full", "w") as full:
        process = start("dead", "list", "--limit", "1", "--json", "--url", "cli.shared:crowded", stdout=full)
        _, err = process.communicate()
    assert "No space left on device" in the_one_line(Ended(process.returncode, "", err))


def test_control_characters_are_escaped_in_errors(run: Callable[..., Any]) -> None:
    """An error text can neither control the terminal nor forge a second line."""
    line = the_one_line(run("no\x1b[2Jsuch\u202ething"))
    assert line.isprintable()
    assert "\\x1b[2J" in line


def test_ctrl_c_exits_quietly_with_130(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted command prints no traceback and exits with 130."""

    def interrupted(names: object = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shared.current, "queues", interrupted)
    ended = run("queues")
    assert (ended.exit_code, ended.stderr.strip()) == (130, "")


@pytest.mark.parametrize(
    "command",
    [
        ("queues",),
        ("dead", "list"),
        ("dead", "replay", "--all"),
        ("dead", "purge", "--yes"),
        ("worker", "--app", "cli.shared:tasks"),
    ],
    ids=" ".join,
)
def test_queue_names_must_be_utf8(run: Callable[..., Any], command: tuple[str, ...]) -> None:
    """Bytes that are not UTF-8 are refused before the transport is opened, and the error names the option."""
    typed = os.fsdecode(b"invoices-\xff")
    line = the_one_line(run(*command, "--queue", typed))
    assert "'--queue'" in line
    assert "'invoices-\\udcff' is not UTF-8" in line
    assert f"'unstract-wire {' '.join(command).partition(' --')[0]} --help'" in line


def test_the_command_restores_the_logging_configuration(run: Callable[..., Any]) -> None:
    """The command removes its handlers and restores the level of the root logger."""
    before = (list(logging.root.handlers), logging.root.level)
    run("queues")
    run(*WORKER, "cli.shared:nothing")
    assert (list(logging.root.handlers), logging.root.level) == before


def test_an_argument_with_line_breaks_is_one_line(run: Callable[..., Any]) -> None:
    """An error that quotes an argument with line breaks stays one line."""
    assert "'a b'" in the_one_line(run("worker", "--log-level", "a\nb")).replace("\\n", " ")
