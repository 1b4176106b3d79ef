"""Log events, observers, metrics, traces and diagnostics. They never change how a message is processed."""
