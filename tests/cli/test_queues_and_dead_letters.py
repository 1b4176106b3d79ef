"""The commands `migrate`, `queues` and `dead`."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

import pytest
from cli import shared
from cli.outcomes import Ended, the_one_line
from cli.shared import Lasting, Migrating
from queues import bury, receive_all

from contract_tests.messages import message

Run = Callable[..., Any]


def reasons(transport: Any) -> list[str]:
    return [letter.reason for letter in transport.dead.find()]


def ids(transport: Any, reason: str) -> list[str]:
    return [letter.id for letter in transport.dead.find() if letter.reason == reason]


def test_migrate_lists_what_it_creates(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run lists each created object, and the next one reports that nothing was created."""
    monkeypatch.setattr(shared, "current", Migrating())
    assert run("migrate").stdout == "created schema s\ncreated pg_queue_message\n"
    assert run("migrate").stdout == "up to date, nothing was created\n"
    assert json.loads(run("migrate", "--json").stdout) == {"created": []}
    monkeypatch.setattr(shared, "current", Migrating())
    assert json.loads(run("migrate", "--json").stdout) == {"created": ["schema s", "pg_queue_message"]}


def fill(transport: Lasting) -> None:
    """Put one ready, two in-flight, one delayed and one dead message in "full", and one dead message in "other"."""
    transport.send([message("t", "full"), message("t", "other")])
    bury(transport, "full", "because")
    bury(transport, "other", "because")
    transport.send([message("t", "full"), message("t", "full")])
    receive_all(transport, "full")
    transport.send([message("t", "full", delay=60.0), message("t", "full")])


def test_queues_counts_the_messages_of_each_queue(run: Run, transport: Lasting) -> None:
    """Each queue has one row: depth is ready, in flight and delayed together; oldest is of the ready messages."""
    fill(transport)
    heading, *rows = run("queues").stdout.splitlines()
    assert heading.split() == ["QUEUE", "DEPTH", "READY", "IN", "FLIGHT", "DELAYED", "OLDEST", "DEAD"]
    assert [row.split() for row in rows] == [
        ["full", "4", "1", "2", "1", "0s", "1"],
        ["other", "0", "0", "0", "0", "-", "1"],
    ]


def test_queues_as_json_have_stable_keys(run: Run, transport: Lasting) -> None:
    """The document is a list with one object for each queue; `oldest_seconds` is null if nothing waits."""
    fill(transport)
    full, other = json.loads(run("queues", "--json").stdout)
    assert 0 <= full.pop("oldest_seconds") < 60
    counts = {"depth": 4, "ready": 1, "in_flight": 2, "delayed": 1, "dead": 1}
    assert full == {"queue": "full", **counts, "estimated": False}
    assert list(other) == ["queue", "depth", "ready", "in_flight", "delayed", "oldest_seconds", "dead", "estimated"]
    assert other["oldest_seconds"] is None


def test_queues_shows_named_queues_also_if_empty(run: Run, transport: Lasting) -> None:
    """--queue restricts the rows, and also shows an empty queue."""
    fill(transport)
    rows = json.loads(run("queues", "--queue", "other", "--queue", "empty", "--json").stdout)
    assert [(row["queue"], row["depth"], row["dead"]) for row in rows] == [("empty", 0, 0), ("other", 0, 1)]


@pytest.mark.parametrize("arguments", [("queues",), ("dead", "list")])
def test_an_empty_result_is_noted_on_stderr(run: Run, arguments: tuple[str, ...]) -> None:
    """A pipe gets no rows, standard error gets a note, and --json prints an empty list."""
    ended = run(*arguments)
    assert (ended.exit_code, ended.stdout) == (0, "")
    assert ended.stderr.startswith("no ")
    assert json.loads(run(*arguments, "--json").stdout) == []


