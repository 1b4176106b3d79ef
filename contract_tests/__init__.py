"""The conformance kit: every promise of a transport as a test, run against whatever brings a Harness.

    python -m contract_tests --transport mypkg.harness:harness
    pytest -p contract_tests.plugin --pyargs contract_tests --transport sqlite:///tasks.db

or, in a test suite of one's own, one import and one fixture:

    from contract_tests.suite import *

    @pytest.fixture(scope="session")
    def harness():
        with MyHarness() as harness:
            yield harness

Each file is one concern, each test a proposition whose docstring is the promise. Nothing here knows a transport by
name; what one claims in its Capabilities is tested, and what it does not claim it has to refuse. The kit needs the
extra [testing]; `contract_tests.harness`, which a harness imports, does not. docs/writing-a-transport.md shows the way.
"""

from contract_tests.harness import Harness, load_harness

KIT_VERSION = "1.0"
WIRE_VERSION = "1"

__all__ = ["KIT_VERSION", "WIRE_VERSION", "Harness", "load_harness"]
