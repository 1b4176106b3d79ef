"""The schedule of a chaos run: it depends only on the seed, and has every fault in each round."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.broker_faults import BrokerFaultInjector
from chaos.postgres_faults import PostgresFaultInjector
from chaos.schedule import FAULT_KINDS, SLOTS, TransportName, schedule

TRANSPORTS: tuple[TransportName, ...] = ("postgresql", "amqp")


@given(seed=st.integers(), transport=st.sampled_from(TRANSPORTS), seconds=st.floats(0, 2000))
def test_a_seed_gives_the_same_schedule_again(seed: int, transport: TransportName, seconds: float) -> None:
    """The same seed gives the same order, victims, pauses and frames."""
    assert schedule(seed, transport, seconds=seconds) == schedule(seed, transport, seconds=seconds)


@given(seed=st.integers(), transport=st.sampled_from(TRANSPORTS), seconds=st.floats(0, 2000))
def test_each_round_has_every_fault_once(seed: int, transport: TransportName, seconds: float) -> None:
    """A schedule has whole rounds, at least one, and lasts at least as long as requested."""
    names = {kind.name for kind in FAULT_KINDS if transport in kind.transports}
    planned = schedule(seed, transport, seconds=seconds)
    assert planned
    for start in range(0, len(planned), len(names)):
        assert {one.kind.name for one in planned[start : start + len(names)]} == names
    assert len(planned) % len(names) == 0
    assert sum(one.kind.seconds for one in planned) >= seconds


@given(seed=st.integers(), transport=st.sampled_from(TRANSPORTS))
def test_a_fault_hits_only_allowed_victims(seed: int, transport: TransportName) -> None:
    """Victims are distinct slots of the kind, each with a gap; in the first round every fault waits for a recovery."""
    for one in schedule(seed, transport):
        assert set(one.victims) <= set(one.kind.victims) <= set(SLOTS)
        assert len(set(one.victims)) == len(one.victims)
        assert bool(one.victims) == bool(one.kind.victims)
        assert len(one.gaps) == len(one.victims) + len(one.steps)
        assert one.waits


def test_seeds_give_different_schedules() -> None:
    """A hundred seeds give a hundred different schedules."""
    assert len({tuple(schedule(seed, "postgresql")) for seed in range(100)}) == 100


def test_later_rounds_may_skip_the_recovery() -> None:
    """In a soak, some faults are injected during the recovery from the previous one."""
    assert {one.waits for one in schedule(1, "postgresql", seconds=600)} == {True, False}


@pytest.mark.parametrize(
    ("transport", "faults"), [("postgresql", PostgresFaultInjector), ("amqp", BrokerFaultInjector)]
)
def test_every_kind_has_an_injector(transport: TransportName, faults: type) -> None:
    """The injectors have a method for each kind of fault."""
    for one in schedule(1, transport):
        assert callable(getattr(faults, one.kind.name.replace("-", "_")))
