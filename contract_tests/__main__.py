"""`python -m contract_tests --transport module:factory`: the whole kit; further arguments are pytest's.

Runs outside any project: no conftest, no ini file and no cache of the directory that it is started in.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from pathlib import Path


def main() -> int:
    for needed in ("pytest", "hypothesis"):
        if importlib.util.find_spec(needed) is None:
            sys.stderr.write(f"contract_tests needs {needed}: pip install 'unstract-wire[testing]'\n")
            return 2
    pytest = importlib.import_module("pytest")
    kit = Path(__file__).parent
    own = [
        "-c",
        str(kit / "pytest.ini"),
        "--rootdir",
        str(kit),
        "-p",
        "no:cacheprovider",
        "-p",
        "contract_tests.plugin",
    ]
    code = int(pytest.main([*own, str(kit), *sys.argv[1:]]))
    if left := [thread.name for thread in threading.enumerate()[1:] if not thread.daemon]:
        sys.stderr.write(f"threads that were left behind still run, so the process is ended: {', '.join(left)}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
