"""The supervisor of a worker: it starts, monitors and replaces child processes, and serves health and metrics."""
