"""Tables: fitted to a terminal of any width, and complete in a pipe."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
from cli.outcomes import Ended
from cli.shared import Lasting
from queues import bury
from rich.cells import cell_len

from contract_tests.messages import message

IDS = ("4711001", "4711000")
NAMES = ("celery_executor_legacy", "execute_extraction", "ide_callback", "ide_prompt_complete")
OnTerminal = Callable[..., Ended]


def screen(on_terminal: OnTerminal, *arguments: str, width: int) -> list[str]:
    ended = on_terminal(*arguments, "--url", "cli.shared:product", width=width)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert max(map(cell_len, lines)) <= width
    return lines


@pytest.mark.parametrize("width", [30, 50, 80, 81, 160, 300])
def test_only_reasons_are_cut_at_any_width(on_terminal: OnTerminal, width: int) -> None:
    """No id, queue, task or time is cut; a reason is cut to one line with at least 26 columns."""
    heading, *lines = screen(on_terminal, "dead", "list", width=width)
    text = "\n".join(lines)
    assert heading.startswith("ID")
    assert [line.split()[0] for line in lines if not line.startswith(" ") and line.split()[0] in IDS] == list(IDS)
    assert all(name in text for name in NAMES)
    assert text.count("Z") == 2
    assert "ExtractionError: invoice " in text
    assert "ValueError: 発票" in text


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (
            50,
            """
            ID       QUEUE
                TASK                 ATTEMPTS
                BURIED AT
                REASON
            4711001  ide_callback
                ide_prompt_complete         1
                2026-01-02T03:04:05Z
                ValueError: 発票番号が見つかりません、もう一 …
            4711000  celery_executor_legacy
                execute_extraction          1
                2026-01-02T03:04:05Z
                ExtractionError: invoice MF-4471 does not add…
            """,
        ),
        (
            80,
            """
            ID       QUEUE                   TASK                 ATTEMPTS
                BURIED AT             REASON
            4711001  ide_callback            ide_prompt_complete         1
                2026-01-02T03:04:05Z  ValueError: 発票番号が見つかりません、もう一度お試し …
            4711000  celery_executor_legacy  execute_extraction          1
                2026-01-02T03:04:05Z  ExtractionError: invoice MF-4471 does not add up: its…
            """,
        ),
        (
            160,
            """
            ID       QUEUE                   TASK                 ATTEMPTS  BURIED AT             REASON
            4711001  ide_callback            ide_prompt_complete         1  2026-01-02T03:04:05Z  \
ValueError: 発票番号が見つかりません、もう一度お試しください
            4711000  celery_executor_legacy  execute_extraction          1  2026-01-02T03:04:05Z  \
ExtractionError: invoice MF-4471 does not add up: its 3 line items come t…
            """,
        ),
    ],
)
def test_a_wide_row_continues_on_the_next_line(on_terminal: OnTerminal, width: int, shown: str) -> None:
    """Headings and rows continue indented; the reason stays on the first line if it gets 40 columns."""
    lines = screen(on_terminal, "dead", "list", width=width)
    screenful = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "2026-01-02T03:04:05Z", "\n".join(lines))
    assert screenful == textwrap.dedent(shown).strip()


@pytest.mark.parametrize("width", [40, 80])
def test_the_figures_of_a_queue_are_never_cut(on_terminal: OnTerminal, width: int) -> None:
    """A table of figures continues on the next line, with every name and figure."""
    lines = screen(on_terminal, "queues", width=width)
    busy, quiet = ["celery_executor_legacy", "1200", "1200", "0", "0", "0s", "1"], ["ide_callback", *"0000-1"]
    assert " ".join(lines).split()[8:] == busy + quiet


def test_a_table_in_a_pipe_is_complete(run: Callable[..., Any], transport: Lasting) -> None:
    """A table in a pipe is aligned, and nothing is cut."""
    transport.send([message("t", "q"), message("t", "a-longer-name")])
    bury(transport, "q", "x" * 300)
    bury(transport, "a-longer-name", "y")
    heading, newest, oldest = run("dead", "list").stdout.splitlines()
    assert heading.index("TASK") == newest.index(" t ") + 1 == oldest.index(" t ") + 1
    assert oldest.endswith("  " + "x" * 300)