@pytest.mark.parametrize(
    ("seconds", "shown"), [(59.4, "59s"), (60, "1m 00s"), (3599, "59m 59s"), (7300, "2h 01m"), (90000, "1d 01h")]
)
def test_an_age_is_shown_in_two_units(run: Run, transport: Lasting, seconds: float, shown: str) -> None:
    """An age has its two largest units, rounded down."""
    transport.send([message("t", "q")])
    (row,) = transport._store.rows.values()
    row.enqueued -= seconds
    row.due -= seconds
    assert shown in run("queues").stdout


def test_dead_list_shows_newest_first_without_content(run: Run, transport: Lasting) -> None:
    """The list has id, queue, task, attempts, time and reason, and no payload."""
    for reason in ("first", "second"):
        transport.send([message("a.task", "q", "payload content")])
        bury(transport, "q", f"{reason}\nline")
    ended = run("dead", "list")
    _, newest, oldest = ended.stdout.splitlines()
    assert newest.split()[1:4] == ["q", "a.task", "1"]
    assert newest.endswith("second\\nline")
    assert oldest.endswith("first\\nline")
    assert "payload content" not in ended.stdout
    assert ended.stderr == ""


def test_dead_list_is_restricted_by_queue_and_limit(run: Run, transport: Lasting) -> None:
    """--queue selects, --limit cuts, and a note says that the list may be longer."""
    transport.send([message("t", "a"), message("t", "b"), message("t", "a")])
    bury(transport, "a", "x")
    bury(transport, "b", "x")
    assert [row["queue"] for row in json.loads(run("dead", "list", "--queue", "a", "--json").stdout)] == ["a", "a"]
    cut = run("dead", "list", "--limit", "2")
    assert len(cut.stdout.splitlines()) == 3
    assert "--limit" in cut.stderr


def test_dead_letters_as_json_have_stable_keys(run: Run, transport: Lasting) -> None:
    """`list` and `show` have the same keys and UTC times; `show` adds the message and the result."""
    transport.send([message("t", "q", {"a": "ä\x7f"}, org_id="org", priority=7)])
    bury(transport, "q", "why", result=[1])
    (listed,) = json.loads(run("dead", "list", "--json").stdout)
    shown = json.loads(run("dead", "show", listed["id"], "--json").stdout)
    assert shown.pop("message")["args"] == [{"a": "ä\x7f"}]
    assert shown.pop("result") == [1]
    assert shown == listed
    for name in ("enqueued_at", "buried_at"):
        moment = datetime.datetime.fromisoformat(listed.pop(name))
        assert abs(datetime.datetime.now(datetime.UTC) - moment) < datetime.timedelta(minutes=1)
    listed.pop("id")
    assert listed == {
        "queue": "q",
        "task_name": "t",
        "reason": "why",
        "attempts": 1,
        "org_id": "org",
        "priority": 7,
    }


def test_dead_show_prints_readable_content(run: Run, transport: Lasting) -> None:
    """The message and the result are indented JSON with readable letters and escaped control characters."""
    transport.send([message("t", "q", "Grüße \x9b2J")])
    bury(transport, "q", "why", result={"paid": True})
    shown = run("dead", "show", *ids(transport, "why")).stdout
    assert "reason       why\n" in shown
    assert '"Grüße \\x9b2J"' in shown
    assert '\nresult:\n{\n  "paid": true\n}\n' in shown
    assert all(line.isprintable() for line in shown.splitlines())


def test_dead_show_prints_unreadable_messages(run: Run, transport: Lasting) -> None:
    """A message that is no task is listed and shown as it was stored."""
    transport._store.add(message("t", "q"), "not JSON")
    bury(transport, "q", "unreadable")
    assert json.loads(run("dead", "list", "--json").stdout)[0]["task_name"] is None
    assert '"not JSON"' in run("dead", "show", *ids(transport, "unreadable")).stdout
    assert run("dead", "list").stdout.splitlines()[1].split()[2] == "-"


