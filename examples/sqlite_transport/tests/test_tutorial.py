"""The tutorial, docs/writing-a-transport.md, shows the code of this example."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT.parents[1] / "docs" / "writing-a-transport.md"
BLOCKS = re.findall(r"```(?:python|sql|toml)\n(.*?)```", TUTORIAL.read_text("utf-8"), re.DOTALL)
SOURCES = [path for path in ROOT.rglob("*") if path.suffix in {".py", ".sql", ".toml"}]
TEXTS = [[line.strip() for line in path.read_text("utf-8").splitlines()] for path in SOURCES]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_tutorial_blocks_are_code_of_the_example(block: str) -> None:
    """Each line is equal except for its indentation; `...` replaces omitted lines."""
    for part in re.split(r"^ *\.\.\.\n", block, flags=re.MULTILINE):
        lines = [line.strip() for line in part.strip().splitlines()]
        assert any(lines == text[n : n + len(lines)] for text in TEXTS for n in range(len(text))), part
