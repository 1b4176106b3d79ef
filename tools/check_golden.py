"""Check that the golden corpus is append-only: no file is changed, removed or unlisted; `--write` lists new files.

MANIFEST.sha256 has a line for every file under contract_tests/golden, in the format of `sha256sum -c`. A file that is
changed together with its line would pass that check. So every line of the manifest in any earlier commit must still be
present. Without git or its history this is reported as not checked. `--write` only adds lines.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

GOLDEN = Path(__file__).resolve().parent.parent / "contract_tests" / "golden"
MANIFEST = "MANIFEST.sha256"

_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


class History(NamedTuple):
    """Each line of the manifest in any commit, with the latest of those commits; `gap` names the missing history."""

    lines: Mapping[str, str]
    gap: str = ""


def digests(golden: Path) -> dict[str, str]:
    """Return the digest of every file of the corpus by name."""
    files = sorted(path for path in golden.rglob("*") if path.is_file() and path != golden / MANIFEST)
    return {path.relative_to(golden).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def listed(golden: Path) -> list[str]:
    """Return the lines of the manifest; empty if there is no manifest."""
    manifest = golden / MANIFEST
    return manifest.read_text(encoding="utf-8").splitlines() if manifest.exists() else []


def history(golden: Path) -> History:
    """Read the manifest of every ancestor commit from git."""
    try:
        commits = _git(golden, "rev-list", "--full-history", "HEAD", "--", MANIFEST).split()
        shallow = _git(golden, "rev-parse", "--is-shallow-repository").strip() == "true"
    except (OSError, subprocess.CalledProcessError) as exc:
        reason = (getattr(exc, "stderr", None) or str(exc)).strip().partition("\n")[0]
        return History({}, f"its history is not at hand ({reason})")
    lines: dict[str, str] = {}
    for commit in commits:
        try:
            text = _git(golden, "show", f"{commit}:./{MANIFEST}")
        except subprocess.CalledProcessError:  # the commit that removed the manifest
            continue
        for line in text.splitlines():
            lines.setdefault(line, commit[:12])
    return History(lines, "its history is cut off: this is a shallow clone" if shallow else "")


def breaches(golden: Path, past: History) -> Iterator[str]:
    """Return each changed or removed entry of the manifest or its history, with the remedy."""
    lines, found = listed(golden), digests(golden)
    if not found:
        yield f"no file is there, and none is listed in {MANIFEST}: the corpus is gone"
    for line in dict.fromkeys([*lines, *past.lines]):
        commit = past.lines.get(line, "")
        if (match := _LINE.fullmatch(line)) is None:
            if line in lines:
                yield f"{MANIFEST} has a line that is no digest and name: {line!r}; take it out"
            continue
        digest, name = match.groups()
        what = "" if found.get(name) == digest else "has changed" if name in found else "is gone"
        if what:
            yield f"{name} {what}: {_remedy(name, commit, past)}"
        elif line not in lines:
            yield f"{name} has lost its line in {MANIFEST}, which commit {commit} had: put it back, `make golden` does"


def problems(golden: Path, past: History) -> list[str]:
    """Return every problem of the corpus and its manifest."""
    lines = listed(golden)
    names = [line.partition("  ")[2] for line in lines]
    wrong = list(breaches(golden, past))
    wrong += [
        f"{name} is not listed in {MANIFEST}: `make golden` adds it" for name in digests(golden).keys() - {*names}
    ]
    if names != sorted(set(names)):
        wrong.append(f"{MANIFEST} is not sorted by name, or has a name twice: `make golden` sorts it")
    return sorted(wrong)


def write(golden: Path, past: History) -> list[str]:
    """Add a line for each unlisted file, unless a listed file has changed; return the new lines."""
    if refused := sorted(one for one in breaches(golden, past) if "has lost its line" not in one):
        return refused
    lines = sorted((name, digest) for name, digest in digests(golden).items())
    (golden / MANIFEST).write_text("".join(f"{digest}  {name}\n" for name, digest in lines), encoding="utf-8")
    return []


def main(arguments: Sequence[str], golden: Path = GOLDEN) -> int:
    if list(arguments) not in ([], ["--write"]):
        print("usage: check_golden.py [--write]", file=sys.stderr)
        return 2
    past = history(golden)
    wrong = write(golden, past) if arguments else problems(golden, past)
    for one in wrong:
        print(f"golden: {one}", file=sys.stderr)
    if wrong:
        print("golden: the corpus is append-only: what was readable once is readable for ever", file=sys.stderr)
        return 1
    print(f"golden: {len(listed(golden))} files as they were{'; ' + past.gap if past.gap else ''}")
    return 0


def _remedy(name: str, commit: str, past: History) -> str:
    again = "a shape that is new is a file of its own"
    if commit:
        return f"put it back as commit {commit} had it (git show {commit}:./{name}); {again}"
    if past.gap:
        return f"put it back as it was; {again}"
    return f"its line was never committed; take it out of {MANIFEST}, and `make golden` lists what is there"


def _git(golden: Path, *arguments: str) -> str:
    command = ["git", "-C", str(golden), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
