"""The golden corpus is append-only: the check reports any other change, with the file and the remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import check_golden
from tools.check_golden import GOLDEN, MANIFEST, history, problems

Git = Callable[..., str]
NAME = "wire/v1/plain.json"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A small listed corpus outside a repository."""
    golden = tmp_path / "checkout" / "contract_tests" / "golden"
    for name in ("rows/a.json", "wire/v1/plain.json", "wire/v1/reply.json"):
        _put(golden, name, f'{{"about": "{name}"}}\n')
    assert check_golden.main(["--write"], golden) == 0
    return golden


@pytest.fixture
def git(golden: Path, monkeypatch: pytest.MonkeyPatch) -> Git:
    """Return a function that runs git in that checkout, with the corpus committed once."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(golden.parents[2]))

    def run(*arguments: str) -> str:
        if arguments == ("commit",):
            run("add", "--all")
            arguments = ("-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "A change")
        command = ["git", "-C", str(golden.parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=280).stdout

    run("init", "--quiet")
    run("commit")
    return run


def _put(golden: Path, name: str, text: str) -> None:
    (golden / name).parent.mkdir(parents=True, exist_ok=True)
    (golden / name).write_text(text)


def _found(golden: Path) -> list[str]:
    return problems(golden, history(golden))


def _relist(golden: Path) -> None:
    """Rewrite the manifest without the check."""
    files = sorted(path.relative_to(golden).as_posix() for path in golden.rglob("*.json"))
    listed = subprocess.run(["sha256sum", *files], cwd=golden, capture_output=True, text=True, check=True)
    (golden / MANIFEST).write_text(listed.stdout)


def test_corpus_is_unchanged() -> None:
    """Every file of this project's corpus has its listed digest, and the manifest has all of its earlier lines."""
    assert _found(GOLDEN) == []


def test_manifest_has_the_format_of_sha256sum(golden: Path) -> None:
    """sha256sum can check the manifest."""
    subprocess.run(["sha256sum", "--check", "--strict", MANIFEST], cwd=golden, check=True, capture_output=True)
    written = (golden / MANIFEST).read_text()
    _relist(golden)
    assert (golden / MANIFEST).read_text() == written


def test_unchanged_corpus_has_no_problems(golden: Path, git: Git) -> None:
    """An unchanged corpus passes with a history, and in a source archive without one."""
    assert _found(golden) == []
    shutil.rmtree(golden.parents[1] / ".git")
    assert _found(golden) == []


@pytest.mark.parametrize("archived", [False, True], ids=["in a repository", "in an archive"])
@pytest.mark.parametrize(
    ("spoil", "what"),
    [(lambda path: path.write_text("{}"), "has changed"), (lambda path: path.unlink(), "is gone")],
    ids=["changed", "removed"],
)
def test_changed_file_is_reported(
    golden: Path, git: Git, spoil: Callable[[Path], object], what: str, archived: bool
) -> None:
    """A changed file is reported with the commit that has the original, if there is one."""
    commit = git("rev-parse", "HEAD")[:12]
    if archived:
        shutil.rmtree(golden.parents[1] / ".git")
    spoil(golden / NAME)
    (problem,) = _found(golden)
    remedy = "as it was" if archived else f"as commit {commit} had it (git show {commit}:./{NAME})"
    assert problem == f"{NAME} {what}: put it back {remedy}; a shape that is new is a file of its own"


def test_unlisted_file_is_reported(golden: Path, git: Git) -> None:
    """An unlisted file is reported with the command that lists it."""
    _put(golden, "wire/v2/new.json", "{}")
    assert _found(golden) == [f"wire/v2/new.json is not listed in {MANIFEST}: `make golden` adds it"]
    before = check_golden.listed(golden)
    assert check_golden.main(["--write"], golden) == 0
    assert _found(golden) == []
    assert set(before) < set(check_golden.listed(golden))


@pytest.mark.parametrize("later", [0, 1, 2], ids=["not committed", "in the next commit", "two commits later"])
@pytest.mark.parametrize("removed", [False, True], ids=["changed", "removed"])
def test_file_changed_with_its_line_is_reported(golden: Path, git: Git, later: int, removed: bool) -> None:
    """An earlier commit's manifest shows the change, although file and line match now."""
    commit = git("rev-parse", "HEAD")[:12]
    if removed:
        (golden / NAME).unlink()
    else:
        _put(golden, NAME, "{}")
    _relist(golden)
    for number in range(later):
        _put(golden.parent, "other.txt", str(number))
        git("commit")
    (problem,) = _found(golden)
    what = "is gone" if removed else "has changed"
    assert problem.startswith(f"{NAME} {what}: put it back as commit {commit} had it (git show {commit}:./{NAME})")


def test_removed_line_is_reported(golden: Path, git: Git) -> None:
    """A removed line of an unchanged file is reported, and writing restores it."""
    lines = check_golden.listed(golden)
    (golden / MANIFEST).write_text("".join(f"{line}\n" for line in lines if NAME not in line))
    assert any(
        problem.startswith(f"{NAME} has lost its line in {MANIFEST}, which commit ") for problem in _found(golden)
    )
    assert check_golden.main(["--write"], golden) == 0
    assert check_golden.listed(golden) == lines


