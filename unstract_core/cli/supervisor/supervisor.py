"""The parent of a supervised worker: it keeps each place filled with a child, and ends them all together.

It imports neither the app nor a driver, and holds no message, so its end loses none. One thread does everything here,
woken by signals and by reports of children; `health` is for any thread. All children are started side by side. Until
one has subscribed, the first alone reports an error that no restart fixes, and that ends the supervisor too. A child
that comes near a limit works on while another prepares, and that one takes over when the child leaves.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from unstract_core.cli.health_server import Health
from unstract_core.cli.process_exit import FAILED
from unstract_core.cli.supervisor.child import Order, Report, Role
from unstract_core.cli.supervisor.worker_process import Slot
from unstract_core.observability.log_events import emit

logger = logging.getLogger("unstract_wire.supervisor")

KILLED = 128 + signal.SIGKILL
_LONGEST_WAIT = 5.0
_TO_BE_REAPED = 5.0
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_ASKED_TO = {0, *(code for number in _STOPPING for code in (-number, 128 + number))}


class Supervisor:
    """Runs `command` in `processes` children until SIGTERM or SIGINT.

    Args:
        command: The command of a child, with its arguments.
        environment: The environment of a child.
        processes: How many places there are.
        grace: Seconds that all children together have to leave after the first signal.
        silence: Seconds without a report after which a child is reported as silent, and seconds of leaving after which
            a child is reported as slow.
        forget: Called with the pid of each child that has ended.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        processes: int,
        grace: float,
        silence: float,
        forget: Callable[[int], None] = lambda pid: None,
    ) -> None:
        self._command = command
        self._environment = environment
        self._grace = grace
        self._silence = silence
        self._forget = forget
        self._slots = [Slot(number) for number in range(1, processes + 1)]
        self._ever_started = False
        self._asked: list[int] = []
        self._told = 0
        self._kill_at: float | None = None
        self._killed = 0
        self._deaths = 0
        self._code: int | None = None
        self._leaving: list[Slot] = []

    def run(self) -> int:
        """Supervise, and return the exit code.

        0 when all children have left by themselves, 1 when one died meanwhile, 137 when some had to be killed, 128 + N
        after a second signal, and that of the first child (2) where it has found that nothing can work.
        """
        began = time.monotonic()
        emit(
            logger,
            logging.INFO,
            "supervisor_started",
            processes=len(self._slots),
            grace=self._grace,
            pid=os.getpid(),
        )
        with self._pipes() as selector:
            while (code := self._ended()) is None:
                self._start_what_is_due()
                self._wait(selector)
                self._obey()
                self._reap()
                self._look()
            self._kill_all()
        seconds = round(time.monotonic() - began, 3)
        emit(logger, logging.INFO, "supervisor_stopped", seconds=seconds, killed=self._killed, exit=code)
        return code

    def health(self) -> Health:
        """Return how the children are: healthy when each lives, was heard of lately, and none dies again and again."""
        reasons, children = [], []
        now = time.monotonic()
        if self._kill_at is not None:
            reasons.append("the worker stops")
        for slot in self._all():
            process, state = slot.process, slot.state
            if state == "dead" and slot in self._slots:
                reasons.append(f"child {slot.number} has died and is started again")
            if state == "silent":
                reasons.append(f"child {slot.number} has not been heard of for {now - slot.heard_at:.0f} s")
            if slot.backoff.looping and slot not in self._leaving:
                spare = "the spare of " if slot.is_spare else ""
                reasons.append(f"{spare}child {slot.number} has died {slot.backoff.deaths} times in a row")
            leaving = 0.0 if slot.leaves is None or process is None else now - slot.left_at
            if leaving >= self._silence and slot in self._slots:
                reasons.append(
                    f"child {slot.number} has taken no messages for {leaving:.0f} s: it leaves, and so does the one"
                    " before it; does a task hang? Give --task-deadline"
                )
            child = {"slot": slot.number, "state": state, "deaths": slot.backoff.deaths, "away": slot.away}
            if leaving:
                child["leaving"] = round(leaving, 1)
            if process is not None:
                child |= {"pid": process.pid, "heard": round(now - slot.heard_at, 1), "lived": round(slot.lived, 1)}
            children.append(child)
        return Health(reasons, {"children": children})

    def _ended(self) -> int | None:
        if self._code is not None:
            return self._code
        if self._kill_at is None or any(slot.process for slot in self._all()):
            return None
        return KILLED if self._killed else int(self._deaths > 0)

    def _start_what_is_due(self) -> None:
        if self._kill_at is not None:
            return
        for slot in self._slots:
            wanted = slot.process is not None and slot.wants_spare and slot.spare is None
            if wanted and self._leaver(slot.number) is None:
                slot.spare = Slot(slot.number, start_at=slot.start_at, is_spare=True)
        for slot in self._all():
            if slot.process is not None or slot.start_at > time.monotonic():
                continue
            first = not self._ever_started
            share = (slot.number - 1) / len(self._slots) if first else 0.0
            try:
                slot.start(
                    self._command,
                    self._environment,
                    Role(first, silent=first and slot.number > 1, spare=slot.is_spare, share=share),
                )
            except OSError as exc:
                self._died(slot, type(exc).__name__, None)

    def _all(self) -> list[Slot]:
        """Return what is in the places, the processes that prepare to follow, and those that leave."""
        spares = [slot.spare for slot in self._slots if slot.spare is not None]
        return [*self._slots, *spares, *self._leaving]

    def _leaver(self, number: int) -> Slot | None:
        """Return the process that has left a place to another one, and has not ended."""
        return next((slot for slot in self._leaving if slot.number == number), None)

    def _hand_over(self, slot: Slot) -> None:
        """Give the place of a process that leaves to the one that has prepared to follow, or to a new one at once.

        While an earlier process still leaves this place, the place stays with the process that has it. That ends when
        one of the two has ended: tasks that hang would otherwise add a process at each limit.
        """
        if slot not in self._slots or self._kill_at is not None:
            return
        if slot.process is not None and self._leaver(slot.number) is not None:
            return
        follower = slot.spare or Slot(slot.number, slot.backoff)
        self._slots[self._slots.index(slot)] = follower
        slot.spare = None
        if follower.backoff is not slot.backoff:
            slot.backoff.join(follower.backoff)
            follower.backoff = slot.backoff
        follower.start_at = max(follower.start_at, slot.start_at)
        if slot.process is not None:
            self._leaving.append(slot)
        if follower.is_spare:
            follower.is_spare = False
            follower.order(Order.TAKE_OVER)

    def _wait(self, selector: selectors.BaseSelector) -> None:
        """Wait for a report, a signal or the next moment at which something is due."""
        moments = [time.monotonic() + _LONGEST_WAIT]
        if self._kill_at is not None:
            moments.append(self._kill_at)
        else:
            moments += [slot.start_at for slot in self._all() if slot.process is None]
        moments += [slot.heard_at + self._silence for slot in self._all() if slot.process and not slot.silent]
        with contextlib.ExitStack() as stack:
            for slot in self._all():
                if slot.process is not None and not slot.deaf:
                    selector.register(slot.reports, selectors.EVENT_READ)
                    stack.callback(selector.unregister, slot.reports)
            for key, _ in selector.select(max(0.0, min(moments) - time.monotonic())):
                if key.data is self:
                    os.read(key.fd, 4096)

    def _obey(self) -> None:
        """Do what signals have asked for: the first ends all children in good order, the second at once."""
        asked = self._asked[self._told :]
        self._told += len(asked)
        if asked and self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace
            name = signal.Signals(asked[0]).name
            emit(logger, logging.INFO, "supervisor_stopping", signal=name, grace=self._grace)
            for slot in self._all():
                slot.stop()
            asked = asked[1:]
        if asked:
            self._code = 128 + asked[0]
        elif self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill_all()

    def _reap(self) -> None:
        for slot in self._all():
            if slot.process is None:
                continue
            status = slot.process.poll()
            for report in slot.hear():
                self._heard(slot, report)
            if status is not None:
                pid = slot.process.pid
                self._left(slot, pid, status)
                with contextlib.suppress(Exception):  # metrics are no reason to lose a worker, nor to be silent of it
                    self._forget(pid)
        if sys.platform == "linux":
            self._reap_orphans()

    def _reap_orphans(self) -> None:
        """Let go of ended processes that are not ours: they fall to us where we are the first of a container.

        Ours are the children, and in our own process group what a library has started here.
        """
        ours = {slot.process.pid for slot in self._all() if slot.process is not None}
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in ours or os.getpgid(ended.si_pid) == os.getpgrp():
                    return  # other code waits for it; the next round sees to what is behind it
                os.waitpid(ended.si_pid, 0)

    def _heard(self, slot: Slot, report: Report) -> None:
        if slot.process is None:
            return
        if slot.silent:
            slot.silent = False
            emit(logger, logging.INFO, "child_heard_again", slot=slot.number, pid=slot.process.pid)
        if report is Report.STARTED:
            slot.started_at = time.monotonic()
            self._note_start()
            emit(logger, logging.INFO, "child_started", slot=slot.number, pid=slot.process.pid)
        elif report.leaves:
            if slot.leaves is None:
                slot.left_at = time.monotonic()
            slot.leaves = report if report is Report.OVERDUE else slot.leaves or report
            self._hand_over(slot)
        elif report is Report.SOON:
            slot.wants_spare = True
        elif report is Report.UNNEEDED:
            slot.wants_spare = False
            self._dismiss_spare(slot)
        elif report is Report.READY:
            slot.ready_at = time.monotonic()
        else:
            slot.away = report is Report.AWAY

    def _dismiss_spare(self, slot: Slot) -> None:
        """Stop the process that prepares to follow another one, which goes on for longer than it seemed."""
        spare, slot.spare = slot.spare, None
        if spare is not None and spare.process is not None:
            spare.leaves, spare.left_at = Report.UNNEEDED, time.monotonic()
            self._leaving.append(spare)
            spare.stop()

    def _note_start(self) -> None:
        """Note that a child has started: what others could not do is a crash from now on."""
        self._ever_started = True
        for slot in self._slots:
            if slot.refused:
                slot.refused = False
                self._died(slot, FAILED, None)

    def _left(self, slot: Slot, pid: int, status: int) -> None:
        """Let go of a child that has ended, and see to its place."""
        died, stopping = self._died_of_itself(slot, status), self._kill_at is not None
        lived, why = slot.lived, slot.leaves
        if died or why is Report.OVERDUE:
            slot.end_group()
        slot.close()
        had_left = slot in self._leaving
        if had_left:
            self._leaving.remove(slot)
            place = self._slots[slot.number - 1]
            if place.leaves is not None and place.process is not None:
                self._hand_over(place)
        if not stopping and not self._ever_started and status == FAILED:
            if slot.number == 1:
                self._code = status
            else:
                slot.refused, slot.start_at = True, math.inf
        elif died:
            self._died(slot, _named(status), pid, lived, had_left=had_left)
            if slot.spare is not None:
                self._hand_over(slot)
        elif not stopping and why is Report.UNNEEDED:
            emit(logger, logging.INFO, "spare_stopped", slot=slot.number, pid=pid)
        elif not stopping and why is not None:
            reason = why.name.lower()
            emit(
                logger, logging.INFO, "child_recycled", slot=slot.number, pid=pid, reason=reason, lived=round(lived, 1)
            )

    def _died_of_itself(self, slot: Slot, status: int) -> bool:
        """Whether a child has ended otherwise than it says, or is asked to: by SIGTERM, where it had not begun."""
        if self._kill_at is None and slot.leaves is not Report.UNNEEDED:
            return status != 0 or slot.leaves is None
        return status not in _ASKED_TO

    def _died(self, slot: Slot, how: str | int, pid: int | None, lived: float = 0.0, *, had_left: bool = False) -> None:
        """Log a death, and put off the next start. A process that `had_left` its place does not end a row of deaths."""
        told = {"slot": slot.number, "pid": pid, "exit": how, "lived": round(lived, 1)}
        if slot.is_spare:
            told["spare"] = True
        if self._kill_at is not None:
            self._deaths += 1
            emit(logger, logging.WARNING, "child_died", **told)
            return
        was_looping = slot.backoff.looping
        pause = slot.backoff.died(0.0 if had_left else slot.well_for)
        slot.start_at = time.monotonic() + pause
        if not had_left:
            told["restart_in"] = pause
        emit(logger, logging.WARNING, "child_died", **told)
        if slot.backoff.looping and not was_looping:
            spare = {"spare": True} if slot.is_spare else {}
            emit(logger, logging.ERROR, "crash_loop", slot=slot.number, deaths=slot.backoff.deaths, exit=how, **spare)

    def _look(self) -> None:
        """Report who has fallen silent, and who lives after all."""
        for slot in self._all():
            if slot.process is None:
                continue
            was_looping = slot.backoff.looping
            if slot not in self._leaving:  # one that hangs there would hide that the next ones die
                slot.backoff.lives(slot.well_for)
            if was_looping and not slot.backoff.looping:
                emit(logger, logging.INFO, "crash_loop_over", slot=slot.number, pid=slot.process.pid)
            silent_for = time.monotonic() - slot.heard_at
            if silent_for >= self._silence and not slot.silent:
                slot.silent = True
                seconds = round(silent_for, 1)
                emit(logger, logging.ERROR, "child_silent", slot=slot.number, pid=slot.process.pid, seconds=seconds)
            leaving = 0.0 if slot.leaves is None else time.monotonic() - slot.left_at
            if leaving >= self._grace and slot.leaves is Report.UNNEEDED:
                slot.signal(signal.SIGKILL)  # it holds no message, and its place must not wait for it
            if leaving >= self._silence and not slot.late:
                slot.late = True
                seconds = round(leaving, 1)
                emit(
                    logger,
                    logging.WARNING,
                    "child_still_leaving",
                    slot=slot.number,
                    pid=slot.process.pid,
                    seconds=seconds,
                )

    def _kill_all(self) -> None:
        """Kill what is left, and wait for it to be gone."""
        left = [slot for slot in self._all() if slot.process is not None]
        for slot in left:
            if slot.process is not None and slot.process.poll() is None:
                if self._ever_started or self._code != FAILED:  # else none could work, and that was reported
                    self._killed += 1
                    emit(logger, logging.WARNING, "child_killed", slot=slot.number, pid=slot.process.pid)
                slot.signal(signal.SIGKILL)
        deadline = time.monotonic() + _TO_BE_REAPED
        for slot in left:
            if slot.process is not None:
                with contextlib.suppress(Exception):  # in an uninterruptible sleep, which no signal ends
                    slot.process.wait(max(0.0, deadline - time.monotonic()))
                slot.close()

    @contextlib.contextmanager
    def _pipes(self) -> Iterator[selectors.BaseSelector]:
        """Be woken by signals for as long as the block runs."""
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            woken, bell = os.pipe()
            for end in (woken, bell):
                stack.callback(os.close, end)
                os.set_blocking(end, False)
            selector.register(woken, selectors.EVENT_READ, self)
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(bell, warn_on_full_buffer=False))
            for number in _STOPPING:
                stack.callback(signal.signal, number, signal.signal(number, lambda n, _: self._asked.append(n)))
            stack.callback(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, lambda *_: None))
            yield selector


def _named(status: int) -> str | int:
    """Return the exit code, or the name of the signal that has ended a process."""
    try:
        return signal.Signals(-status).name if status < 0 else status
    except ValueError:
        return f"signal {-status}"
