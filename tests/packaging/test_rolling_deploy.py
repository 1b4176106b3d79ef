"""A rolling deploy: the last release and this one send and run each other's messages on the same tables.

The old side is the newest wheel in tests/releases; without one, it is the current wheel on the tables of the last
release. Each side has its own environment and its own processes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import servers
import wheels
from packaging.utils import parse_wheel_filename
from pg_tables import Tables
from wheels import Environment, Wheel

from contract_tests.kit import wait_until
from tools.check_lock import ROOT
from unstract_core.continuation import CONTINUATION_IDS

RELEASES = ROOT / "tests" / "releases"
RELEASED = sorted(RELEASES.glob("*.whl"), key=lambda path: parse_wheel_filename(path.name)[1])
SIDES = ("old", "new")
PAIRS = list(itertools.product(SIDES, SIDES))
PATIENCE = 60.0
SCRIPT = Path(__file__).with_name("rolling.py")


@attrs.frozen
class Process:
    """A process of one side, whose output goes to a file."""

    popen: subprocess.Popen[bytes]
    output: Path
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text(encoding="utf-8").splitlines()]

    def ended(self) -> list[dict[str, Any]]:
        """Wait for the end, and return the output."""
        assert self.popen.wait(PATIENCE) == 0, self.log.read_text()
        return self.lines()

    def stopped(self) -> list[dict[str, Any]]:
        """Send SIGTERM, as an orchestrator does."""
        self.popen.send_signal(signal.SIGTERM)
        return self.ended()


@attrs.frozen
class Deploy:
    """Both sides and their tables."""

    environments: dict[str, Environment]
    tables: Tables

    @property
    def url(self) -> str:
        return f"{self.tables.url}?schema={self.tables.schema}"

    @contextlib.contextmanager
    def started(self, commands: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Process]]:
        """Start `side: (what, arguments...)` on each side, and end every process afterwards."""
        running: dict[str, Process] = {}
        try:
            for side, (what, *arguments) in commands.items():
                running[side] = self._start(side, what, *arguments)
            yield running
        finally:
            for process in running.values():
                process.popen.kill()
                process.popen.wait()

    def empty(self, *queues: str) -> None:
        wait_until(lambda: not any(map(self.tables.count, queues)), timeout=PATIENCE, what=f"{queues} to be empty")

    def _start(self, side: str, what: str, *arguments: str) -> Process:
        environment = self.environments[side]
        files = [environment.work / f"{what}-{uuid.uuid4().hex[:8]}.{kind}" for kind in ("out", "log")]
        settings = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "UNSTRACT"))}
        with files[0].open("wb") as output, files[1].open("wb") as log:
            popen = subprocess.Popen(
                [environment.root / "bin" / "python", "-I", SCRIPT, what, self.url, *arguments],
                cwd=environment.work,
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
            )
        return Process(popen, *files)


@pytest.fixture(scope="module")
def environments(
    make_environment: Callable[..., Environment], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Environment]:
    """The last release and the current wheel, each with its postgres extra, without sources."""
    new = make_environment("postgres")
    if not RELEASED:
        return {"old": make_environment("postgres"), "new": new}
    wheel: Wheel = wheels.read_wheel(RELEASED[-1])
    places = tmp_path_factory.mktemp("old-environment"), tmp_path_factory.mktemp("old-work")
    return {"old": wheels.make_environment(wheel, *places, ["postgres"]), "new": new}


@pytest.fixture(scope="module")
def deploy(environments: dict[str, Environment], embedded_url: str) -> Iterator[Deploy]:
    """Both sides on the tables of tests/releases/tables.sql, which neither has migrated."""
    with servers.fresh_schema(embedded_url) as schema:
        tables = Tables(embedded_url, schema)
        tables.execute((RELEASES / "tables.sql").read_text())
        yield Deploy(environments, tables)


def name_of(pair: tuple[str, str]) -> str:
    return f"{pair[0]}-to-{pair[1]}"


@pytest.fixture(scope="module")
def seen(deploy: Deploy) -> dict[tuple[str, str], dict[str, Any]]:
    """The runs, replies, statuses and dead letters of each pairing, without its own names."""
    queues = {pair: (name_of(pair), f"{name_of(pair)}-callbacks") for pair in PAIRS}
    consumers = {side: ["consume", *itertools.chain(*(queues[sent, side] for sent in SIDES))] for side in SIDES}
    told: dict[tuple[str, str], dict[str, Any]] = {}
    with deploy.started(consumers) as consuming:
        for runs in SIDES:
            with deploy.started({sends: ("dispatch", name_of((sends, runs))) for sends in SIDES}) as producing:
                for sends, process in producing.items():
                    (told[sends, runs],) = process.ended()
        deploy.empty(*itertools.chain(*queues.values()))
        ran = {side: process.stopped() for side, process in consuming.items()}
    return {pair: _plain(pair, {**told[pair], **_rows(deploy, pair), "ran": ran[pair[1]]}) for pair in PAIRS}


def _rows(deploy: Deploy, pair: tuple[str, str]) -> dict[str, Any]:
    name = name_of(pair)
    columns = "queue_name, message, org_id, priority, attempts, reason, result"
    letters = deploy.tables.rows(
        f"SELECT {columns} FROM {{dead}} WHERE queue_name IN (%s, %s) ORDER BY reason, message::text",  # noqa: S608
        name,
        f"{name}-callbacks",
    )
    return {"dead": [[json.dumps(one["message"], sort_keys=True), *rest] for one, rest in map(_split, letters)]}


def _split(row: tuple[Any, ...]) -> tuple[dict[str, Any], list[Any]]:
    queue, message, *rest = row
    return {"message": {key: value for key, value in message.items() if key != "reply_key"}}, [queue, *rest]


def _plain(pair: tuple[str, str], found: dict[str, Any]) -> dict[str, Any]:
    """Replace the names and ids that differ between pairings."""
    name = name_of(pair)
    found["ran"] = [one for one in found["ran"] if one["queue"] in (name, f"{name}-callbacks")]
    known = {id: f"id of {what}" for what, id in found.pop("ids").items()}
    for task, end in itertools.product(("returns", "raises", "not registered"), ("on_success", "on_error")):
        known[str(uuid.uuid5(CONTINUATION_IDS, f"{name}/{task}/{end}"))] = f"{task}/{end}"
    text = json.dumps(found, ensure_ascii=False)
    for id, what in known.items():
        text = text.replace(id, what)
    plain: dict[str, Any] = json.loads(text.replace(name, "NAME"))
    plain["ran"].sort(key=lambda one: json.dumps(one, sort_keys=True))
    return plain


ACME: dict[str, Any] = {"org_id": "acme", "priority": 8, "fairness": ["acme", "api", 8]}
NOBODY: dict[str, Any] = {"org_id": "", "priority": 5, "fairness": None}
WRONG = "ValueError: it does not add up: 1.184,00 €"
UNKNOWN = "UnknownTask: no task 'not registered' in the worker of queue 'NAME'"


def result_of(*args: Any) -> dict[str, Any]:
    return {"total": "118.40", "pages": [1, 2.5, None, True], "für": list(args)}


def run(task: str, args: list[Any], queue: str = "NAME", attempt: int = 1, **rest: Any) -> dict[str, Any]:
    return {"task": task, "args": args, "kwargs": {}, "queue": queue, "attempt": attempt, "task_id": None, **rest}


def called(task: str, first: Any, of: str, **error: str) -> dict[str, Any]:
    kwargs = {"callback_kwargs": {"user": "u-1", **error}}
    return run(task, [first], "NAME-callbacks", kwargs=kwargs, task_id=of, **ACME)


DOCUMENT = [{"document": "d-1"}]
PLAIN: dict[str, Any] = {**NOBODY, "org_id": "acme"}
RAN = [
    run("returns", DOCUMENT, kwargs={"n": 2**53}, task_id="NAME/returns", **ACME),
    called("done", result_of(*DOCUMENT), "returns/on_success"),
    run("raises", DOCUMENT, kwargs={"n": 2**53}, task_id="NAME/raises", **ACME),
    called("failed", "NAME/raises", "raises/on_error", error=WRONG),
    called("failed", "NAME/not registered", "not registered/on_error", error=UNKNOWN),
    run("returns", ["blocking"], **NOBODY),
    run("raises", [], **NOBODY),
    *(run("recovers", ["plain"], attempt=attempt, task_id="id of plain recovers", **PLAIN) for attempt in (1, 2)),
    *(run("raises", ["plain"], attempt=attempt, task_id="id of plain raises", **PLAIN) for attempt in (1, 2)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_runs_and_callbacks_are_equal_across_releases(
    pair: tuple[str, str], seen: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """Each task and callback runs once, with equal arguments, organisation and id for every pairing."""
    assert seen[pair]["ran"] == sorted(RAN, key=lambda one: json.dumps(one, sort_keys=True))


@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_replies_and_statuses_are_equal_across_releases(
    pair: tuple[str, str], seen: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """Replies, errors and statuses are equal for every pairing of sender and worker."""
    found = seen[pair]
    assert found["returned"] == result_of("blocking")
    assert (found["raised"], found["unknown"]) == (f"TaskFailed: {WRONG}", f"TaskFailed: {UNKNOWN}")
    returned = found["statuses"]["NAME/returns"]
    assert returned[1] in (None, result_of(*DOCUMENT))  # a release that kept it beside on_success may be the old side
    assert found["statuses"] == {
        "NAME/returns": ["completed", returned[1], ""],
        "NAME/raises": ["failed", None, WRONG],
        "NAME/not registered": ["failed", None, UNKNOWN],
        "id of plain raises": ["failed", None, WRONG],
    }
    assert found["never_sent"] is None


@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_dead_letters_are_equal_across_releases(
    pair: tuple[str, str], seen: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """Each dead letter has the sent message and the reason, and there is no other one."""
    found = [(json.loads(message), *rest) for message, *rest in seen[pair]["dead"]]
    assert [(message["task_name"], message["args"], *rest) for message, *rest in found] == [
        ("not registered", [], "NAME", "", 5, 1, UNKNOWN, None),
        ("not registered", DOCUMENT, "NAME", "acme", 8, 1, UNKNOWN, None),
        ("raises", ["plain"], "NAME", "acme", 5, 2, WRONG, None),
    ]
    assert seen[pair]["dead"] == seen["new", "new"]["dead"]


def test_both_releases_share_one_queue(deploy: Deploy) -> None:
    """Both sides send and run tasks and callbacks: each message is run once, and each side runs some."""
    numbers, half = 300, 150
    consumers = {side: ("consume", "flood", f"flood-{side}") for side in SIDES}
    producers = {"old": ("flood", "flood", "0", str(half)), "new": ("flood", "flood", str(half), str(numbers))}
    with deploy.started(consumers) as consuming, deploy.started(producers) as producing:
        for process in producing.values():
            process.ended()
        deploy.empty("flood")
        ran = {side: process.stopped() for side, process in consuming.items()}
    runs = Counter((one["task"], one["args"][0]) for lines in ran.values() for one in lines if one["queue"] == "flood")
    expected = [("takes a moment", number) for number in range(numbers)]
    assert runs == Counter(expected + [("done", number) for number in range(0, numbers, 3)])
    for lines in ran.values():
        assert {one["task"] for one in lines if one["queue"] == "flood"} == {"takes a moment", "done"}


def test_old_release_works_on_migrated_tables(deploy: Deploy) -> None:
    """The new release migrates the tables while the old one runs, and the old one's messages are run."""
    with deploy.started({"old": ("consume", "after", "after-callbacks")}) as consuming:
        deploy.environments["new"].python(
            f"from unstract_core import load_transport; load_transport({deploy.url!r}).migrate()"
        )
        with deploy.started({"new": ("dispatch", "after")}) as producing:
            (told,) = producing["new"].ended()
        deploy.empty("after", "after-callbacks")
        assert len(consuming["old"].stopped()) == len(RAN)
    assert told["returned"] == result_of("blocking")


def test_old_side_is_the_last_release(environments: dict[str, Environment]) -> None:
    """The old side is not the current wheel."""
    if not RELEASED:
        pytest.skip("nothing has been released yet (no wheel in tests/releases): the old side is the current wheel too")
    version = environments["old"].python("import unstract_core; print(unstract_core.__version__)")
    assert version == str(parse_wheel_filename(RELEASED[-1].name)[1])
