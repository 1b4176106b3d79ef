"""`python -m chaos` injects faults without pause, and exits with 0 only if the ledger holds.

    python -m chaos                          every fault once, over PostgreSQL and then over RabbitMQ.
    python -m chaos --seed N                 the same schedule again.
    python -m chaos --transport amqp         over one transport only.
    python -m chaos --soak                   round after round, for half an hour (or --seconds).

Both servers are private: the run starts them and removes them afterwards. See docs/chaos.md.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from chaos.environments import Environment, postgres_environment, rabbitmq_environment, unavailable_reason
from chaos.ledger import build_ledger
from chaos.planted_bugs import PLANTED_BUGS
from chaos.report import summary, table
from chaos.run import run
from chaos.schedule import FAULT_KINDS, TransportName, schedule

SOAK = 1800.0
_TRANSPORTS: tuple[TransportName, ...] = ("postgresql", "amqp")
_CANNOT = 2


def say(text: str = "") -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the result, and return the exit code.

    Returns:
        0 if every ledger holds, 1 if one does not, 2 if a required server is not installed.
    """
    options = _options(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    say(f"seed {seed}")
    wanted = _TRANSPORTS if options.transport == "both" else (options.transport,)
    possible = []
    for transport in wanted:
        if missing := unavailable_reason(transport):
            say(f"skipped {transport}: {missing}")
        else:
            possible.append(transport)
    if not possible or (len(possible) < len(wanted) and os.environ.get("UNSTRACT_WIRE_REQUIRE_SERVICES") == "1"):
        return _CANNOT
    total = (options.seconds or SOAK) if options.soak else (options.seconds or 0.0)
    held = [_over(transport, seed, total / len(possible), options) for transport in possible]
    only = f" --only {','.join(options.only)}" if options.only else ""
    soak = " --soak" if options.soak else ""
    seconds = f" --seconds {options.seconds:g}" if options.seconds else ""
    say(f"seed {seed}: python -m chaos --seed {seed} --transport {options.transport}{soak}{seconds}{only}")
    return 0 if all(held) else 1


def _over(transport: TransportName, seed: int, seconds: float, options: argparse.Namespace) -> bool:
    planned = schedule(seed, transport, seconds=seconds, only=options.only)
    if not planned:
        say(f"{transport}: none of these faults applies to it")
        return True
    say(f"\n{transport}: {len(planned)} faults")
    for number, one in enumerate(planned, 1):
        say(f"{number:3} {one}")
    opened: AbstractContextManager[Environment] = (
        postgres_environment() if transport == "postgresql" else rabbitmq_environment()
    )
    directory = Path(tempfile.mkdtemp(prefix="wire-chaos-"))
    with opened as environment:
        evidence = run(environment, planned, directory, say, plant=options.plant)
    ledger = build_ledger(evidence)
    say()
    for line in [*table(evidence, ledger), "", *summary(evidence, ledger)]:
        say(line)
    if ledger.holds and not options.keep:
        shutil.rmtree(directory, ignore_errors=True)
    else:
        say(f"journals and logs are kept in {directory}")
    return ledger.holds


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m chaos", description="Inject faults without pause, and account for every dispatch."
    )
    parser.add_argument("--seed", type=int, help="seed of the schedule (default: random; it is printed)")
    parser.add_argument("--seconds", type=float, help="seconds of faults, in whole rounds (default: one round)")
    parser.add_argument("--transport", choices=[*_TRANSPORTS, "both"], default="both")
    parser.add_argument("--soak", action="store_true", help=f"round after round, for {SOAK:g} s or --seconds")
    parser.add_argument("--only", type=_kinds, default=(), help="only these kinds of faults, separated by commas")
    parser.add_argument("--keep", action="store_true", help="keep the journals and logs even if the ledger holds")
    parser.add_argument(
        "--plant", choices=list(PLANTED_BUGS), help="plant a bug in the workers, which the ledger must find"
    )
    return parser.parse_args(arguments)


def _kinds(text: str) -> tuple[str, ...]:
    names, known = tuple(text.split(",")), {kind.name for kind in FAULT_KINDS}
    if unknown := set(names) - known:
        raise argparse.ArgumentTypeError(
            f"no such fault: {', '.join(sorted(unknown))}; choose from {', '.join(sorted(known))}"
        )
    return names


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that everything is cleaned up
    sys.exit(main())
