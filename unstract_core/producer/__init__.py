"""The producer: dispatch a task over one transport, or over one of two transports that a gate chooses."""
