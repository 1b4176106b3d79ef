"""`python -m examples` plays the demo, and Ctrl-C ends it without a traceback from the first moment on.

While the libraries are imported there is nothing to clear away, so SIGINT may simply end the process; `main` takes
the signals over before there is.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from examples.demo import main

    sys.exit(main())
