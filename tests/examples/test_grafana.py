"""The dashboard, the alert rules, docs/monitoring.md and docs/runbooks.md name exactly the exposed metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import pytest
from prometheus_client import CollectorRegistry

from contract_tests.messages import message, then
from tools.check_lock import ROOT
from transports.memory import MemoryTransport
from unstract_core import Delivery, Reply, Settlement, Verdict
from unstract_core.cli import main
from unstract_core.observability.metrics import Metrics, QueueCollector
from unstract_core.observability.observer import LeaseLostEvent, TaskFinished, WorkerHeartbeat

MONITORING = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
RUNBOOKS = (ROOT / "docs" / "runbooks.md").read_text(encoding="utf-8")
DASHBOARD: dict[str, Any] = json.loads((ROOT / "examples/grafana/unstract-wire.json").read_text(encoding="utf-8"))
RULES = (ROOT / "examples/grafana/alerts.yml").read_text(encoding="utf-8")
PREFIX = "unstract_wire_"


@attrs.frozen
class Known:
    """An exposed metric, by the names of its samples."""

    kind: str
    labels: frozenset[str]


@attrs.frozen
class Rule:
    name: str
    expression: str
    wait: str
    severity: str
    summary: str


def metrics() -> dict[str, Known]:
    """Trigger every count, and return the exposed metrics; a histogram is listed by its base name."""
    registry = CollectorRegistry()
    transport = MemoryTransport()
    transport.send([message("t", "q")])
    registry.register(QueueCollector(transport, ["q"]))
    observer = Metrics(registry, {"t"})
    delivery = Delivery("1", "q", 1, message("t", "q", on_success=then("t", "q")).payload, b"")
    with observer.sending(message("t", "q")), observer.running(delivery):
        observer.on_task_finished(TaskFinished(delivery, "raised", "ValueError", 1.0, 1))
    with pytest.raises(ValueError, match="no"), observer.sending(message("t", "q")):
        raise ValueError("no")
    observer.rejected(delivery, "UnknownTask")
    observer.settled(Settlement(delivery, Verdict.ACK, reply=Reply("1", "completed")), 1.0)
    observer.on_lease_lost(LeaseLostEvent(delivery))
    observer.on_heartbeat(WorkerHeartbeat(1, 1, unavailable=False))
    found = {}
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = Known(family.type, frozenset(labels))
    return found


METRICS = metrics()


def used(expression: str) -> Iterator[tuple[str, set[str], bool]]:
    """Yield each metric of a PromQL expression, its labels, and whether it is a bucket."""
    for name, selector in re.findall(rf"\b({PREFIX}\w+)(?:\{{([^}}]*)\}})?", expression):
        bare = re.sub(r"_(bucket|sum|count)$", "", name)
        bare = bare if METRICS.get(bare, Known("", frozenset())).kind == "histogram" else name
        yield bare, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)), name.endswith("_bucket")


def grouped(expression: str) -> set[str]:
    """Return the labels that an expression keeps or matches."""
    return {
        label
        for labels in re.findall(r"\b(?:by|on|without|ignoring) \(([^)]*)\)", expression)
        for label in re.split(r",\s*", labels)
    }


def check(expression: str) -> None:
    """Raise if an expression uses a metric that is not exposed, or a label that it does not have."""
    found = list(used(expression))
    assert found, expression
    for name, labels, buckets in found:
        assert name in METRICS, expression
        having = METRICS[name].labels | ({"le"} if buckets else set())
        assert labels <= having, expression
        assert grouped(expression) <= having, expression


def panels() -> Sequence[Mapping[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def rules() -> list[Rule]:
    form = (
        r"      - alert: (\w+)\n        expr: (.+)\n(?:        for: (\w+)\n)?"
        r"        labels: \{severity: (critical|warning|info)\}\n"
        r"        annotations: \{summary: \"(.+)\"\}\n"
    )
    found = [Rule(*one) for one in re.findall(form, RULES)]
    assert len(found) == RULES.count("- alert:")
    return found


def test_document_lists_every_metric() -> None:
    """The table has each metric with its type and labels, and no other."""
    rows = re.findall(rf"^\| `({PREFIX}\w+)` \| (\w+) \| ([\w, ]*?) ?\| .+ \|$", MONITORING, re.MULTILINE)
    documented = {name: Known(kind, frozenset(filter(None, labels.split(", ")))) for name, kind, labels in rows}
    assert len(rows) == len(documented) > 20
    assert documented == METRICS


def test_dashboard_shows_every_metric() -> None:
    """Each exposed metric is on a panel."""
    shown = {name for panel in panels() for target in panel["targets"] for name, _, _ in used(target["expr"])}
    assert shown == set(METRICS)


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_panels_query_existing_metrics(panel: Mapping[str, Any]) -> None:
    """A panel uses existing metrics and labels, its legend uses kept labels, and it has a description."""
    for target in panel["targets"]:
        check(target["expr"])
        legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert legend <= grouped(target["expr"]) | {"instance"}
    assert panel["description"]
    assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    assert panel["datasource"]["uid"] == "${datasource}"


def test_panels_do_not_overlap_and_variables_exist() -> None:
    """Every panel has its own place and id, and every used `$variable` is defined."""
    places = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) <= variables | {"__rate_interval", "__all"}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.name)
def test_alerts_query_existing_metrics(rule: Rule) -> None:
    """An alert uses existing metrics and labels, and its summary uses kept labels."""
    check(rule.expression)
    left = grouped(rule.expression) or {label for name, _, _ in used(rule.expression) for label in METRICS[name].labels}
    assert set(re.findall(r"\$labels\.(\w+)", rule.summary)) <= left | {"instance"}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.name)
def test_every_alert_has_a_runbook(rule: Rule) -> None:
    """A runbook has the alert's name, severity and expression, its meaning, and the actions."""
    page = RUNBOOKS.partition(f"\n### {rule.name}\n")[2].partition("\n##")[0]
    wait = f", after {rule.wait}" if rule.wait else ""
    assert f"\n{rule.severity.capitalize()}{wait}:\n" in page
    assert f"```promql\n{rule.expression}\n```" in page
    for part in ("Means", "Look", "Do"):
        assert re.search(rf"^- {part}: \S.{{20,}}", page, re.MULTILINE)


def test_every_runbook_has_an_alert() -> None:
    """Each runbook belongs to an alert, and no two alerts have the same name."""
    headings = re.findall(r"^### (UnstractWire\w+)$", RUNBOOKS, re.MULTILINE)
    assert headings == [rule.name for rule in rules()]
    assert len(headings) == len(set(headings)) > 10


def test_documents_name_existing_commands_events_and_alerts() -> None:
    """Each command, event and alert that a page names exists."""
    pages = MONITORING + RUNBOOKS
    commands = set(re.findall(r"`unstract-wire ([a-z-]+)", pages))
    assert {"doctor", "top", "dead", "queues"} <= commands <= set(main.commands)
    events = re.findall(r"^\| `(\w+)` \| [A-Z]", MONITORING, re.MULTILINE)
    deserving = MONITORING.partition("\n## Events that deserve an alert")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \| ", deserving, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(named) > 5
    assert set(named) <= set(events)
    assert set(re.findall(r"`(UnstractWire\w+)`", pages)) <= {rule.name for rule in rules()}
