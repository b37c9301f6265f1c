"""A forkserver with a memory budget: who starts, who waits, who never can."""

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import bodies
from harness.processes import (
    INTERRUPTS,
    KILL_TIME,
    PATIENCE,
    Background,
    Interrupted,
    Mailbox,
    Slot,
    Word,
    settle,
    survivors,
    wait_connected,
    wait_gone,
    wait_status,
)
from isolated_tasks.errors import ChildLostError, ForkserverError, OptionError
from isolated_tasks.process import protocol
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.options import ProcessOptions
from isolated_tasks.process.supervisor import Supervisor

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]
#: A slot whose children may have this many MiB.
SlotWith = Callable[..., Slot]

MIB = 1 << 20

#: What a forkserver holds for one who waits: the connection, and what came with the request.
REQUEST = 1 + protocol.SPAWN_DESCRIPTORS


@pytest.fixture
def launcher(new_launcher: NewLauncher) -> Launcher:
    return new_launcher(preload=["harness.bodies"], memory_budget_bytes=1000 * MIB)


@pytest.fixture
def slot_with(launcher: Launcher, make_slot: MakeSlot) -> SlotWith:
    def make(mebibytes: int | None, **options: Any) -> Slot:
        limit = None if mebibytes is None else mebibytes * MIB
        return make_slot(address=launcher.address, memory_limit_bytes=limit, **options)

    return make


def descriptors(launcher: Launcher) -> int:
    """How many the forkserver holds, once it has come to rest."""
    settle(launcher)
    (pid,) = launcher.pids()
    return len(os.listdir(f"/proc/{pid}/fd"))


def ends(call: Background) -> bool:
    """Whether the call ends, without anything being done about it."""
    tick = threading.Event()
    for _ in range(int(KILL_TIME / 0.01)):
        if not call.is_running:
            return True
        tick.wait(0.01)
    return False


# ── who waits ───────────────────────────────────────────────────────────────────────────────────


def test_a_child_for_which_there_is_no_room_waits_and_the_log_says_so(
    slot_with: SlotWith, mailbox: Mailbox, word: Word, waits: "queue.Queue[str]"
) -> None:
    body = (bodies.report_and_wait, mailbox.path, word.path)
    first, second = slot_with(600), slot_with(500, name="tasks.second")
    with Background(first.run, *body) as one:
        (pid,) = mailbox.read()
        with Background(second.run, *body) as two:
            line = waits.get(timeout=PATIENCE)
            word.give("first")
            assert one.result() == (pid, "first")
            (other,) = mailbox.read()
            word.give("second")
            assert two.result() == (other, "second")

    assert line == "tasks.second[] waits for memory: needs 500 MiB, 600 of 1000 MiB are taken"


def test_children_that_fit_run_at_a_time(
    slot_with: SlotWith, tmp_path: Path, waits: "queue.Queue[str]"
) -> None:
    os.mkfifo(tmp_path / "fifo")
    slots = [slot_with(500), slot_with(500)]
    body = (bodies.meet, str(tmp_path / "fifo"))

    # Neither ends before the other one has begun.
    with Background(slots[0].run, *body, 0) as one, Background(slots[1].run, *body, 1) as two:
        assert one.result() != two.result()
    assert waits.empty()


def test_one_without_a_limit_never_waits(
    slot_with: SlotWith, mailbox: Mailbox, word: Word, waits: "queue.Queue[str]"
) -> None:
    holder = slot_with(1000)
    with Background(holder.run, bodies.report_and_wait, mailbox.path, word.path):
        mailbox.read()

        assert slot_with(None).run(abs, -1) == 1
        assert waits.empty()
        word.give()


def test_nobody_is_overtaken(
    *,
    slot_with: SlotWith,
    mailbox: Mailbox,
    word: Word,
    waits: "queue.Queue[str]",
    tmp_path: Path,
) -> None:
    traces = tmp_path / "traces"
    holder, large, small = slot_with(600), slot_with(950, name="large"), slot_with(100)
    with Background(holder.run, bodies.report_and_wait, mailbox.path, word.path):
        mailbox.read()
        with Background(large.run, bodies.append, str(traces), "large"):
            assert "large" in waits.get(timeout=PATIENCE)
            # There would be room for it.
            with Background(small.run, bodies.append, str(traces), "small"):
                assert "needs 100 MiB, 600 of" in waits.get(timeout=PATIENCE)
                assert not traces.exists()
                word.give()

    assert traces.read_text() == "large\nsmall\n"


