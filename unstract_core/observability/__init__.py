"""Log events, observers, metrics, traces and diagnostics: they report what happens and decide nothing."""
