"""The drift check of the lock: each kind of drift is found, and named."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from tools.check_lock import Installed, Need, problems, read_lock, stated, stated_by_group, written

INSTALLED = {
    "top": Installed("2.0", (Requirement("middle>=1"), Requirement("old-only; python_version < '3.12'"))),
    "middle": Installed("1.5", (Requirement("leaf[fast]<3"),)),
    "leaf": Installed("2.1", (Requirement("speed; extra == 'fast'"), Requirement("never; extra == 'slow'"))),
    "speed": Installed("0.9", ()),
    "bystander": Installed("7.0", ()),
}
NEEDS = [Need(Requirement("top>=2"), "dependencies")]
GOOD = "# a comment\nleaf==2.1\nmiddle==1.5\nspeed==0.9\ntop==2.0\n"


def _problems(lock: str, needs: list[Need] | None = None) -> list[str]:
    return problems(lock, NEEDS if needs is None else needs, INSTALLED, "3.13")


def test_an_exact_lock_has_no_problems() -> None:
    """Followed through extras and what they need in turn."""
    assert _problems(GOOD) == []


def test_the_lock_that_is_written_has_no_problems() -> None:
    """What --write writes is what the check accepts: sorted, and without the bystander."""
    text = written(NEEDS, INSTALLED, "3.13")
    assert _problems(text) == []
    assert list(read_lock(text)[0]) == ["leaf", "middle", "speed", "top"]


@pytest.mark.parametrize("name", ["leaf", "middle", "speed", "top"])
def test_a_dependency_without_a_pin_is_found(name: str) -> None:
    """However deep it lies."""
    lock = "\n".join(line for line in GOOD.splitlines() if not line.startswith(name))
    (problem,) = _problems(lock)
    assert problem.startswith(f"{name} is not pinned, and ")


def test_a_pin_that_nothing_needs_is_found() -> None:
    """It may be installed: nothing of this project needs it."""
    assert _problems(GOOD + "bystander==7.0\n") == ["bystander is pinned, and nothing needs it"]


def test_a_pin_for_another_python_is_needed() -> None:
    """One lock serves every supported Python."""
    assert _problems(GOOD + "old-only==1.0\n") == []


def test_a_pin_outside_its_requirement_is_reported() -> None:
    """A raised bound in pyproject.toml asks for a new lock."""
    problem = "top==2.0 is pinned, but dependencies needs top>=2.1"
    assert _problems(GOOD, [Need(Requirement("top>=2.1"), "dependencies")]) == [problem]


def test_an_environment_with_another_version_is_found() -> None:
    """The checks would run on something that is not locked."""
    assert _problems(GOOD.replace("speed==0.9", "speed==0.8")) == ["speed==0.8 is pinned, but 0.9 is installed"]


def test_a_requirement_that_is_not_installed_is_found() -> None:
    """The environment is older than pyproject.toml."""
    needs = [*NEEDS, Need(Requirement("absent"), "group dev")]
    assert _problems(GOOD + "absent==1.0\n", needs) == ["absent is not installed, and group dev needs absent"]


@pytest.mark.parametrize(
    "line",
    [
        "leaf>=2.1",
        "leaf",
        "leaf==2.*",
        "leaf==2.1 --hash=sha256:00",
        "leaf @ https://example.org/leaf.whl",
        "--index-url https://example.org",
        "-e .",
        "leaf[fast]==2.1",
        "leaf==2.1; python_version > '3'",
    ],
)
def test_an_inexact_pin_is_reported(line: str) -> None:
    """No ranges, no hashes, no places to download from."""
    assert [f"line 6 is not an exact pin `name==version`: {line}"] == _problems(f"{GOOD}{line}\n")


def test_a_second_pin_of_a_name_is_reported() -> None:
    """Also where it is spelled differently."""
    assert _problems(f"{GOOD}TOP==2.0\n") == ["line 6 pins TOP a second time"]


def test_every_table_of_pyproject_states_requirements() -> None:
    """Build backend, dependencies, extras and the groups of dev are read; the project's own extras are not.

    Neither is a group that dev does not include: it is installed where it is used, and is in no lock.
    """
    pyproject = {
        "build-system": {"requires": ["backend"]},
        "project": {
            "name": "Own_Name",
            "dependencies": ["core>=1"],
            "optional-dependencies": {"x": ["driver[fast]"], "all": ["own-name[x]"]},
        },
        "dependency-groups": {"test": ["runner"], "dev": [{"include-group": "test"}], "fuzz": ["fuzzer"]},
    }
    found = {(str(need.requirement), need.of) for need in stated(pyproject)}
    assert found == {
        ("backend", "build-system"),
        ("core>=1", "dependencies"),
        ("driver[fast]", "extra x"),
        ("runner", "group test"),
    }


def test_one_group_is_stated_without_the_rest() -> None:
    """The group `docs` has an environment and a lock of its own."""
    pyproject = {"dependency-groups": {"test": ["runner"], "docs": ["theme>=1", {"include-group": "test"}]}}
    (need,) = stated_by_group(pyproject, "docs")
    assert (str(need.requirement), need.of) == ("theme>=1", "group docs")
