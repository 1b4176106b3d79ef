"""`unstract-wire doctor`: the output of findings, and the checks of the installation."""

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


class Findings(shared.Lasting):
    """A transport whose diagnostics return the findings of the test."""

    findings: list[Finding]

    def check_up(self) -> Iterator[Finding]:
        return iter(self.findings)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Findings:
    monkeypatch.setattr(shared, "current", Findings())
    assert isinstance(shared.current, Findings)
    return shared.current


def doctor(*paths: Path, url: str = "memory://", first: bool = True) -> Ended:
    """Run doctor in a process of its own with more directories on its import path."""
    before = os.environ["PYTHONPATH"].split(os.pathsep)
    path = [*map(str, paths), *before] if first else [*before, *map(str, paths)]
    command = [sys.executable, "-m", "unstract_core", "doctor", "--json", "--url", url]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, cwd=paths[0], check=False)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def findings(ended: Ended, name: str) -> list[dict[str, str]]:
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
def test_doctor_exits_with_1_for_an_error(run: Run, checked: Findings, levels: list[Any], code: int) -> None:
    """The exit code is 1 if a finding is an error, and 0 if there are only warnings."""
    checked.findings = [Finding("this", level, "what there is") for level in levels]
    assert run("doctor").exit_code == code
    assert run("doctor", "--json").exit_code == code


def test_each_finding_is_printed_with_its_remedy(run: Run, checked: Findings) -> None:
    """The remedy follows on the next line, the last line counts the findings, and control characters are escaped."""
    checked.findings = [
        Finding("leases", "warning", "3 in '\x1b[2J'", "start a worker"),
        Finding("clock", "ok", "right"),
    ]
    lines = run("doctor").stdout.splitlines()
    assert "warning  leases         3 in '\\x1b[2J'" in lines
    assert lines[lines.index("warning  leases         3 in '\\x1b[2J'") + 1].split() == ["->", "start", "a", "worker"]
    assert "ok       clock          right" in lines
    assert re.fullmatch(r"\d+ ok, 1 warning", lines[-1])


def test_findings_as_json_have_stable_keys(run: Run, checked: Findings) -> None:
    """The document is a list with one object for each finding, in their order."""
    checked.findings = [Finding("a", "warning", "b", "c"), Finding("d", "skipped", "e")]
    document = json.loads(run("doctor", "--json").stdout)
    assert document[-2:] == [
        {"name": "a", "level": "warning", "what": "b", "remedy": "c"},
        {"name": "d", "level": "skipped", "what": "e", "remedy": ""},
    ]
    assert [finding["name"] for finding in document[:3]] == ["import path", "entry points", "transport"]


def test_doctor_masks_passwords(run: Run, checked: Findings) -> None:
    """A password in a finding is masked, in text and in JSON."""
    url = "postgresql://u:s3cret-word@h/d"
    checked.findings = [Finding("connection", "error", f"cannot reach {url}", f"mend {url}")]
    for ended in (run("doctor"), run("doctor", "--json"), run("doctor", url=f"{url}?nonsense=1")):
        assert "s3cret-word" not in ended.stdout + ended.stderr
        assert "h/d" in ended.stdout or "nonsense" in ended.stdout


@pytest.mark.parametrize("url", ["memory://", "celery+memory://", "cli.shared:claimless"])
def test_doctor_checks_transports_without_own_diagnostics(run: Run, url: str) -> None:
    """Doctor checks the installation, and the connection if a call without side effects exists."""
    ended = run("doctor", "--json", url=url)
    document = {finding["name"]: finding for finding in json.loads(ended.stdout)}
    assert ended.exit_code == 0
    assert document["import path"]["level"] == document["transport"]["level"] == "ok"
    assert document["connection"]["level"] == ("skipped" if url.endswith("claimless") else "ok")
    assert (document["everything else"]["level"], ended.stderr) == ("skipped", "")


def test_doctor_leaves_nothing_on_a_broker(run: Run, rabbitmq_url: str) -> None:
    """A reachable broker is ok and unchanged; an unreachable one is an error with the network's text."""
    ended = run("doctor", "--json", url=rabbitmq_url)
    assert [finding["level"] for finding in json.loads(ended.stdout) if finding["name"] == "connection"] == ["ok"]
    ended = run("doctor", "--json", url="amqp://guest:guest@127.0.0.1:1//")
    (connection,) = [finding for finding in json.loads(ended.stdout) if finding["name"] == "connection"]
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
def test_doctor_reports_a_transport_that_cannot_load(run: Run, url: str | None, said: str) -> None:
    """A transport that cannot be loaded is an error, and the import path is still checked."""
    ended = run("doctor", "--json", url=url)
    document = json.loads(ended.stdout)
    assert ended.exit_code == 1
    assert [finding["name"] for finding in document] == ["import path", "entry points", "transport"]
    assert said in document[-1]["what"]
    assert document[-1]["level"] == "error"


