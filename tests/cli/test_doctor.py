"""`unstract-wire doctor`: how findings are shown and end, and what it says of the installation itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from cli import shared
from cli.outcomes import Ended, the_one_line
from hypothesis import given
from hypothesis import strategies as st
from queues import bury, receive_all

from contract_tests.messages import message
from tools.check_lock import ROOT
from transports.postgres import PostgresTransport
from unstract_core.observability.diagnostics import Finding, kind_of_reason

Run = Callable[..., Any]


class Told(shared.Lasting):
    """Finds what a test tells it to find."""

    findings: list[Finding]

    def check_up(self) -> Iterator[Finding]:
        return iter(self.findings)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr(shared, "current", Told())
    assert isinstance(shared.current, Told)
    return shared.current


def doctor(*paths: Path, url: str = "memory://", first: bool = True) -> Ended:
    """Run the doctor in a process of its own with more directories on its import path."""
    before = os.environ["PYTHONPATH"].split(os.pathsep)
    path = [*map(str, paths), *before] if first else [*before, *map(str, paths)]
    command = [sys.executable, "-m", "unstract_core", "doctor", "--json", "--url", url]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, cwd=paths[0], check=False)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def found(ended: Ended, name: str) -> list[dict[str, str]]:
    assert ended.err == ""
    return [finding for finding in json.loads(ended.out) if finding["name"] == name]


def distribution(directory: Path, name: str, entry_points: str) -> Path:
    """Make a distribution that provides transports; return the directory to put on the path."""
    info = directory / f"{name.replace('-', '_')}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[unstract_core.transports]\n{entry_points}\n")
    return directory


@pytest.mark.parametrize(
    ("levels", "code"), [(["ok", "skipped"], 0), (["ok", "warning"], 0), (["warning", "error", "ok"], 1)], ids=str
)
def test_the_exit_code_is_1_where_something_is_an_error(run: Run, told: Told, levels: list[Any], code: int) -> None:
    """With warnings at most it is 0: a dead letter must not stop a deployment."""
    told.findings = [Finding("this", level, "what there is") for level in levels]
    assert run("doctor").exit_code == code
    assert run("doctor", "--json").exit_code == code


def test_a_finding_is_shown_with_what_to_do_about_it(run: Run, told: Told) -> None:
    """One line says what, the next one what to do; the last line counts. What was found cannot steer a terminal."""
    told.findings = [Finding("leases", "warning", "3 in '\x1b[2J'", "start a worker"), Finding("clock", "ok", "right")]
    lines = run("doctor").stdout.splitlines()
    assert "warning  leases         3 in '\\x1b[2J'" in lines
    assert lines[lines.index("warning  leases         3 in '\\x1b[2J'") + 1].split() == ["->", "start", "a", "worker"]
    assert "ok       clock          right" in lines
    assert re.fullmatch(r"\d+ ok, 1 warning", lines[-1])


def test_findings_as_json_have_stable_keys(run: Run, told: Told) -> None:
    """A list with one object a finding, in the order in which they were made."""
    told.findings = [Finding("a", "warning", "b", "c"), Finding("d", "skipped", "e")]
    document = json.loads(run("doctor", "--json").stdout)
    assert document[-2:] == [
        {"name": "a", "level": "warning", "what": "b", "remedy": "c"},
        {"name": "d", "level": "skipped", "what": "e", "remedy": ""},
    ]
    assert [finding["name"] for finding in document[:3]] == ["import path", "entry points", "transport"]


def test_no_password_is_shown(run: Run, told: Told) -> None:
    """Whatever a check quotes: in text and as JSON."""
    url = "postgresql://u:s3cret-word@h/d"
    told.findings = [Finding("connection", "error", f"cannot reach {url}", f"mend {url}")]
    for ended in (run("doctor"), run("doctor", "--json"), run("doctor", url=f"{url}?nonsense=1")):
        assert "s3cret-word" not in ended.stdout + ended.stderr
        assert "h/d" in ended.stdout or "nonsense" in ended.stdout


@pytest.mark.parametrize("url", ["memory://", "celery+memory://", "cli.shared:claimless"])
def test_of_a_transport_without_a_check_up_the_rest_is_not_applicable(run: Run, url: str) -> None:
    """What does not depend on the transport is checked, and the connection where something harmless can be asked."""
    ended = run("doctor", "--json", url=url)
    document = {finding["name"]: finding for finding in json.loads(ended.stdout)}
    assert ended.exit_code == 0
    assert document["import path"]["level"] == document["transport"]["level"] == "ok"
    assert document["connection"]["level"] == ("skipped" if url.endswith("claimless") else "ok")
    assert (document["everything else"]["level"], ended.stderr) == ("skipped", "")


def test_a_broker_is_asked_and_nothing_is_left_on_it(run: Run, rabbitmq_url: str) -> None:
    """It answers; one that is away is an error with what the network said."""
    ended = run("doctor", "--json", url=rabbitmq_url)
    assert [one["level"] for one in json.loads(ended.stdout) if one["name"] == "connection"] == ["ok"]
    ended = run("doctor", "--json", url="amqp://guest:guest@127.0.0.1:1//")
    (connection,) = [one for one in json.loads(ended.stdout) if one["name"] == "connection"]
    assert (ended.exit_code, connection["level"], connection["remedy"] != "") == (1, "error", True)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (None, "UNSTRACT_WIRE_URL"),
        ("nosuch://host", "no transport for nosuch:// URLs"),
        ("postgresql://localhost/db?nonsense=1", "unknown option 'nonsense'"),
        ("cli.shared:broken", "KeyError"),
    ],
)
def test_a_transport_that_cannot_be_had_is_a_finding(run: Run, url: str | None, said: str) -> None:
    """And no reason not to look at the import path, which may be why."""
    ended = run("doctor", "--json", url=url)
    document = json.loads(ended.stdout)
    assert ended.exit_code == 1
    assert [finding["name"] for finding in document] == ["import path", "entry points", "transport"]
    assert said in document[-1]["what"]
    assert document[-1]["level"] == "error"


def test_an_unknown_option_is_still_a_mistake(run: Run) -> None:
    """Exit code 2 and one line, as everywhere."""
    assert "--jsn" in the_one_line(run("doctor", "--jsn"))


@pytest.mark.parametrize("first", [True, False], ids=["earlier", "later"])
@pytest.mark.parametrize("file", ["transports/__init__.py", "transports.py"])
def test_a_foreign_package_that_hides_our_transports_is_named(tmp_path: Path, file: str, first: bool) -> None:
    """With the directory to take off the path, wherever it stands there; and the transport that was hidden."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("whose = 'foreign'\n")
    ended = doctor(tmp_path, first=first)
    (finding,) = found(ended, "import path")
    assert (ended.code, finding["level"]) == (1, "error")
    assert str(tmp_path / file) in finding["what"]
    assert f"remove {tmp_path} from" in finding["remedy"]
    assert "error" in [one["level"] for one in found(ended, "entry points")]
    assert [one["level"] for one in found(ended, "transport")] == ["error"]


