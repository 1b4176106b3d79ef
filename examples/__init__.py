"""Runnable examples: `python -m examples` sends documents through a queue."""
