"""A body may start processes of its own, and they run beside each other."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import bodies
from harness.processes import Slot, survivors

MakeSlot = Callable[..., Slot]

METHODS = ["fork", "spawn", "forkserver"]


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    """Two processes meet at its ends: what is not parallel waits for ever."""
    path = str(tmp_path / "meeting")
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_of_the_body_is_parallel(slot: Slot, fifo: str, method: str) -> None:
    assert len(set(slot.run(bodies.meet_in_a_pool, method, fifo))) == 2


@pytest.mark.parametrize("method", METHODS)
def test_an_executor_of_the_body_is_parallel(slot: Slot, fifo: str, method: str) -> None:
    assert len(set(slot.run(bodies.meet_in_an_executor, method, fifo))) == 2


def test_joblib_in_the_body_is_parallel(slot: Slot, fifo: str) -> None:
    pytest.importorskip("joblib")

    assert len(set(slot.run(bodies.meet_in_joblib, fifo))) == 2


@pytest.mark.parametrize("body", [bodies.meet_in_a_pool, bodies.meet_in_an_executor])
def test_a_spawned_child_may_start_processes_too(
    make_slot: MakeSlot, fifo: str, body: Callable[[str, str], list[int]]
) -> None:
    assert len(set(make_slot(start_method="spawn").run(body, "spawn", fifo))) == 2


def test_nothing_of_joblib_stays_in_shared_memory(slot: Slot, fifo: str) -> None:
    pytest.importorskip("joblib")
    pid = slot.run(bodies.tell_pid_after, bodies.meet_in_joblib, fifo)
    slot.close()

    # The names of what joblib and loky make there hold the pid; others may use them beside us.
    assert [name for name in os.listdir("/dev/shm") if str(pid) in re.split(r"\D", name)] == []


def test_processes_that_the_body_has_forgotten_go_with_it(slot: Slot) -> None:
    pids = slot.run(bodies.leave_a_pool)
    slot.close()

    assert len(pids) == 2
    assert survivors(pids) == set()