def test_doctor_refuses_unknown_options(run: Run) -> None:
    """An unknown option is one line with exit code 2, as for every command."""
    assert "--jsn" in the_one_line(run("doctor", "--jsn"))


@pytest.mark.parametrize("first", [True, False], ids=["earlier", "later"])
@pytest.mark.parametrize("file", ["transports/__init__.py", "transports.py"])
def test_doctor_names_a_package_that_hides_transports(tmp_path: Path, file: str, first: bool) -> None:
    """The remedy names the directory of the package, at any position of the import path."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("whose = 'foreign'\n")
    ended = doctor(tmp_path, first=first)
    (finding,) = findings(ended, "import path")
    assert (ended.code, finding["level"]) == (1, "error")
    assert str(tmp_path / file) in finding["what"]
    assert f"remove {tmp_path} from" in finding["remedy"]
    assert "error" in [finding["level"] for finding in findings(ended, "entry points")]
    assert [finding["level"] for finding in findings(ended, "transport")] == ["error"]


def test_a_foreign_namespace_package_hides_nothing(tmp_path: Path) -> None:
    """A directory without __init__.py shares the namespace with ours."""
    (tmp_path / "transports" / "pigeon").mkdir(parents=True)
    ended = doctor(tmp_path)
    assert (ended.code, [finding["level"] for finding in findings(ended, "import path")]) == (0, ["ok"])


def test_a_foreign_package_beside_ours_is_ok(tmp_path: Path) -> None:
    """A package that pip installed into the same directory hides nothing."""
    for name in ("unstract_core", "transports"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "transports" / "__init__.py").write_text("whose = 'foreign'\n")
    ended = doctor(tmp_path)
    (finding,) = findings(ended, "import path")
    assert (ended.code, finding["level"], "in the same directory" in finding["what"]) == (0, "ok", True)


@pytest.mark.parametrize(("url", "level"), [("memory://", "warning"), ("pigeon://", "error")])
def test_doctor_names_the_provider_of_broken_entry_points(tmp_path: Path, url: str, level: str) -> None:
    """A broken entry point is an error for the scheme in use, else a warning."""
    path = distribution(tmp_path, "pigeon-post", "pigeon = no_such_module:from_url")
    (tmp_path / "no_such_module.py").write_text("raise RuntimeError('no pigeons')")
    ended = doctor(path, url=url)
    (finding,) = [one for one in findings(ended, "entry points") if "pigeon" in one["what"]]
    assert (finding["level"], ended.code) == (level, 1 if level == "error" else 0)
    assert "pigeon:// of pigeon-post is broken: RuntimeError: no pigeons" in finding["what"]
    assert "pigeon-post" in finding["remedy"]


def test_a_missing_driver_is_no_error(tmp_path: Path) -> None:
    """An extra that is not installed is reported as skipped."""
    path = distribution(tmp_path, "pigeon-post", "pigeon = pigeon_post:from_url")
    (tmp_path / "pigeon_post.py").write_text("import no_such_driver")
    ended = doctor(path)
    (finding,) = [one for one in findings(ended, "entry points") if "pigeon" in one["what"]]
    assert (finding["level"], finding["what"]) == ("skipped", "not installed: pigeon needs no_such_driver")


def test_doctor_names_all_providers_of_a_scheme(tmp_path: Path) -> None:
    """Two providers of one scheme are a warning that names both."""
    path = distribution(tmp_path, "other-memory", "memory = pathlib:Path")
    (finding,) = [each for each in findings(doctor(path), "entry points") if each["level"] == "warning"]
    assert "other-memory (pathlib:Path)" in finding["what"]
    assert "transports.memory:from_url" in finding["what"]


def test_doctor_checks_the_database(run: Run, embedded_url: str) -> None:
    """Missing tables are an error; with tables there is none, and no secret is printed."""
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


def test_doctor_reports_an_unavailable_database_once(run: Run) -> None:
    """An unavailable database is one error, and the other checks are skipped."""
    ended = run("doctor", "--json", url="postgresql://nobody@127.0.0.1:1/db")
    document = json.loads(ended.stdout)
    assert [finding["name"] for finding in document if finding["level"] == "error"] == ["connection"]
    assert (ended.exit_code, document[-1]["level"]) == (1, "skipped")


@given(st.text() | st.from_regex(r"\A[A-Za-z.]+: .*\Z"))
def test_only_the_type_of_a_reason_is_shown(reason: str) -> None:
    """The kind of a reason is the identifier before its colon, or a phrase of this package; nothing else is shown."""
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
def test_reasons_have_kinds(reason: str, kind: str) -> None:
    """The kind of a reason is an error type or a phrase of this package."""
    assert kind_of_reason(reason) == kind