def test_a_foreign_namespace_hides_nothing(tmp_path: Path) -> None:
    """A directory without __init__.py lives with ours."""
    (tmp_path / "transports" / "pigeon").mkdir(parents=True)
    ended = doctor(tmp_path)
    assert (ended.code, [one["level"] for one in found(ended, "import path")]) == (0, ["ok"])


def test_a_foreign_package_in_the_same_directory_as_ours_is_told_and_is_no_fault(tmp_path: Path) -> None:
    """As pip lays both into one site-packages: both can be imported."""
    for name in ("unstract_core", "transports"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "transports" / "__init__.py").write_text("whose = 'foreign'\n")
    ended = doctor(tmp_path)
    (finding,) = found(ended, "import path")
    assert (ended.code, finding["level"], "in the same directory" in finding["what"]) == (0, "ok", True)


@pytest.mark.parametrize(("url", "level"), [("memory://", "warning"), ("pigeon://", "error")])
def test_an_entry_point_that_is_broken_is_told_with_its_provider(tmp_path: Path, url: str, level: str) -> None:
    """An error where its scheme is the one in use, else a warning."""
    path = distribution(tmp_path, "pigeon-post", "pigeon = no_such_module:from_url")
    (tmp_path / "no_such_module.py").write_text("raise RuntimeError('no pigeons')")
    ended = doctor(path, url=url)
    (finding,) = [one for one in found(ended, "entry points") if "pigeon" in one["what"]]
    assert (finding["level"], ended.code) == (level, 1 if level == "error" else 0)
    assert "pigeon:// of pigeon-post is broken: RuntimeError: no pigeons" in finding["what"]
    assert "pigeon-post" in finding["remedy"]


