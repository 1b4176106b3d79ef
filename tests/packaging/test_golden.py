"""The golden corpus is append-only: whatever is done to it but adding a file is found, with its name and the remedy."""

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
    """A small corpus, listed, in no repository."""
    golden = tmp_path / "checkout" / "contract_tests" / "golden"
    for name in ("rows/a.json", "wire/v1/plain.json", "wire/v1/reply.json"):
        _put(golden, name, f'{{"about": "{name}"}}\n')
    assert check_golden.main(["--write"], golden) == 0
    return golden


@pytest.fixture
def git(golden: Path, monkeypatch: pytest.MonkeyPatch) -> Git:
    """Git in that checkout, with the corpus committed once; `git("commit")` commits everything."""
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
    """Write the manifest anew, as somebody would who does not know of the check."""
    files = sorted(path.relative_to(golden).as_posix() for path in golden.rglob("*.json"))
    listed = subprocess.run(["sha256sum", *files], cwd=golden, capture_output=True, text=True, check=True)
    (golden / MANIFEST).write_text(listed.stdout)


def test_the_corpus_is_as_it_was() -> None:
    """The one of this project: every file listed with its digest, and every line that the manifest has ever had."""
    assert _found(GOLDEN) == []


def test_the_manifest_is_what_sha256sum_reads_and_writes(golden: Path) -> None:
    """Nobody needs this tool to look."""
    subprocess.run(["sha256sum", "--check", "--strict", MANIFEST], cwd=golden, check=True, capture_output=True)
    written = (golden / MANIFEST).read_text()
    _relist(golden)
    assert (golden / MANIFEST).read_text() == written


def test_a_corpus_as_it_was_has_no_problems(golden: Path, git: Git) -> None:
    """Neither with a history nor, as in an archive of the sources, without one."""
    assert _found(golden) == []
    shutil.rmtree(golden.parents[1] / ".git")
    assert _found(golden) == []


@pytest.mark.parametrize("archived", [False, True], ids=["in a repository", "in an archive"])
@pytest.mark.parametrize(
    ("spoil", "what"),
    [(lambda path: path.write_text("{}"), "has changed"), (lambda path: path.unlink(), "is gone")],
    ids=["changed", "removed"],
)
def test_a_file_that_is_not_as_it_was_is_found(
    golden: Path, git: Git, spoil: Callable[[Path], object], what: str, archived: bool
) -> None:
    """By its name, with the commit from which it can be had back, where there is one."""
    commit = git("rev-parse", "HEAD")[:12]
    if archived:
        shutil.rmtree(golden.parents[1] / ".git")
    spoil(golden / NAME)
    (problem,) = _found(golden)
    remedy = "as it was" if archived else f"as commit {commit} had it (git show {commit}:./{NAME})"
    assert problem == f"{NAME} {what}: put it back {remedy}; a shape that is new is a file of its own"


def test_a_file_that_is_not_listed_is_found(golden: Path, git: Git) -> None:
    """And what lists it: after that it is part of the corpus."""
    _put(golden, "wire/v2/new.json", "{}")
    assert _found(golden) == [f"wire/v2/new.json is not listed in {MANIFEST}: `make golden` adds it"]
    before = check_golden.listed(golden)
    assert check_golden.main(["--write"], golden) == 0
    assert _found(golden) == []
    assert set(before) < set(check_golden.listed(golden))


@pytest.mark.parametrize("later", [0, 1, 2], ids=["not committed", "in the next commit", "two commits later"])
@pytest.mark.parametrize("removed", [False, True], ids=["changed", "removed"])
def test_a_file_whose_line_was_changed_with_it_is_found(golden: Path, git: Git, later: int, removed: bool) -> None:
    """The manifest of any earlier commit tells, however well file and line agree now."""
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


def test_a_line_that_was_lost_is_found(golden: Path, git: Git) -> None:
    """Though its file is as it was: a later change of that file would go unnoticed. Writing puts it back."""
    lines = check_golden.listed(golden)
    (golden / MANIFEST).write_text("".join(f"{line}\n" for line in lines if NAME not in line))
    assert any(
        problem.startswith(f"{NAME} has lost its line in {MANIFEST}, which commit ") for problem in _found(golden)
    )
    assert check_golden.main(["--write"], golden) == 0
    assert check_golden.listed(golden) == lines


def test_the_manifest_removed_as_a_whole_is_found(golden: Path, git: Git) -> None:
    """Starting over in a commit of its own does not help either."""
    (golden / MANIFEST).unlink()
    git("commit")
    _put(golden, NAME, "{}")
    assert check_golden.main(["--write"], golden) == 1
    assert any(problem.startswith(f"{NAME} has changed: put it back") for problem in _found(golden))


def test_a_line_on_another_branch_counts_once_it_is_merged(golden: Path, git: Git) -> None:
    """Two branches each add a file; of neither may be lost what it added."""
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
def test_writing_refuses_to_change_or_drop_a_line(
    golden: Path, git: Git, removed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written, not even for the files that are new; what stands in the way is named."""
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


def test_a_line_that_was_never_committed_may_be_taken_back(golden: Path, git: Git) -> None:
    """A new file can still be mended; what is to be done is said, and works."""
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
def test_a_manifest_that_is_not_sorted_is_found(golden: Path, spoil: Callable[[list[str]], list[str]]) -> None:
    """So that two branches that add files seldom touch the same lines; writing sorts it."""
    lines = check_golden.listed(golden)
    (golden / MANIFEST).write_text("".join(f"{line}\n" for line in spoil(lines)))
    assert _found(golden) == [f"{MANIFEST} is not sorted by name, or has a name twice: `make golden` sorts it"]
    assert check_golden.main(["--write"], golden) == 0
    assert check_golden.listed(golden) == lines


def test_a_line_that_says_nothing_is_found(golden: Path) -> None:
    """What a merge leaves behind, for instance."""
    (golden / MANIFEST).write_text("<<<<<<< HEAD\n" + (golden / MANIFEST).read_text())
    assert f"{MANIFEST} has a line that is no digest and name: '<<<<<<< HEAD'; take it out" in _found(golden)


def test_where_the_history_is_missing_it_is_said(golden: Path, git: Git, capsys: pytest.CaptureFixture[str]) -> None:
    """A clone that is cut off, and no repository at all: what could not be checked is not passed over in silence."""
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
def test_a_corpus_that_is_gone_is_found(golden: Path, arguments: list[str]) -> None:
    """Also without a history that would name its files: nothing is no corpus, and is not listed as one."""
    shutil.rmtree(golden)
    assert check_golden.main(arguments, golden) == 1
