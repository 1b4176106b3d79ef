"""`python -m examples` runs the demo; Ctrl-C ends it without a traceback at any moment.

During the imports there is nothing to clean up, so SIGINT ends the process at once; later `main` handles the signals.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from examples.demo import main

    sys.exit(main())
