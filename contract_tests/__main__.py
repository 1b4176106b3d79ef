"""`python -m contract_tests --transport module:factory` runs the whole kit; other arguments go to pytest.

The run is independent of the current directory: it reads no conftest or ini file there and writes no cache.
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
            sys.stderr.write(f"contract_tests needs {needed}. Install it with: pip install 'unstract-wire[testing]'\n")
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
        sys.stderr.write(f"these threads still run after the last test, so the process exits now: {', '.join(left)}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
