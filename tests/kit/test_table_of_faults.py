"""The table of faults in the docs matches the planted faults, and its check finds differences."""

from __future__ import annotations

import attrs
import pytest
from kit.faults import FAULTS

from tools.check_faults import BEGIN, END, PAGE, parts, problems, table

SOUND = f"# Title\n\n{BEGIN}{table(FAULTS)}{END}\nMore.\n"


def test_the_page_lists_the_planted_faults() -> None:
    """The table in the repository's page is up to date."""
    assert problems(PAGE.read_text(encoding="utf-8"), FAULTS) == []


def test_text_around_the_table_is_not_checked() -> None:
    """Only the text between the markers is compared and written."""
    assert problems(SOUND, FAULTS) == []
    assert parts(SOUND)[0].startswith("# Title\n")
    assert parts(SOUND)[2] == f"{END}\nMore.\n"


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        (SOUND.replace("| cannot be woken |", "| could not be woken |"), "could not be woken"),
        (SOUND.replace(END, "| one | more | row |\n" + END), "not so: | one | more | row |"),
        (f"{BEGIN}{END}", "missing: | cannot be woken |"),
        (SOUND.replace(END, ""), "do not stand on lines of their own"),
        ("", "do not stand on lines of their own"),
    ],
)
def test_an_outdated_page_is_a_problem(page: str, problem: str) -> None:
    """A changed, superfluous or missing row is reported, and so are missing markers."""
    assert any(problem in one for one in problems(page, FAULTS))


def test_rows_in_another_order_are_a_problem() -> None:
    """The rows are in the order of the kit's files."""
    *head, last = table(FAULTS).splitlines(keepends=True)
    page = BEGIN + "".join([*head[:2], last, *head[2:]]) + END
    assert problems(page, FAULTS) == ["the lines are in another order"]


def test_a_fault_with_unknown_test_is_a_problem() -> None:
    """Renaming a test requires renaming it in its faults."""
    name, fault = next(iter(FAULTS.items()))
    faults = {**FAULTS, name: attrs.evolve(fault, caught_by="test_of_yesterday")}
    assert f"{name} names a test that the kit does not have: test_of_yesterday" in problems(SOUND, faults)
