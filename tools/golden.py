"""Golden messages: what stood on a broker, byte for byte, and what our decoder has promised to read in it.

One JSON file for each message, under contract_tests/golden/celery: captured from real clients by capture_celery.py, or
found by a fuzzer (directory `found`). `headers`, `properties` and `body` are the message's own; `payload` (as it stands
on our wire) or `problem`, and `delivery`, are what was read when the file was written. Files are only ever added: one
that is there is never written again.
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
"""From which a golden message is read, where nobody says otherwise."""
_EXPECTED = ("payload", "problem", "delivery")


@attrs.frozen
class Golden:
    """One message, and what is `expected` to be read in it; without that it was not read yet."""

    about: str
    celery: str
    kombu: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    body: bytes
    expected: dict[str, Any] = attrs.field(factory=dict)

    def message(self) -> Message:
        """Return it as kombu hands it over that has received it over AMQP."""
        return received(self.headers, self.properties, self.body)

    def text(self) -> str:
        """Return the file that holds it."""
        try:
            body = {"body": self.body.decode()}
        except UnicodeDecodeError:
            body = {"body_base64": base64.b64encode(self.body).decode()}
        known = {"about": self.about, "celery": self.celery, "kombu": self.kombu}
        content = {**known, "headers": self.headers, "properties": self.properties, **body, **self.expected}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"


def received(headers: dict[str, Any], properties: dict[str, Any], body: bytes) -> Message:
    """Return a message as kombu makes it of what py-amqp has received, which decodes the body where it can."""
    content: bytes | str = body
    with contextlib.suppress(LookupError, ValueError, KeyError, TypeError):
        content = body.decode(properties["content_encoding"])
    arrived = amqp.Message(content, application_headers=headers, **properties)
    arrived.delivery_info = {"delivery_tag": 1}
    return Message(arrived)


def read(path: Path) -> Golden:
    """Read a file. Raises KeyError where it lacks something."""
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
    """Return what our decoder reads in it now, in the form of what is expected."""
    envelope = read_message(golden.message(), QUEUE, default_queue="celery")
    if envelope.payload is not None:
        return {"payload": to_wire(envelope.payload), "delivery": _delivery(envelope)}
    return {"problem": envelope.problem, "delivery": _delivery(envelope)}


def corpus() -> list[Path]:
    """Return every file there is, in order."""
    return sorted(CORPUS.glob("*/*.json"))


def add(path: Path, golden: Golden) -> bool:
    """Write a new file, with what is read in the message now; False where a file with other content is there."""
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
