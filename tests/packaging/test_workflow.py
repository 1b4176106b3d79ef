"""The workflow of .github calls what .ci/run calls, and the documents name targets of make that there are."""

from __future__ import annotations

import re

import pytest

from tools.check_lock import ROOT, SUPPORTED

WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
CI_RUN = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def _called(text: str) -> set[str]:
    """Return the targets that a script calls; a comment calls none."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return set(re.findall(r"\bmake ([a-z][\w-]*)", "\n".join(lines)))


def test_workflow_calls_every_target_of_ci_run() -> None:
    """A check that runs locally runs for a pull request as well."""
    assert _called(CI_RUN) - _called(WORKFLOW) == set()


def test_workflow_runs_on_every_supported_python() -> None:
    """The matrix has the versions that the lock is for."""
    assert re.search(r"python: \[(.*)\]", WORKFLOW)[1] == ", ".join(f'"{version}"' for version in SUPPORTED)  # type: ignore[index]


@pytest.mark.parametrize(
    "document", ["CONTRIBUTING.md", "docs/releasing.md", ".github/PULL_REQUEST_TEMPLATE.md", ".github/workflows/ci.yml"]
)
def test_document_names_existing_make_targets(document: str) -> None:
    """Each `make target` can be called."""
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^ {4}|run: )make ([a-z][\w-]*)", text, re.MULTILINE))
    assert named
    assert named - TARGETS == set()