def test_removed_manifest_is_reported(golden: Path, git: Git) -> None:
    """A manifest that is removed in a commit of its own is reported."""
    (golden / MANIFEST).unlink()
    git("commit")
    _put(golden, NAME, "{}")
    assert check_golden.main(["--write"], golden) == 1
    assert any(problem.startswith(f"{NAME} has changed: put it back") for problem in _found(golden))


def test_merged_lines_of_a_branch_are_kept(golden: Path, git: Git) -> None:
    """After a merge, the lines of both branches must be present."""
    git("checkout", "--quiet", "-b", "other")
    _put(golden, "wire/v1/theirs.json", "{}")
    assert check_golden.main(["--write"], golden) == 0
    git("commit")
    git("checkout", "--quiet", "-")
    _put(golden, "wire/v1/ours.json", "{}")
    assert check_golden.main(["--write"], golden) == 0
    git("commit")
    git("-c", "user.name=A", "-c", "user.email=a@example.org", "merge", "--quiet", "-X", "ours", "other")
    (golden / "wire/v1/theirs.json").write_text("[]")
    _relist(golden)
    assert any(problem.startswith("wire/v1/theirs.json has changed: put it back as ") for problem in _found(golden))


@pytest.mark.parametrize("removed", [False, True], ids=["changed", "removed"])
def test_write_never_changes_or_drops_a_line(
    golden: Path, git: Git, removed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written if a line would change, and the line is named."""
    before = (golden / MANIFEST).read_text()
    _put(golden, "wire/v1/new.json", "{}")
    if removed:
        (golden / NAME).unlink()
    else:
        _put(golden, NAME, "{}")
    assert check_golden.main(["--write"], golden) == 1
    assert (golden / MANIFEST).read_text() == before
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(f"golden: {NAME} {'is gone' if removed else 'has changed'}: put it back as commit ")
    assert told[1:] == ["golden: the corpus is append-only: what was readable once is readable for ever"]


def test_uncommitted_line_can_be_removed(golden: Path, git: Git) -> None:
    """A new file can still be corrected, and the named remedy works."""
    _put(golden, "wire/v1/new.json", "{}")
    assert check_golden.main(["--write"], golden) == 0
    _put(golden, "wire/v1/new.json", "[]")
    (problem,) = _found(golden)
    assert problem == (
        "wire/v1/new.json has changed: its line was never committed; take it out of MANIFEST.sha256, "
        "and `make golden` lists what is there"
    )
    lines = [line for line in check_golden.listed(golden) if "new.json" not in line]
    (golden / MANIFEST).write_text("".join(f"{line}\n" for line in lines))
    assert check_golden.main(["--write"], golden) == 0
    assert _found(golden) == []


@pytest.mark.parametrize(
    "spoil", [lambda lines: lines[::-1], lambda lines: [*lines, lines[-1]]], ids=["order", "twice"]
)
def test_unsorted_manifest_is_reported(golden: Path, spoil: Callable[[list[str]], list[str]]) -> None:
    """A sorted manifest avoids merge conflicts; writing sorts it."""
    lines = check_golden.listed(golden)
    (golden / MANIFEST).write_text("".join(f"{line}\n" for line in spoil(lines)))
    assert _found(golden) == [f"{MANIFEST} is not sorted by name, or has a name twice: `make golden` sorts it"]
    assert check_golden.main(["--write"], golden) == 0
    assert check_golden.listed(golden) == lines


def test_invalid_line_is_reported(golden: Path) -> None:
    """A line that is not an entry, such as a conflict marker, is reported."""
    (golden / MANIFEST).write_text("<<<<<<< HEAD\n" + (golden / MANIFEST).read_text())
    assert f"{MANIFEST} has a line that is no digest and name: '<<<<<<< HEAD'; take it out" in _found(golden)


def test_missing_history_is_reported(golden: Path, git: Git, capsys: pytest.CaptureFixture[str]) -> None:
    """A shallow clone and a missing repository are reported as not checked."""
    _put(golden.parent, "other.txt", "x")
    git("commit")
    shallow = golden.parents[2] / "shallow"
    git("clone", "--quiet", "--depth", "1", golden.parents[1].as_uri(), str(shallow))
    assert check_golden.main([], shallow / "contract_tests" / "golden") == 0
    shutil.rmtree(golden.parents[1] / ".git")
    assert check_golden.main([], golden) == 0
    cut_off, missing = capsys.readouterr().out.splitlines()[-2:]
    assert cut_off == "golden: 3 files as they were; its history is cut off: this is a shallow clone"
    assert missing.startswith("golden: 3 files as they were; its history is not at hand (fatal: not a git repository")


@pytest.mark.parametrize("arguments", [[], ["--write"]])
def test_missing_corpus_is_reported(golden: Path, arguments: list[str]) -> None:
    """An empty corpus is reported and not listed, also without a history."""
    shutil.rmtree(golden)
    assert check_golden.main(arguments, golden) == 1
