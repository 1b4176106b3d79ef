"""Golden messages: the bytes of a message on a broker, and its expected decoding.

Each message is one JSON file under contract_tests/golden/celery: captured from real clients by capture_celery.py, or
found by a fuzzer (directory `found`). `headers`, `properties` and `body` are the message's. `payload` or `problem`, and
`delivery`, are its decoding when the file was written. Files are only added, and an existing file is never rewritten.
"""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import Any

import amqp
import attrs
from kombu.transport.pyamqp import Message

from transports.celery.decode import Envelope, read_message
from unstract_core import to_wire

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "contract_tests" / "golden" / "celery"
QUEUE = "executor"
"""The queue of a golden message that names none."""
_EXPECTED = ("payload", "problem", "delivery")


@attrs.frozen
class Golden:
    """One message and its `expected` decoding; None if it is not decoded yet."""

    about: str
    celery: str
    kombu: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    body: bytes
    expected: dict[str, Any] = attrs.field(factory=dict)

    def message(self) -> Message:
        """Return the message as kombu receives it over AMQP."""
        return received(self.headers, self.properties, self.body)

    def text(self) -> str:
        """Return the content of its file."""
        try:
            body = {"body": self.body.decode()}
        except UnicodeDecodeError:
            body = {"body_base64": base64.b64encode(self.body).decode()}
        known = {"about": self.about, "celery": self.celery, "kombu": self.kombu}
        content = {**known, "headers": self.headers, "properties": self.properties, **body, **self.expected}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"


def received(headers: dict[str, Any], properties: dict[str, Any], body: bytes) -> Message:
    """Return a message as kombu creates it from py-amqp's, with a decoded body if possible."""
    content: bytes | str = body
    with contextlib.suppress(LookupError, ValueError, KeyError, TypeError):
        content = body.decode(properties["content_encoding"])
    arrived = amqp.Message(content, application_headers=headers, **properties)
    arrived.delivery_info = {"delivery_tag": 1}
    return Message(arrived)


def read(path: Path) -> Golden:
    """Read a file; raises KeyError for a missing key."""
    content = json.loads(path.read_text(encoding="utf-8"))
    encoded = content.get("body_base64")
    return Golden(
        about=content["about"],
        celery=content["celery"],
        kombu=content["kombu"],
        headers=content["headers"],
        properties=content["properties"],
        body=content["body"].encode() if encoded is None else base64.b64decode(encoded),
        expected={name: content[name] for name in _EXPECTED if name in content},
    )


def reading(golden: Golden) -> dict[str, Any]:
    """Return the current decoding, in the form of `expected`."""
    envelope = read_message(golden.message(), QUEUE, default_queue="celery")
    if envelope.payload is not None:
        return {"payload": to_wire(envelope.payload), "delivery": _delivery(envelope)}
    return {"problem": envelope.problem, "delivery": _delivery(envelope)}


def corpus() -> list[Path]:
    """Return every file in order."""
    return sorted(CORPUS.glob("*/*.json"))


def add(path: Path, golden: Golden) -> bool:
    """Write a new file with the current decoding; return False if a file with other content exists."""
    text = attrs.evolve(golden, expected=reading(golden)).text()
    if path.exists():
        return path.read_text(encoding="utf-8") == text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True


def _delivery(envelope: Envelope) -> dict[str, Any]:
    return {
        "id": envelope.id,
        "attempt": envelope.attempt,
        "org_id": envelope.org_id,
        "priority": envelope.priority,
        "eta": envelope.eta and envelope.eta.isoformat(),
        "expires": envelope.expires and envelope.expires.isoformat(),
    }
