"""Runnable examples: `python -m examples` is the whole way of a document through a queue."""
