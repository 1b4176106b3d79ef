"""The messages for a worker that is killed, and the two valid states of their settlement: complete or not begun."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence

import attrs
from pg_tables import Tables
from postgres.crashing import BACKOFF, LEASE, MAX_ATTEMPTS

from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from unstract_core import Consumer, Message


@attrs.frozen
class Seen:
    """Everything that the database has of one message. `message` is its state and number of deliveries."""

    message: tuple[str, int] | None
    follow_ups: tuple[str, ...] = ()
    answer: str | None = None
    dead: int = 0


@attrs.frozen
class Shape:
    """A kind of message, with its rows after the committed settlement and at the very end."""

    task: str
    settled: Seen
    ended: Seen
    on_success: bool = False
    on_error: bool = False
    reply: bool = False
    attempts: int = 0

    @property
    def held(self) -> Seen:
        return Seen(("held", self.attempts + 1))

    def message(self, queue: str, label: str) -> Message:
        options = {
            "on_success": then("done", queue + "-cb", of=label) if self.on_success else None,
            "on_error": then("failed", queue + "-cb", of=label) if self.on_error else None,
            "reply_key" if self.reply else "task_id": label,
        }
        return message(self.task, queue, label, **options)


def _always(task: str, seen: Seen, **options: bool) -> Shape:
    return Shape(task, seen, seen, **options)


SHAPES = {
    "on_success": _always("returns", Seen(None, ("done",), "completed"), on_success=True, on_error=True),
    "on_error": _always("raises", Seen(None, ("failed",), "failed"), on_success=True, on_error=True),
    "reply": _always("returns", Seen(None, (), "completed"), reply=True),
    "retry": Shape("raises once", Seen(("waits", 1)), Seen(None)),
    "burial": Shape("raises", Seen(None, (), "failed", 1), Seen(None, (), "failed", 1), attempts=MAX_ATTEMPTS - 1),
}


class Ledger:
    """Sends the messages of a trial, each with its own label, and reads their rows."""

    def __init__(self, transport: PostgresTransport, tables: Tables, queue: str) -> None:
        self._transport = transport
        self._tables = tables
        self._queue = queue
        self.sent: dict[str, tuple[int, Shape]] = {}

    def label(self, trial: int, name: str) -> str:
        """Return the label of a message, which is its argument, its id, and an argument of its callback."""
        return f"{self._queue}/{trial:05}/{name}"

    def send(self, trial: int, names: Sequence[str]) -> list[str]:
        """Send one message of each shape, and return their labels."""
        shapes = {self.label(trial, name): SHAPES[name] for name in names}
        self._transport.send([shape.message(self._queue, label) for label, shape in shapes.items()])
        for label, shape in shapes.items():
            self.sent[label] = trial, shape
            if shape.attempts:
                self._tables.execute(
                    "UPDATE {messages} SET read_ct = %s WHERE message -> 'args' = %s::jsonb",
                    shape.attempts,
                    json.dumps([label]),
                )
        return list(shapes)

    def look(self) -> dict[str, Seen]:
        """Return the rows of each message."""
        messages = {
            label: (state if state == "ready" else "waits" if seconds > LEASE else "held", attempts)
            for label, state, seconds, attempts in self._tables.rows(
                """SELECT message -> 'args' ->> 0, state, extract(epoch FROM vt - now())::float8, read_ct
                   FROM {messages} WHERE queue_name = %s""",
                self._queue,
            )
        }
        follow_ups = self._tables.rows(
            """SELECT message -> 'kwargs' ->> 'of', message ->> 'task_name' FROM {messages}
               WHERE queue_name = %s ORDER BY msg_id""",
            self._queue + "-cb",
        )
        answers = dict(self._tables.rows("SELECT task_id, status FROM {results}"))
        dead = Counter(row[0] for row in self._tables.rows("SELECT message -> 'args' ->> 0 FROM {dead}"))
        return {
            label: Seen(
                messages.get(label),
                tuple(name for of, name in follow_ups if of == label),
                answers.get(label),
                dead[label],
            )
            for label in self.sent
        }

    def verdicts(self) -> dict[int, bool]:
        """Return for each trial whether its settlement took effect. Fail if one took effect in part."""
        verdicts: dict[int, bool] = {}
        for label, seen in self.look().items():
            trial, shape = self.sent[label]
            assert seen in (shape.held, shape.settled), f"{label} is neither held nor settled: {seen}"
            assert verdicts.setdefault(trial, seen == shape.settled) == (seen == shape.settled), (
                f"{label}: a part of its batch was settled"
            )
        return verdicts

    def finish(self) -> None:
        """End every lease and delay, let a healthy worker finish, and check that each message was handled once."""
        self._tables.execute("UPDATE {messages} SET vt = now() WHERE queue_name = %s", self._queue)
        called: list[tuple[str, str]] = []

        def raises(label: str) -> None:
            raise ValueError(label)

        tasks: dict[str, Callable[..., object]] = {
            "returns": lambda label: {"of": label},
            "raises": raises,
            "raises once": lambda label: None,
            "done": lambda result, of: called.append(("done", of)) if result == {"of": of} else None,
            "failed": lambda dispatch_id, of: called.append(("failed", of)) if dispatch_id == of else None,
        }
        Consumer(
            self._transport, tasks, [self._queue, self._queue + "-cb"], max_attempts=MAX_ATTEMPTS, backoff=BACKOFF
        ).drain(timeout=120)
        expected = [(name, label) for label, (_, shape) in self.sent.items() for name in shape.ended.follow_ups]
        assert sorted(called) == sorted(expected)
        ended = {label: attrs.evolve(shape.ended, follow_ups=()) for label, (_, shape) in self.sent.items()}
        assert self.look() == ended
