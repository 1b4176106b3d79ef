"""The parent process of a worker: it starts, watches and replaces child processes, and serves health and metrics."""
