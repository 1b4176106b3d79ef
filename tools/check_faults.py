"""Check that docs/conformance.md lists every fault that the kit catches; `--write` updates the table.

The table is between two markers, and the text around it is not changed. It is generated from the planted faults of
tests/kit; tests/kit/test_faults.py checks that the named test catches each fault.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from kit.faults import FAULTS  # noqa: E402 - the faults are no installed package

from contract_tests.suite import TESTS  # noqa: E402

if TYPE_CHECKING:
    from kit.planting import PlantedFault

PAGE = ROOT / "docs" / "conformance.md"
BEGIN, END = "<!-- faults -->\n", "<!-- /faults -->\n"


def lines(faults: Mapping[str, PlantedFault]) -> Iterator[str]:
    """Return the table, in the order of the kit's files and tests."""
    yield "| fault | caught by | what is wrong |"
    yield "| --- | --- | --- |"
    order = {test: place for place, test in enumerate(TESTS)}
    for fault in sorted(faults.values(), key=lambda one: order.get(one.caught_by, -1)):
        test = TESTS.get(fault.caught_by)
        file = test.__module__.removeprefix("contract_tests.") if test else "missing"
        caught_by = f"[`{fault.caught_by}`](../contract_tests/{file}.py)"
        yield f"| {fault.name.replace('_', ' ')} | {caught_by} | {fault.about.replace('|', '&#124;')} |"


def table(faults: Mapping[str, PlantedFault]) -> str:
    return "".join(f"{line}\n" for line in lines(faults))


def parts(page: str) -> tuple[str, str, str]:
    """Return the text before the table, the table, and the text after it; raises ValueError without the markers."""
    before, begin, rest = page.partition(BEGIN)
    found, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{BEGIN.strip()} and {END.strip()} do not stand on lines of their own")
    return before + begin, found, end + after


def problems(page: str, faults: Mapping[str, PlantedFault]) -> list[str]:
    """Return the differences of the page; empty if there are none."""
    found = [
        f"{one.name} names a test that the kit does not have: {one.caught_by}"
        for one in faults.values()
        if one.caught_by not in TESTS
    ]
    try:
        before, old, after = parts(page)
    except ValueError as exc:
        return [*found, str(exc)]
    wanted, there = set(lines(faults)), set(old.splitlines())
    found += [f"missing: {line}" for line in wanted - there] + [f"not so: {line}" for line in there - wanted]
    if not found and page != before + table(faults) + after:
        found.append("the lines are in another order")
    return sorted(found)


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--write"]):
        print("usage: check_faults.py [--write]", file=sys.stderr)
        return 2
    page = PAGE.read_text(encoding="utf-8")
    if arguments:
        before, _, after = parts(page)
        page = before + table(FAULTS) + after
        PAGE.write_text(page, encoding="utf-8")
    found = problems(page, FAULTS)
    for problem in found:
        print(f"{PAGE.name}: {problem}")
    print(f"{PAGE.name}: {f'{len(found)} problems; `make faults` writes it' if found else f'{len(FAULTS)} faults'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