def test_there_are_never_more_children_than_fit(slot_with: SlotWith) -> None:
    slots = [slot_with(400) for _ in range(4)]

    def several(slot: Slot) -> list[int]:
        return [slot.run(bodies.siblings) for _ in range(8)]

    with contextlib.ExitStack() as stack:
        calls = [stack.enter_context(Background(several, slot)) for slot in slots]
        counts = [count for call in calls for count in call.result()]

    assert len(counts) == 32
    assert set(counts) <= {1, 2}


def test_the_time_to_start_does_not_run_while_a_child_waits(
    slot_with: SlotWith, mailbox: Mailbox, word: Word, waits: "queue.Queue[str]"
) -> None:
    holder, patient = slot_with(600), slot_with(600, start_timeout=2)
    with Background(holder.run, bodies.report_and_wait, mailbox.path, word.path):
        pids = mailbox.read()
        with Background(patient.run, abs, -1) as call:
            waits.get(timeout=PATIENCE)
            # Longer than it may take to start.
            assert survivors(pids, timeout=2.2) == set(pids)
            assert call.is_running
            word.give()

            assert call.result() == 1


# ── who makes room ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ending", ["returns", "raises", "crashes", "exits"])
def test_a_child_gives_its_share_back_however_it_ends(
    slot_with: SlotWith, mailbox: Mailbox, ending: str
) -> None:
    slot = slot_with(1000)

    for _ in range(2):
        with contextlib.suppress(ChildLostError, LookupError):
            slot.run(bodies.leave_behind, mailbox.path, "in the group", ending)
        mailbox.read()

    assert slot.run(abs, -1) == 1


