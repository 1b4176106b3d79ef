"""Faults over PostgreSQL: of the server, of its connections, and during a settlement."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import psycopg

from chaos import breakpoints
from chaos.environments import PostgresEnvironment
from chaos.evidence import InjectedFault
from chaos.faults import LONGER_THAN_A_LEASE, FaultInjector
from chaos.processes import Process, Processes
from chaos.schedule import PlannedFault

OUTAGE = 20.0
"""Seconds for which the server is stopped."""
_LOCKED = 3
"""The least number of rows that an idle session in a transaction locks."""
_TERMINATE_ACTIVE = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name = %s AND state = 'active' AND backend_type = 'client backend'
"""
_TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = ANY (%s)"
_LOCK = """
    SELECT message -> 'kwargs' ->> 'dispatch' FROM {messages} WHERE message -> 'kwargs' ->> 'dispatch' = ANY (%s)
    FOR UPDATE
"""
_LOCK_SOME = "SELECT message -> 'kwargs' ->> 'dispatch' FROM {messages} LIMIT 20 FOR UPDATE SKIP LOCKED"


class PostgresFaultInjector(FaultInjector):
    def __init__(self, processes: Processes, environment: PostgresEnvironment) -> None:
        super().__init__(processes)
        self.environment = environment

    def kill_settling(self, planned: PlannedFault) -> InjectedFault:
        """Kill a worker whose settlement waits for a lock on the server, and then release the lock."""
        process = self.processes.ready(planned.victims[0])
        with self._settling(process) as touched:
            return self._killed(process, touched)

    def sigstop(self, planned: PlannedFault) -> InjectedFault:
        """Suspend a worker before it settles, until other workers have run its tasks; then let it settle late."""
        process = self.processes.ready(planned.victims[0])
        history = self.processes.history
        with self.stopped_at(process, breakpoints.FINISHED) as there:
            touched, awaited = there | self._claimed_by(process), self._open()
            began, ended = self._suspended(
                process,
                LONGER_THAN_A_LEASE,
                lambda: all(history.of(dispatch, "called") for dispatch in there),
                f"other workers to run the tasks of {process.name}",
            )
        self.processes.require(
            lambda: all(process.name in _processes(history.of(one, "settled")) for one in there),
            f"the late settlements of {process.name} to be answered",
        )
        return attrs.evolve(self.ended_for(began, began, [process], touched), ended=ended, awaited=touched & awaited)

    def backend_killed(self, planned: PlannedFault) -> InjectedFault:
        """Terminate connections in the middle of a statement, one victim after the other."""
        began, victims = time.monotonic(), [self.processes.ready(slot) for slot in planned.victims]
        for victim, gap in zip(victims, planned.gaps, strict=True):
            self.processes.pause(gap)
            self._end_a_statement(victim.name)
        return self.ended_for(began, time.monotonic(), victims, self._open())

    def server_restart(self, planned: PlannedFault) -> InjectedFault:
        return self._outage("fast", 0.0)

    def server_crash(self, planned: PlannedFault) -> InjectedFault:
        return self._outage("immediate", 0.0)

    def server_away(self, planned: PlannedFault) -> InjectedFault:
        return self._outage("fast", OUTAGE)

    def outage_while_settling(self, planned: PlannedFault) -> InjectedFault:
        """Crash the server during a settlement, and start it again after more than a lease."""
        process = self.processes.ready(planned.victims[0])
        with self._settling(process):
            return self._outage("immediate", LONGER_THAN_A_LEASE)

    def pool_exhausted(self, planned: PlannedFault) -> InjectedFault:
        """Take every connection that the server allows, including the victims', for longer than a lease."""
        victims = [self.processes.ready(slot) for slot in planned.victims]
        names = [victim.name for victim in victims]
        control = self.environment.control
        began, touched = time.monotonic(), self._all_claimed_by(victims)
        with contextlib.ExitStack() as idle:
            until = began + 1.0
            while time.monotonic() < until:
                control.execute(_TERMINATE, [names])
                with contextlib.suppress(psycopg.OperationalError):
                    while True:
                        idle.enter_context(contextlib.closing(self.environment.idle_session()))
            touched |= self._all_claimed_by(victims)
            self.processes.pause(LONGER_THAN_A_LEASE)
        hit = self.ended_for(began, time.monotonic(), victims, touched | self._all_claimed_by(victims))
        return attrs.evolve(hit, awaited=self._open())

    def idle_in_transaction(self, planned: PlannedFault) -> InjectedFault:
        """Lock some rows in a session that then stays idle for longer than a lease."""
        with self._locking() as session:
            locked: set[str] = set()

            def enough() -> bool:
                locked.update(row[0] for row in session.execute(self.environment.tables.sql(_LOCK_SOME)))
                return len(locked) >= _LOCKED

            began = time.monotonic()
            self.processes.require(enough, "rows to lock")
            self.processes.pause(LONGER_THAN_A_LEASE)
        return self.ended_for(began, time.monotonic(), [], frozenset(locked))

    @contextlib.contextmanager
    def _settling(self, process: Process) -> Iterator[frozenset[str]]:
        """Hold a lock that the settlement of a process waits for; yield the dispatches that it settles."""
        with self._locking() as session:
            with self.stopped_at(process, breakpoints.FINISHED) as touched:
                session.execute(self.environment.tables.sql(_LOCK), [list(touched)])
            self.processes.require(lambda: self._waits(process.name), f"the settlement of {process.name} to wait")
            yield touched

    @contextlib.contextmanager
    def _locking(self) -> Iterator[psycopg.Connection[Any]]:
        session = self.environment.tables.connect(autocommit=False)
        try:
            yield session
        finally:
            session.close()

    def _outage(self, mode: str, seconds: float) -> InjectedFault:
        began = time.monotonic()
        self.environment.close_control()
        self.environment.server.stop(mode)
        try:
            self.processes.pause(seconds)
        finally:
            self.environment.server.start()
        return self.ended_for_all(began)

    def _all_claimed_by(self, processes: Sequence[Process]) -> frozenset[str]:
        return frozenset[str]().union(*map(self._claimed_by, processes))

    def _end_a_statement(self, name: str) -> None:
        """Terminate the connection on which this process runs its next statement."""
        control = self.environment.control
        self.processes.require(
            lambda: bool(control.execute(_TERMINATE_ACTIVE, [name]).fetchall()), f"a statement of {name}"
        )

    def _waits(self, name: str) -> bool:
        return any(event == "Lock" for _, event, _ in self.environment.tables.backends(name))


def _processes(lines: Any) -> set[str]:
    return {line.process for line in lines}
