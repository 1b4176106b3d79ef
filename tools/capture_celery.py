"""Capture what real Celery clients send, as golden messages: one file for each message of celery_client.py.

    python -m tools.capture_celery [--environments DIRECTORY] [VERSION ...]

Each version of Celery is installed in an environment of its own, and sends to a queue of its own on the RabbitMQ that
UNSTRACT_WIRE_TEST_RABBITMQ names. What is random, or names a machine, is replaced after it was taken out: the sender's
origin, the address of the answer wherever it stands, and the two moments that count from now. A file that is there with
other content is not overwritten: that is said, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import attrs
import kombu

from tools.golden import CORPUS, Golden, add

KOMBU = {"5.3.6": "5.7.0", "5.4.0": "5.7.0", "5.5.3": "5.5.4", "5.6.3": "5.7.0", "5.7.0": "5.7.0"}
"""The last release of each version of Celery, with the kombu that pip installs beside it."""

BROKER_URL = os.environ.get("UNSTRACT_WIRE_TEST_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672//")
ORIGIN = "gen1@client"
ADDRESS = "0f5a3b9e-3f0e-3d52-9c1d-7a1d6a1f2b3c"
"""Instead of a client's address for answers, which is a UUID of the same kind."""
MOMENTS = {"eta": "2020-01-02T03:04:05.678901+00:00", "expires": "2999-01-02T03:04:05.678901+00:00"}
"""Instead of moments that count from now: one that has passed, and one that will not for long."""
_CLIENT = Path(__file__).with_name("celery_client.py")
_RECENT = datetime.timedelta(days=1)


@attrs.frozen
class Captured:
    """A message as it was taken out of the queue."""

    headers: dict[str, Any]
    properties: dict[str, Any]
    body: bytes

    def scrubbed(self, queue: str) -> Captured:
        """Return it without what differs from run to run. Raises ValueError for a queue's name that would stay."""
        headers = dict(self.headers)
        if "origin" in headers:
            headers["origin"] = ORIGIN
        for name, instead in MOMENTS.items():
            if isinstance(found := headers.get(name), str) and _is_recent(found):
                headers[name] = instead
        address = self.properties.get("reply_to")
        body = self.body.replace(str(address).encode(), ADDRESS.encode()) if address else self.body
        properties = {**self.properties, "reply_to": ADDRESS} if address else self.properties
        if queue in f"{headers} {properties} {body!r}":
            raise ValueError(f"a message names its queue, which is another one in every run: {headers}")
        return Captured(headers, properties, body)


def _is_recent(moment: str) -> bool:
    return abs(datetime.datetime.fromisoformat(moment) - datetime.datetime.now(datetime.UTC)) < _RECENT


def install(version: str, directory: Path) -> Path:
    """Install a version of Celery, with what its other serialisers need; returns the environment's interpreter."""
    python = directory / f"celery-{version}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
    wanted = [f"celery=={version}", f"kombu=={KOMBU[version]}", "pyyaml"]
    subprocess.run([str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *wanted], check=True)
    return python


def capture(python: Path, url: str) -> tuple[dict[str, Any], list[Captured]]:
    """Let the client of an environment send, and take out what it has sent; nothing is left on the broker."""
    queue = f"capture-{uuid.uuid4()}"
    addresses: set[str] = set()
    with kombu.Connection(url) as connection:
        channel = connection.default_channel
        channel.auto_decode = False  # bytes as they are
        kombu.Queue(queue, kombu.Exchange(queue), queue).bind(channel).declare()
        try:
            ended = subprocess.run([str(python), str(_CLIENT), url, queue], stdout=subprocess.PIPE, check=True)
            found = []
            while (message := channel.basic_get(queue, no_ack=True)) is not None:
                properties = dict(message.properties)
                addresses.add(properties.get("reply_to", ""))
                headers = properties.pop("application_headers", None) or {}
                found.append(Captured(headers, properties, bytes(message.body)).scrubbed(queue))
        finally:
            for name in {queue, *addresses} - {""}:
                channel.queue_delete(name)
            channel.exchange_delete(queue)
    return json.loads(ended.stdout), found


def write(told: dict[str, Any], found: list[Captured]) -> list[str]:
    """Add a version's messages to the corpus; returns what is wrong."""
    if len(found) != len(told["sent"]):
        return [f"Celery {told['celery']}: {len(told['sent'])} messages were sent, and {len(found)} came"]
    wrong = []
    for (name, about), one in zip(told["sent"], found, strict=True):
        path = CORPUS / told["celery"] / f"{name}.json"
        golden = Golden(about, told["celery"], told["kombu"], one.headers, one.properties, one.body)
        if not add(path, golden):
            wrong.append(f"{path.relative_to(CORPUS)} is there with other content, and stays as it is")
    return wrong


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Capture what real Celery clients send, as golden messages.")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"all unless named: {', '.join(KOMBU)}")
    parser.add_argument("--environments", type=Path, metavar="DIRECTORY", help="where they are made, and kept")
    options = parser.parse_args(arguments)
    if unknown := set(options.versions) - KOMBU.keys():
        parser.error(f"unknown versions: {', '.join(sorted(unknown))}")
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        for version in options.versions or KOMBU:
            told, found = capture(install(version, options.environments or Path(temporary)), BROKER_URL)
            wrong += write(told, found)
            print(f"Celery {told['celery']}, kombu {told['kombu']}: {len(found)} messages")
    for one in wrong:
        print(one, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
