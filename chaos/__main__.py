"""`python -m chaos`: faults without pause, a ledger at the end, and exit code 0 only where it holds.

    python -m chaos                          every fault once, over PostgreSQL and then over RabbitMQ
    python -m chaos --seed N                 the same schedule again
    python -m chaos --transport amqp         over one of them alone
    python -m chaos --soak                   round after round, for half an hour (or --seconds)

Both servers are private ones, started here and gone afterwards. docs/chaos.md says what is done and counted.
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
    """Run, print, and return the exit code: 0 where every ledger holds, 1 where one does not, 2 where none can be."""
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
        say(f"{transport}: none of these faults is for it")
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
    parser = argparse.ArgumentParser(prog="python -m chaos", description="Faults without pause, and a ledger.")
    parser.add_argument("--seed", type=int, help="of the schedule; a random one unless given, and printed")
    parser.add_argument("--seconds", type=float, help="of faults in whole rounds; one round unless given")
    parser.add_argument("--transport", choices=[*_TRANSPORTS, "both"], default="both")
    parser.add_argument(
        "--soak", action="store_true", help=f"round after round, for {SOAK:g} s unless --seconds is given"
    )
    parser.add_argument("--only", type=_kinds, default=(), help="these kinds of faults alone, with commas")
    parser.add_argument("--keep", action="store_true", help="keep the journals and logs also where the ledger holds")
    parser.add_argument(
        "--plant", choices=list(PLANTED_BUGS), help="plant a bug in the workers, which the ledger must find"
    )
    return parser.parse_args(arguments)


def _kinds(text: str) -> tuple[str, ...]:
    names, known = tuple(text.split(",")), {kind.name for kind in FAULT_KINDS}
    if unknown := set(names) - known:
        raise argparse.ArgumentTypeError(
            f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
        )
    return names


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # nothing is left behind
    sys.exit(main())
