"""Older kernels: each feature switched off, its weaker stand-in does the work.

What a forkserver and its children find switched off is switched off by a preload.
"""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import bodies
from harness.processes import (
    INTERRUPTS,
    Background,
    Interrupted,
    Mailbox,
    Slot,
    Word,
    program,
    survivors,
    wait_gone,
)
from isolated_tasks.errors import ChildLostError, ForkserverError, MemoryLimitExceeded
from isolated_tasks.process import system
from isolated_tasks.process.launcher import Launcher

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]
Without = Callable[..., Launcher]


@pytest.fixture
def without(new_launcher: NewLauncher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Without:
    """A forkserver that does not find some features."""
    monkeypatch.syspath_prepend(tmp_path)

    def launch(source: str, **plan: Any) -> Launcher:
        module = f"import os\nfrom isolated_tasks.process import system\n{source}\n"
        (tmp_path / "older_kernel.py").write_text(module)
        launcher = new_launcher(preload=["older_kernel", "harness.bodies"], **plan)
        (loaded,) = launcher.loaded()
        assert not any(entry["error"] for entry in loaded.entries)
        return launcher

    return launch


NO_LIFELINE = "system.arm_lifeline = lambda *_, **__: False"
NO_PIDFD = "system.open_pidfd = lambda pid: None"
NO_FORK = """
def fork():
    raise BlockingIOError(11, "Resource temporarily unavailable")
system.fork = fork
"""
NO_GROUPS = """
from isolated_tasks.process import cgroup
def find():
    raise cgroup.NoPlaceError("switched off")
cgroup.Delegation.find = find
"""
FEATURES = {
    "a lifeline": NO_LIFELINE,
    "pidfds": NO_PIDFD,
    "a count of threads": "system.thread_count = lambda: 1",
    "/proc": "os.listdir = lambda *_: (_ for _ in ()).throw(FileNotFoundError(2, 'none'))",
    "clear_refs": "system.reset_peak_rss = lambda: False",
    "a score for the killer": "system.prefer_for_oom_kill = lambda: None",
    "memfds": "del os.memfd_create",
    "peer credentials": "system.peer_uid = lambda connection: None",
    "control groups": NO_GROUPS,
    "resident memory": "system.rss_bytes = lambda: 0",
}


@pytest.mark.parametrize("source", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_without_one_of_the_features_calls_run_and_lost_children_are_told(
    without: Without, make_slot: MakeSlot, source: str, start_method: str
) -> None:
    slot = make_slot(address=without(source).address, start_method=start_method)

    assert slot.run(bodies.echo, 1) == ((1,), {})
    with pytest.raises(ChildLostError) as caught:
        slot.run(bodies.leave, 3)
    assert caught.value.exit_code == 3
    with pytest.raises(ChildLostError) as caught:
        slot.run(bodies.crash_in_c)
    assert "crash_in_c" in caught.value.crash_traceback


@pytest.mark.fault(38, 42)
def test_a_fork_that_the_system_refuses_is_an_error_that_says_why(
    without: Without, make_slot: MakeSlot
) -> None:
    # As where the limit of processes is reached, which root does not have.
    slot = make_slot(address=without(NO_FORK, serves=False).address, start_timeout=0.2)

    for _ in range(2):
        with pytest.raises(ForkserverError, match="Resource temporarily unavailable") as caught:
            slot.run(abs, -1)
        assert caught.value.errno == errno.EAGAIN

    assert slot.outcome(make_slot(start_method="spawn").options, abs, -1).result() == 1


def test_without_control_groups_memory_limits_are_kept_by_looking(
    without: Without, make_slot: MakeSlot
) -> None:
    launcher = without(NO_GROUPS)
    (loaded,) = launcher.loaded()
    assert loaded.memory_limits == (
        "by looking at processes every 0.02 to 0.2 s (no control groups: switched off)"
    )
    slot = make_slot(address=launcher.address, memory_limit_bytes=256 << 20)

    assert slot.run(abs, -1) == 1
    with pytest.raises(MemoryLimitExceeded) as caught:
        slot.run(exec, "import time; held = bytearray(b'x') * (512 << 20); time.sleep(1000)")
    assert caught.value.peak is not None
    assert caught.value.peak > 256 << 20


# ── the lifeline ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", bodies.HANGING)
def test_without_a_lifeline_the_forkserver_ends_the_child_of_a_dead_requester(
    without: Without, mailbox: Mailbox, how: str
) -> None:
    launcher = without(NO_LIFELINE)
    with program("harness.requester", launcher.address, mailbox.path, how) as requester:
        pids = mailbox.read()

        requester.kill()

        assert survivors(pids) == set()


@pytest.mark.parametrize("source", [NO_LIFELINE, f"{NO_LIFELINE}\n{NO_PIDFD}"])
@INTERRUPTS
def test_without_a_lifeline_an_exception_in_the_wait_kills_the_child(
    *,
    without: Without,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    interrupt: Callable[[], None],
    source: str,
) -> None:
    slot = make_slot(address=without(source).address)
    pids: list[int] = []

    def wait_and_interrupt() -> None:
        pids.extend(mailbox.read())
        interrupt()

    with Background(wait_and_interrupt), pytest.raises(Interrupted):
        slot.run(bodies.hang, mailbox.path, "stuck in C")

    assert survivors(pids) == set()
    assert slot.run(abs, -1) == 1


@pytest.mark.skipif(not system.features()["pidfd_group_signal"], reason="needs Linux 6.9")
@INTERRUPTS
def test_without_lifeline_and_forkserver_the_pidfd_kills_the_group(
    *, without: Without, make_slot: MakeSlot, mailbox: Mailbox, interrupt: Callable[[], None]
) -> None:
    launcher = without(NO_LIFELINE)
    (forkserver,) = launcher.pids()
    slot = make_slot(address=launcher.address)
    pids: list[int] = []

    def wait_and_interrupt() -> None:
        pids.extend(mailbox.read())
        os.kill(forkserver, signal.SIGKILL)
        wait_gone([forkserver])
        interrupt()

    with Background(wait_and_interrupt), pytest.raises(Interrupted):
        slot.run(bodies.hang, mailbox.path, "asleep")

    assert survivors(pids) == set()


# ── pidfds ──────────────────────────────────────────────────────────────────────────────────────


def test_without_pidfds_a_call_outlives_its_forkserver(
    *, without: Without, make_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    launcher = without(NO_PIDFD)
    (forkserver,) = launcher.pids()
    slot = make_slot(address=launcher.address)
    with Background(slot.run, bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        os.kill(forkserver, signal.SIGKILL)
        wait_gone([forkserver])
        word.give("done")

        assert call.result() == (pid, "done")


def test_without_pidfds_and_forkserver_a_lost_child_is_noticed_and_nobody_knows_how_it_ended(
    *,
    without: Without,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launcher = without(NO_PIDFD)
    monkeypatch.setattr(system, "open_pidfd", lambda pid: None)
    (forkserver,) = launcher.pids()
    slot = make_slot(address=launcher.address)
    with Background(slot.run, bodies.report_wait_and_leave, mailbox.path, word.path, 3) as call:
        (pid,) = mailbox.read()
        os.kill(forkserver, signal.SIGKILL)
        wait_gone([forkserver])
        word.give()

        with pytest.raises(ChildLostError) as caught:
            call.result()

    assert caught.value.pid == pid
    assert caught.value.exit_code is None
    assert caught.value.signal is None
    assert "nobody can tell how" in str(caught.value)


# ── here ────────────────────────────────────────────────────────────────────────────────────────


def test_without_memfds_here_crashes_are_told_all_the_same(
    slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")

    with pytest.raises(ChildLostError) as caught:
        slot.run(bodies.crash_in_c)

    assert "crash_in_c" in caught.value.crash_traceback


def test_without_pidfds_here_a_forkserver_is_stopped_all_the_same(
    new_launcher: NewLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = new_launcher()
    pids = launcher.pids()
    monkeypatch.setattr(system, "open_pidfd", lambda pid: None)

    launcher.stop()

    assert survivors(pids, timeout=0) == set()
