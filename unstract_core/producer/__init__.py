"""The producer's side: dispatch a task, over one transport or, behind a gate, over a choice of two."""
