"""`unstract-wire doctor`: what this installation and its transport stand on, and what to do about what is wrong.

Whether transports can be found at all is looked at here; the rest a transport checks itself, where it can.
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
    """Check what everything stands on, and say what to do.

    Looks at the import path, the connection, the tables, and what has been left lying about; changes nothing. Exits
    with 1 where something is an error, and with 0 where there are warnings at most.
    """
    found = []
    for finding in _findings(cli):
        masked = attrs.evolve(finding, what=cli.mask(finding.what), remedy=cli.mask(finding.remedy))
        found.append(masked)
        if not as_json:
            write(_lines(masked))
    if as_json:
        print_json([attrs.asdict(finding) for finding in found])
    else:
        counts = {level: sum(finding.level == level for finding in found) for level in _COLOURS}
        write("\n" + ", ".join(f"{count} {level}" for level, count in counts.items() if count))
    if any(finding.level == "error" for finding in found):
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
            yield Finding("transport", "error", str(exc), "give a URL that can be loaded, or mend what is told above")
            return
        yield Finding("transport", "ok", f"{cli.url} is a {type(transport).__name__}")
        if callable(getattr(transport, "check_up", None)):
            yield from cast(SupportsDiagnostics, transport).check_up()
        else:
            yield _reach(transport)
            yield Finding("everything else", "skipped", "not applicable: this transport has no check-up of its own")


def _import_path() -> Finding:
    """Look for packages called `transports` that hide ours: a regular package wins over a namespace, in any order."""
    ours = Path(unstract_core.__file__).resolve().parents[1]
    beside: list[tuple[str, str]] = []
    hiding: list[tuple[str, str]] = []
    for entry in dict.fromkeys(sys.path):
        spec = PathFinder.find_spec(_NAMESPACE, [entry])
        if spec is None or spec.origin is None:  # a namespace, which lives with others of its name
            continue
        (beside if Path(spec.origin).resolve().parents[1] == ours else hiding).append((spec.origin, entry))
    if hiding:
        origin, entry = hiding[0]
        remedy = f"uninstall it, rename it, or take {Path(entry).absolute()} off the import path (PYTHONPATH)"
        return Finding("import path", "error", f"a foreign {origin} hides the transports of this package", remedy)
    if beside:
        what = f"{beside[0][0]} is of another package, which lies beside ours: both can be imported"
        return Finding("import path", "ok", what)
    if not (ours / _NAMESPACE / "memory").is_dir():
        return Finding("import path", "error", f"there is no {_NAMESPACE} in {ours}", "install unstract-wire anew")
    return Finding("import path", "ok", f"{_NAMESPACE} is found in {ours}, and nothing hides it")


def _entry_points(scheme: str) -> Iterator[Finding]:
    """Load what each URL scheme leads to. Broken is an error for the scheme in use, and a warning for the others."""
    providers: defaultdict[str, list[EntryPoint]] = defaultdict(list)
    for entry in entry_points(group=GROUP):
        if entry.value not in [other.value for other in providers[entry.name]]:
            providers[entry.name].append(entry)
    if not providers:
        yield Finding("entry points", "error", f"nobody provides {GROUP}", "install unstract-wire, not its files alone")
    good, wanting = [], []
    for name, entries in sorted(providers.items()):
        if len(entries) > 1:
            who = " and ".join(f"{_provider(entry)} ({entry.value})" for entry in entries)
            remedy = "uninstall all but one: the last that is found is used"
            yield Finding("entry points", "warning", f"{name}:// is provided by {who}", remedy)
        problem = _problem(entries[-1])
        if problem is None:
            good.append(f"{name} ({_provider(entries[-1])})")
        elif isinstance(problem, ModuleNotFoundError) and not _is_own(problem, entries[-1]):
            wanting.append(f"{name} needs {problem.name}")
        else:
            what = f"{name}:// of {_provider(entries[-1])} is broken: {error_text(problem)}"
            remedy = f"mend or uninstall {_provider(entries[-1])}"
            yield Finding("entry points", "error" if name == scheme else "warning", what, remedy)
    if good:
        yield Finding("entry points", "ok", ", ".join(good))
    if wanting:
        remedy = "where it is wanted, install the extra: pip install 'unstract-wire[all]'"
        yield Finding("entry points", "skipped", f"not installed: {', '.join(wanting)}", remedy)


def _provider(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"


def _problem(entry: EntryPoint) -> Exception | SystemExit | None:
    try:
        entry.load()
    except (Exception, SystemExit) as exc:
        return exc
    return None


def _is_own(problem: ModuleNotFoundError, entry: EntryPoint) -> bool:
    """Whether what is missing is the provider's own module, and not something that it needs."""
    return (problem.name or "").partition(".")[0] == entry.module.partition(".")[0]


def _reach(transport: Transport) -> Finding:
    """Ask something harmless of a transport, as far as it can be asked anything."""
    about: Any = transport
    try:
        if transport.capabilities.inspection:
            cast(Inspection, about).queues([])
        elif transport.capabilities.dead_letters:
            cast(DeadLetters, about.dead).find(queue=f"unstract-wire-doctor-{secrets.token_hex(8)}", limit=1)
        else:
            return Finding("connection", "skipped", "not applicable: this transport can be asked nothing harmless")
    except ContractError as exc:
        return Finding("connection", "error", str(exc), "is it running, and is the URL right?")
    return Finding("connection", "ok", "it answers")