def test_replay_sends_the_named_letters_again(run: Run, transport: Lasting) -> None:
    """The named dead letters return to their queue and leave the list; the others stay."""
    transport.send([message("t", "a", 1)])
    bury(transport, "a", "x")
    transport.send([message("t", "a", 2)])
    bury(transport, "a", "y")
    (id,) = ids(transport, "x")
    assert run("dead", "replay", id).stdout == f"replayed 1\n{id}\n"
    assert reasons(transport) == ["y"]
    (again,) = receive_all(transport, "a")
    assert again.attempt == 1
    assert again.payload is not None
    assert again.payload.args == [1]
    (id,) = ids(transport, "y")
    assert json.loads(run("dead", "replay", id, "--json").stdout) == {"replayed": [id]}


def test_one_unknown_id_changes_nothing(run: Run, transport: Lasting) -> None:
    """replay and purge change nothing if one of the ids is unknown."""
    transport.send([message("t", "a")])
    bury(transport, "a", "x")
    for command in (("replay",), ("purge", "--yes")):
        assert "no dead letter 999" in the_one_line(run("dead", *command, *ids(transport, "x"), "999"))
    assert reasons(transport) == ["x"]


def test_replay_of_a_queue_leaves_the_others(run: Run, transport: Lasting) -> None:
    """`replay --queue a --all` sends the dead letters of queue a alone, in their order."""
    transport.send([message("t", "a", 1), message("t", "a", 2), message("t", "b")])
    bury(transport, "a", "x")
    bury(transport, "b", "y")
    assert len(json.loads(run("dead", "replay", "--queue", "a", "--all", "--json").stdout)["replayed"]) == 2
    assert reasons(transport) == ["y"]
    assert [delivery.payload.args for delivery in receive_all(transport, "a") if delivery.payload] == [[1], [2]]
    assert run("dead", "replay", "--queue", "a", "--all").stdout == "replayed 0\n"


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (("--all",), []),
        (("--queue", "a"), ["b old", "b new"]),
        (("--queue", "a", "--all"), ["b old", "b new"]),
        (("--all", "--older-than", "100"), ["a new", "b new"]),
        (("--queue", "a", "--older-than", "100"), ["a new", "b old", "b new"]),
        (("--all", "--older-than", "10000"), ["a old", "a new", "b old", "b new"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_purge_removes_the_selected_letters_only(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], left: list[str]
) -> None:
    """Purge removes by queue or all, and with --older-than only older dead letters."""
    now = [1000.0]
    transport = Lasting(clock=lambda: now[0])
    monkeypatch.setattr(shared, "current", transport)
    for age in ("old", "new"):
        for queue in ("a", "b"):
            transport.send([message("t", queue)])
            bury(transport, queue, f"{queue} {age}")
        now[0] += 90
    ended = run("dead", "purge", *arguments, "--yes", "--json")
    assert json.loads(ended.stdout) == {"purged": 4 - len(left)}
    assert sorted(reasons(transport)) == sorted(left)


def test_purge_by_id_removes_that_letter(run: Run, transport: Lasting) -> None:
    """Purge by id leaves all other dead letters."""
    transport.send([message("t", "a"), message("t", "b")])
    bury(transport, "a", "x")
    bury(transport, "b", "y")
    assert run("dead", "purge", *ids(transport, "x"), "--yes").stdout == "purged 1\n"
    assert reasons(transport) == ["y"]


def test_purge_without_a_terminal_needs_yes(run: Run, transport: Lasting) -> None:
    """Without --yes and without a terminal purge removes nothing, even if its input would confirm."""
    transport.send([message("t", "a")])
    bury(transport, "a", "x")
    assert "--yes" in the_one_line(run("dead", "purge", "--all", input="y\n"))
    assert reasons(transport) == ["x"]


@pytest.mark.parametrize(
    ("typed", "code", "said"), [("y\n", 0, "purged 2000"), ("n\n", 1, "nothing was removed"), ("\n", 1, "nothing")]
)
def test_purge_asks_on_a_terminal(on_terminal: Callable[..., Ended], typed: str, code: int, said: str) -> None:
    """Purge names the dead letters; only a yes removes them, and a no exits with 1."""
    ended = on_terminal("dead", "purge", "--queue", "q", "--url", "cli.shared:crowded", typed=typed)
    assert "Remove every dead letter of queue 'q' for good?" in ended.err
    assert ended.code == code
    assert said in ended.out + ended.err