def test_a_child_that_could_not_be_started_gives_its_share_back(
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    module = """
from isolated_tasks.process import system
def fork():
    raise BlockingIOError(11, "Resource temporarily unavailable")
system.fork = fork
"""
    (tmp_path / "sterile.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["sterile"], memory_budget_bytes=1000 * MIB, serves=False)
    options = {"memory_limit_bytes": 1000 * MIB, "start_timeout": 0.1}
    slot = make_slot(address=launcher.address, **options)

    for _ in range(2):
        with pytest.raises(ForkserverError, match="Resource temporarily unavailable"):
            slot.run(abs, -1)


def test_a_batch_holds_its_share_between_two_calls(
    slot_with: SlotWith, waits: "queue.Queue[str]"
) -> None:
    batch = slot_with(600, batch_size=3, batch_idle_timeout=1000)
    pid = batch.run(os.getpid)

    with Background(slot_with(500).run, abs, -1) as call:
        waits.get(timeout=PATIENCE)
        # It need not ask again.
        assert batch.run(os.getpid) == pid
        assert call.is_running
        batch.close()

        assert call.result() == 1


def test_a_requester_that_does_not_wait_any_longer_makes_room(
    *,
    launcher: Launcher,
    slot_with: SlotWith,
    mailbox: Mailbox,
    word: Word,
    waits: "queue.Queue[str]",
) -> None:
    holder, small = slot_with(600), slot_with(100)
    with Background(holder.run, bodies.report_and_wait, mailbox.path, word.path):
        mailbox.read()
        before = descriptors(launcher)
        gone = Supervisor(launcher.address, ProcessOptions("gone", memory_limit_bytes=900 * MIB))
        assert descriptors(launcher) == before + REQUEST
        with Background(small.run, abs, -1) as call:
            waits.get(timeout=PATIENCE)
            gone.close()

            assert call.result() == 1
        small.close()
        assert descriptors(launcher) == before
        word.give()


def test_a_requester_that_is_gone_before_it_is_told_to_wait_harms_nobody(
    *, launcher: Launcher, slot_with: SlotWith, mailbox: Mailbox, word: Word
) -> None:
    (forkserver,) = launcher.pids()
    holder = slot_with(600)
    with Background(holder.run, bodies.report_and_wait, mailbox.path, word.path):
        mailbox.read()
        os.kill(forkserver, signal.SIGSTOP)
        wait_status(forkserver, psutil.STATUS_STOPPED)
        Supervisor(launcher.address, ProcessOptions("gone", memory_limit_bytes=900 * MIB)).close()
        os.kill(forkserver, signal.SIGCONT)

        assert slot_with(100).run(abs, -1) == 1
        word.give()
    launcher.check()
    assert launcher.pids() == [forkserver]


@INTERRUPTS
def test_an_exception_that_ends_the_wait_makes_room(
    *,
    launcher: Launcher,
    slot_with: SlotWith,
    mailbox: Mailbox,
    word: Word,
    interrupt: Callable[[], None],
    tmp_path: Path,
) -> None:
    traces = tmp_path / "traces"
    holder = slot_with(600)

    def wait_and_interrupt() -> None:
        # Not for the line in the log: what is raised while it is written is lost in there.
        for _ in range(1000):
            if descriptors(launcher) == before + REQUEST:
                break
        interrupt()

    with Background(holder.run, bodies.report_and_wait, mailbox.path, word.path):
        mailbox.read()
        before = descriptors(launcher)
        with Background(wait_and_interrupt), pytest.raises(Interrupted):
            slot_with(900).run(bodies.append, str(traces), "begun")

        assert slot_with(100).run(abs, -1) == 1
        word.give()
    assert slot_with(1000).run(abs, -1) == 1
    assert not traces.exists()


# ── who never can ───────────────────────────────────────────────────────────────────────────────


def test_a_child_that_can_never_fit_is_refused_at_once_and_the_error_says_what_there_is(
    slot_with: SlotWith, mailbox: Mailbox, word: Word
) -> None:
    holder = slot_with(1000)
    with Background(holder.run, bodies.report_and_wait, mailbox.path, word.path):
        mailbox.read()

        with pytest.raises(OptionError) as caught:
            slot_with(1001, name="tasks.huge").run(abs, -1)
        word.give()

    error = caught.value
    assert (error.task, error.option) == ("tasks.huge", "memory_limit")
    assert error.value == repr(1001 * MIB)
    assert str(1000 * MIB) in str(error)
    assert slot_with(1000).run(abs, -1) == 1


# ── when the forkserver goes ────────────────────────────────────────────────────────────────────


def replace(launcher: Launcher) -> None:
    """Kill the forkserver, of which one child runs, and start the next one."""
    (pid,) = launcher.pids()
    os.kill(pid, signal.SIGKILL)
    wait_gone([pid])
    # The requester of the child waits for the next one.
    wait_connected(launcher.address)
    launcher.check()
    launcher.wait_loaded(PATIENCE)


def test_a_child_of_a_dead_forkserver_counts_with_the_next_one(
    *,
    launcher: Launcher,
    slot_with: SlotWith,
    mailbox: Mailbox,
    word: Word,
    waits: "queue.Queue[str]",
) -> None:
    holder = slot_with(600)
    with Background(holder.run, bodies.report_and_wait, mailbox.path, word.path) as running:
        (pid,) = mailbox.read()
        # More than once: the next one may die too.
        for _ in range(2):
            replace(launcher)
        with Background(slot_with(500).run, os.getpid) as call:
            assert "600 of 1000 MiB are taken" in waits.get(timeout=PATIENCE)
            assert survivors([pid], timeout=0) == {pid}
            word.give("done")

            assert running.result() == (pid, "done")
            holder.close()
            assert call.result() != pid
    assert slot_with(1000).run(abs, -1) == 1


def test_who_waits_for_a_forkserver_that_dies_asks_the_next_one(
    *,
    launcher: Launcher,
    slot_with: SlotWith,
    mailbox: Mailbox,
    word: Word,
    waits: "queue.Queue[str]",
) -> None:
    holder = slot_with(600)
    with Background(holder.run, bodies.report_and_wait, mailbox.path, word.path) as running:
        (pid,) = mailbox.read()
        with Background(slot_with(500).run, os.getpid) as call:
            waits.get(timeout=PATIENCE)
            (forkserver,) = launcher.pids()
            os.kill(forkserver, signal.SIGKILL)
            wait_gone([forkserver])
            # Both of them.
            wait_connected(launcher.address, more_than=2)
            launcher.check()
            word.give("done")

            assert running.result() == (pid, "done")
            holder.close()
            assert call.result() != pid


def test_a_child_of_a_dead_forkserver_gives_its_share_back_when_it_ends(
    *,
    launcher: Launcher,
    slot_with: SlotWith,
    mailbox: Mailbox,
    word: Word,
    waits: "queue.Queue[str]",
) -> None:
    # Nobody calls it any more, and so nobody looks at it when it has gone.
    holder = slot_with(600, batch_size=2, batch_idle_timeout=0.01)
    with Background(holder.run, bodies.report_and_wait, mailbox.path, word.path):
        (pid,) = mailbox.read()
        replace(launcher)
        word.give()
    wait_gone([pid])
    with Background(slot_with(500).run, abs, -1) as call:
        ended = ends(call)
        holder.close()

    assert ended
