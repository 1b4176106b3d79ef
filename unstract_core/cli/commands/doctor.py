"""`unstract-wire doctor`: checks this installation and its transport, and prints a remedy for each problem.

This module checks whether transports can be found. A transport with diagnostics checks itself.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast

import attrs
import click

import unstract_core
from unstract_core.cli.context import CliContext, common, json_option
from unstract_core.cli.process_exit import DECLINED
from unstract_core.cli.render.output import print_json, printable, write
from unstract_core.discovery import GROUP
from unstract_core.errors import ContractError
from unstract_core.observability.diagnostics import Finding, SupportsDiagnostics
from unstract_core.transport import DeadLetters, Inspection, Transport
from unstract_core.values import error_text

_NAMESPACE = "transports"
_COLOURS = {"ok": "green", "warning": "yellow", "error": "red", "skipped": "bright_black"}


@click.command()
@json_option
@common()
@click.pass_obj
def doctor(cli: CliContext, as_json: bool) -> None:
    """Check installation and transport, and say how to fix problems.

    Checks the import path, the connection, the tables and leftover rows, and changes nothing. The exit code is 1 if
    there is an error, and 0 if there are only warnings.
    """
    findings = []
    for finding in _findings(cli):
        masked = attrs.evolve(finding, what=cli.mask(finding.what), remedy=cli.mask(finding.remedy))
        findings.append(masked)
        if not as_json:
            write(_lines(masked))
    if as_json:
        print_json([attrs.asdict(finding) for finding in findings])
    else:
        counts = {level: sum(finding.level == level for finding in findings) for level in _COLOURS}
        write("\n" + ", ".join(f"{count} {level}" for level, count in counts.items() if count))
    if any(finding.level == "error" for finding in findings):
        raise click.exceptions.Exit(DECLINED)


def _lines(finding: Finding) -> str:
    level = click.style(f"{finding.level:8}", fg=_COLOURS[finding.level])
    lines = [f"{level} {finding.name:14} {printable(finding.what)}"]
    if finding.remedy:
        lines.append(f"{'':23} -> {printable(finding.remedy)}")
    return "\n".join(lines)


def _findings(cli: CliContext) -> Iterator[Finding]:
    yield _import_path()
    scheme = cli.url.partition("://")[0].lower() if "://" in cli.url else ""
    yield from _entry_points(scheme)
    with contextlib.ExitStack() as stack:
        try:
            transport = stack.enter_context(cli.transport())
        except ContractError as exc:
            yield Finding("transport", "error", str(exc), "give a URL that can be loaded, or fix the errors above")
            return
        yield Finding("transport", "ok", f"{cli.url} is a {type(transport).__name__}")
        if callable(getattr(transport, "check_up", None)):
            yield from cast(SupportsDiagnostics, transport).check_up()
        else:
            yield _reach(transport)
            yield Finding("everything else", "skipped", "not applicable: this transport has no diagnostics of its own")


def _import_path() -> Finding:
    """Find packages called `transports` that hide ours, as a regular package hides a namespace package."""
    ours = Path(unstract_core.__file__).resolve().parents[1]
    beside: list[tuple[str, str]] = []
    hiding: list[tuple[str, str]] = []
    for entry in dict.fromkeys(sys.path):
        spec = PathFinder.find_spec(_NAMESPACE, [entry])
        if spec is None or spec.origin is None:  # a namespace package hides no other
            continue
        (beside if Path(spec.origin).resolve().parents[1] == ours else hiding).append((spec.origin, entry))
    if hiding:
        origin, entry = hiding[0]
        remedy = f"uninstall it, rename it, or remove {Path(entry).absolute()} from the import path (PYTHONPATH)"
        return Finding("import path", "error", f"a foreign {origin} hides the transports of this package", remedy)
    if beside:
        what = f"{beside[0][0]} belongs to another package in the same directory: both can be imported"
        return Finding("import path", "ok", what)
    if not (ours / _NAMESPACE / "memory").is_dir():
        return Finding("import path", "error", f"there is no {_NAMESPACE} in {ours}", "install unstract-wire again")
    return Finding("import path", "ok", f"{_NAMESPACE} is found in {ours}, and nothing hides it")


def _entry_points(scheme: str) -> Iterator[Finding]:
    """Load the provider of each URL scheme. If it fails, this is an error for the scheme in use, else a warning."""
    providers: defaultdict[str, list[EntryPoint]] = defaultdict(list)
    for entry in entry_points(group=GROUP):
        if entry.value not in [other.value for other in providers[entry.name]]:
            providers[entry.name].append(entry)
    if not providers:
        yield Finding(
            "entry points",
            "error",
            f"no package provides {GROUP}",
            "install unstract-wire as a package, not only its files",
        )
    loaded, missing = [], []
    for name, entries in sorted(providers.items()):
        if len(entries) > 1:
            names = " and ".join(f"{_provider(entry)} ({entry.value})" for entry in entries)
            remedy = "uninstall all but one; the last one found is used"
            yield Finding("entry points", "warning", f"{name}:// is provided by {names}", remedy)
        problem = _problem(entries[-1])
        if problem is None:
            loaded.append(f"{name} ({_provider(entries[-1])})")
        elif isinstance(problem, ModuleNotFoundError) and not _is_own(problem, entries[-1]):
            missing.append(f"{name} needs {problem.name}")
        else:
            what = f"{name}:// of {_provider(entries[-1])} is broken: {error_text(problem)}"
            remedy = f"fix or uninstall {_provider(entries[-1])}"
            yield Finding("entry points", "error" if name == scheme else "warning", what, remedy)
    if loaded:
        yield Finding("entry points", "ok", ", ".join(loaded))
    if missing:
        remedy = "if you need it, install the extra: pip install 'unstract-wire[all]'"
        yield Finding("entry points", "skipped", f"not installed: {', '.join(missing)}", remedy)


def _provider(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"


def _problem(entry: EntryPoint) -> Exception | SystemExit | None:
    try:
        entry.load()
    except (Exception, SystemExit) as exc:
        return exc
    return None


def _is_own(problem: ModuleNotFoundError, entry: EntryPoint) -> bool:
    """Whether the missing module belongs to the provider itself, and not to a dependency."""
    return (problem.name or "").partition(".")[0] == entry.module.partition(".")[0]


def _reach(transport: Transport) -> Finding:
    """Check the connection by a call that changes nothing, if the transport has one."""
    source: Any = transport
    try:
        if transport.capabilities.inspection:
            cast(Inspection, source).queues([])
        elif transport.capabilities.dead_letters:
            cast(DeadLetters, source.dead).find(queue=f"unstract-wire-doctor-{secrets.token_hex(8)}", limit=1)
        else:
            return Finding("connection", "skipped", "not applicable: no call of this transport is free of side effects")
    except ContractError as exc:
        return Finding("connection", "error", str(exc), "check that it is running and that the URL is right")
    return Finding("connection", "ok", "it answers")