def test_an_entry_point_whose_driver_is_missing_is_no_fault(tmp_path: Path) -> None:
    """An extra that is not installed is told, and is what was wanted."""
    path = distribution(tmp_path, "pigeon-post", "pigeon = pigeon_post:from_url")
    (tmp_path / "pigeon_post.py").write_text("import no_such_driver")
    ended = doctor(path)
    (finding,) = [one for one in found(ended, "entry points") if "pigeon" in one["what"]]
    assert (finding["level"], finding["what"]) == ("skipped", "not installed: pigeon needs no_such_driver")


def test_two_providers_of_one_scheme_are_told(tmp_path: Path) -> None:
    """Both, since it depends on the path which of them is used."""
    path = distribution(tmp_path, "other-memory", "memory = pathlib:Path")
    (finding,) = [one for one in found(doctor(path), "entry points") if one["level"] == "warning"]
    assert "other-memory (pathlib:Path)" in finding["what"]
    assert "transports.memory:from_url" in finding["what"]


def test_a_database_is_checked_through_the_command(run: Run, embedded_url: str) -> None:
    """Without tables it is an error to be migrated; with them it is none, whatever lies in them; no secret shows."""
    with servers.fresh_schema(embedded_url) as schema:
        url = f"{embedded_url}?schema={schema}"
        ended = run("doctor", url=url)
        assert (ended.exit_code, "unstract-wire migrate" in ended.stdout) == (1, True)
        transport = PostgresTransport(embedded_url, schema)
        transport.migrate()
        transport.send([message("t", "q", "secret-word"), message("t", "q", "secret-word")])
        bury(transport, "q", "ValueError: secret-word")
        transport.send([message("t", "q", "secret-word")])
        receive_all(transport, "q", lease=0.01)
        transport.close()
        ended = run("doctor", url=url)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert "2 in 'q' (the newest: ValueError)" in ended.stdout
    assert "secret-word" not in ended.stdout


def test_a_database_that_is_away_is_told(run: Run) -> None:
    """One error, and everything else was not looked at."""
    ended = run("doctor", "--json", url="postgresql://nobody@127.0.0.1:1/db")
    document = json.loads(ended.stdout)
    assert [one["name"] for one in document if one["level"] == "error"] == ["connection"]
    assert (ended.exit_code, document[-1]["level"]) == (1, "skipped")


@given(st.text() | st.from_regex(r"\A[A-Za-z.]+: .*\Z"))
def test_of_a_reason_only_the_error_type_is_told(reason: str) -> None:
    """An identifier at its start that a colon ends, or one of our own phrases; nothing of what follows."""
    kind = kind_of_reason(reason)
    assert kind == "other" or (reason.startswith(kind) and reason[len(kind) : len(kind) + 1] in ("", ":"))
    assert all(part.isidentifier() for part in kind.split("."))


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("ValueError: invoice 17", "ValueError"),
        ("billing.errors.Refused: no", "billing.errors.Refused"),
        ("TooManyAttempts", "TooManyAttempts"),
        ("result delivery failed: ValueError: x", "result delivery failed"),
        ("a task said this", "other"),
        ("", "other"),
    ],
)
def test_reasons_are_told_by_their_kind(reason: str, kind: str) -> None:
    """The types that errors have, and the phrases that this package writes itself."""
    assert kind_of_reason(reason) == kind
