"""The conformance kit: it tests every promise of the transport protocol, over any transport that has a Harness.

Run it from the command line:

    python -m contract_tests --transport mypkg.harness:harness
    pytest -p contract_tests.plugin --pyargs contract_tests --transport sqlite:///tasks.db

Or add it to your own test suite with one import and one fixture:

    from contract_tests.suite import *

    @pytest.fixture(scope="session")
    def harness():
        with MyHarness() as harness:
            yield harness

Each file covers one concern. The docstring of each test states the guarantee. The kit names no transport: it tests
the claimed Capabilities, and checks that a transport refuses the others. The kit needs the extra [testing];
`contract_tests.harness`, which a harness imports, does not. See docs/writing-a-transport.md.
"""

from contract_tests.harness import Harness, load_harness

KIT_VERSION = "1.0"
WIRE_VERSION = "1"

__all__ = ["KIT_VERSION", "WIRE_VERSION", "Harness", "load_harness"]
