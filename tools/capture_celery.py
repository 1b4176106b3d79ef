"""Capture the messages of Celery clients as golden messages: one file for each message of celery_client.py.

    python -m tools.capture_celery [--environments DIRECTORY] [VERSION ...]

Each version of Celery is installed in its own environment, and sends to its own queue on the RabbitMQ of the variable
UNSTRACT_WIRE_TEST_RABBITMQ. Random values and names of the machine are replaced in the captured messages: the sender's
origin, the address of the answer, and the moments that count from now. A file with other content is not overwritten:
the tool prints its name, and exits with status 1.
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
"""The replacement of a client's address for answers, a UUID of the same kind."""
MOMENTS = {"eta": "2020-01-02T03:04:05.678901+00:00", "expires": "2999-01-02T03:04:05.678901+00:00"}
"""The replacements of moments that count from now: one in the past, and one in the far future."""
_CLIENT = Path(__file__).with_name("celery_client.py")
_RECENT = datetime.timedelta(days=1)


@attrs.frozen
class Captured:
    """A message of a client."""

    headers: dict[str, Any]
    properties: dict[str, Any]
    body: bytes

    def scrubbed(self, queue: str) -> Captured:
        """Return the message without the parts that differ from run to run.

        Raises:
            ValueError: The message contains the name of its queue.
        """
        headers = dict(self.headers)
        if "origin" in headers:
            headers["origin"] = ORIGIN
        for name, replacement in MOMENTS.items():
            if isinstance(moment := headers.get(name), str) and _is_recent(moment):
                headers[name] = replacement
        address = self.properties.get("reply_to")
        body = self.body.replace(str(address).encode(), ADDRESS.encode()) if address else self.body
        properties = {**self.properties, "reply_to": ADDRESS} if address else self.properties
        if queue in f"{headers} {properties} {body!r}":
            raise ValueError(f"a message contains the name of its queue, which differs from run to run: {headers}")
        return Captured(headers, properties, body)


def _is_recent(moment: str) -> bool:
    return abs(datetime.datetime.fromisoformat(moment) - datetime.datetime.now(datetime.UTC)) < _RECENT


def install(version: str, directory: Path) -> Path:
    """Install a version of Celery with its serialisers; return the interpreter of the environment."""
    python = directory / f"celery-{version}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
    wanted = [f"celery=={version}", f"kombu=={KOMBU[version]}", "pyyaml"]
    subprocess.run([str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *wanted], check=True)
    return python


def capture(python: Path, url: str) -> tuple[dict[str, Any], list[Captured]]:
    """Run the client of an environment; return its report and its messages. Nothing is left on the broker."""
    queue = f"capture-{uuid.uuid4()}"
    addresses: set[str] = set()
    with kombu.Connection(url) as connection:
        channel = connection.default_channel
        channel.auto_decode = False  # bytes as they are
        kombu.Queue(queue, kombu.Exchange(queue), queue).bind(channel).declare()
        try:
            ended = subprocess.run([str(python), str(_CLIENT), url, queue], stdout=subprocess.PIPE, check=True)
            captured = []
            while (message := channel.basic_get(queue, no_ack=True)) is not None:
                properties = dict(message.properties)
                addresses.add(properties.get("reply_to", ""))
                headers = properties.pop("application_headers", None) or {}
                captured.append(Captured(headers, properties, bytes(message.body)).scrubbed(queue))
        finally:
            for name in {queue, *addresses} - {""}:
                channel.queue_delete(name)
            channel.exchange_delete(queue)
    return json.loads(ended.stdout), captured


def write(report: dict[str, Any], captured: list[Captured]) -> list[str]:
    """Add a version's messages to the corpus; return the problems."""
    if len(captured) != len(report["sent"]):
        return [f"Celery {report['celery']}: {len(report['sent'])} messages were sent, and {len(captured)} arrived"]
    problems = []
    for (name, about), message in zip(report["sent"], captured, strict=True):
        path = CORPUS / report["celery"] / f"{name}.json"
        golden = Golden(about, report["celery"], report["kombu"], message.headers, message.properties, message.body)
        if not add(path, golden):
            problems.append(f"{path.relative_to(CORPUS)} exists with other content, and was not overwritten")
    return problems


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Capture the messages of Celery clients as golden messages.")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"all by default: {', '.join(KOMBU)}")
    parser.add_argument(
        "--environments", type=Path, metavar="DIRECTORY", help="keep the environments in this directory"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.versions) - KOMBU.keys():
        parser.error(f"unknown versions: {', '.join(sorted(unknown))}")
    problems = []
    with tempfile.TemporaryDirectory() as temporary:
        for version in options.versions or KOMBU:
            report, captured = capture(install(version, options.environments or Path(temporary)), BROKER_URL)
            problems += write(report, captured)
            print(f"Celery {report['celery']}, kombu {report['kombu']}: {len(captured)} messages")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
