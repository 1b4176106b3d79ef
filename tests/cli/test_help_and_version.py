"""The help and the version of the command, and missing extras."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest
from cli.outcomes import Ended, the_one_line

import unstract_core
from tools.check_lock import ROOT
from unstract_core import cli


def commands(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, part in command.commands.items():
            yield from commands(part, *path, name)


def test_version_is_the_version_of_the_package(run: Callable[..., Any]) -> None:
    """`--version` prints the name and the package's version."""
    assert run("--version").stdout == f"unstract-wire {unstract_core.__version__}\n"


@pytest.mark.parametrize(
    ("path", "command"), [pytest.param(*found, id=" ".join(found[0])) for found in commands(cli.main)]
)
def test_help_explains_each_command_and_option(
    run: Callable[..., Any], path: tuple[str, ...], command: click.Command
) -> None:
    """`--help` of each command describes the command and each of its options."""
    shown = run(*path, "--help", url=None)
    assert shown.exit_code == 0
    assert command.help
    assert command.help.splitlines()[0] in shown.stdout
    assert not command.get_short_help_str(limit=68).endswith("...")
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help
            assert max(option.opts, key=len) in shown.stdout


def test_help_and_docs_list_the_same_exit_codes(run: Callable[..., Any]) -> None:
    """`unstract-wire --help` and docs/command-line.md list all exit codes in the same words."""
    helped = re.findall(r"^  +(\d[\d +N]*?)  +(\w.*)$", run("--help").stdout.partition("Exit codes:")[2], re.MULTILINE)
    documented = re.findall(r"^\| (\d[\d +N]*) \| (.*) \|$", (ROOT / "docs/command-line.md").read_text(), re.MULTILINE)
    assert [code for code, _ in helped] == ["0", "1", "2", "130", "128 + N"]
    assert helped == documented


def without(module: str) -> str:
    """Return Python code that runs the command as if `module` were not installed."""
    return f"import runpy, sys; sys.modules[{module!r}] = None; runpy.run_module('unstract_core', run_name='__main__')"


def run_without(module: str, *arguments: str) -> Ended:
    ended = subprocess.run(
        [sys.executable, "-c", without(module), *arguments], capture_output=True, text=True, check=False
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def test_without_click_one_line_names_the_extra() -> None:
    """Without click the command prints one line that says what to install, and exits with 2."""
    assert "pip install 'unstract-wire[cli]'" in the_one_line(run_without("click", "queues"))


def test_the_core_does_not_import_click_or_rich() -> None:
    """Importing the package, as producers do, imports neither click nor rich."""
    code = "import sys, unstract_core; sys.exit(bool({'click', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_rich_a_terminal_gets_the_plain_table(on_terminal: Callable[..., Ended]) -> None:
    """Without rich a terminal gets the same table as a pipe."""
    ended = on_terminal("dead", "list", "--limit", "1", "--url", "cli.shared:crowded", program=("-c", without("rich")))
    assert (ended.code, ended.out.splitlines()[1].split()[-1]) == (0, "x" * 100)
