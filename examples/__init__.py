"""Runnable examples: `python -m examples.demo` is the whole way of a document through PostgreSQL."""
