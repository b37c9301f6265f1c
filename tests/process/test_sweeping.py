"""What a body leaves behind goes with its process, wherever it has hidden."""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import bodies
from harness.processes import (
    PATIENCE,
    Background,
    Mailbox,
    Slot,
    Word,
    settle,
    survivors,
    wait_gone,
)
from isolated_tasks.errors import ChildLostError
from isolated_tasks.process import pickling
from isolated_tasks.process.child import ExitCode
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.options import CallOptions, ProcessOptions
from isolated_tasks.process.supervisor import Supervisor, TimeIsUpError

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]


@pytest.mark.fault(25, 26)
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
@pytest.mark.parametrize("how", bodies.LEFT)
def test_what_a_body_leaves_when_it_returns_goes(
    make_slot: MakeSlot, mailbox: Mailbox, how: str, start_method: str
) -> None:
    slot = make_slot(start_method=start_method)

    slot.run(bodies.leave_behind, mailbox.path, how, "returns")

    assert survivors(mailbox.read()) == set()
    assert slot.run(abs, -1) == 1


@pytest.mark.fault(25, 26)
@pytest.mark.parametrize("ending", ["crashes", "is killed", "exits"])
@pytest.mark.parametrize("how", bodies.LEFT)
def test_what_a_lost_child_leaves_goes(slot: Slot, mailbox: Mailbox, how: str, ending: str) -> None:
    with pytest.raises(ChildLostError):
        slot.run(bodies.leave_behind, mailbox.path, how, ending)

    assert survivors(mailbox.read()) == set()


@pytest.mark.fault(25, 26)
@pytest.mark.parametrize("how", bodies.LEFT)
def test_what_a_body_leaves_when_it_raises_goes(slot: Slot, mailbox: Mailbox, how: str) -> None:
    with pytest.raises(LookupError):
        slot.run(bodies.leave_behind, mailbox.path, how, "raises")

    assert survivors(mailbox.read()) == set()


@pytest.mark.fault(25, 26)
@pytest.mark.parametrize("how", bodies.LEFT)
def test_what_the_calls_of_a_batch_leave_goes_with_their_process(
    make_slot: MakeSlot, mailbox: Mailbox, how: str
) -> None:
    slot = make_slot(batch_size=3)

    pids = [slot.run(bodies.leave_behind, mailbox.path, how, "returns") for _ in range(2)]

    assert len({slot.run(os.getpid), *pids}) == 3
    assert survivors([*mailbox.read(), *mailbox.read()]) == set()


@pytest.mark.parametrize("how", bodies.LEFT)
def test_what_a_batch_leaves_goes_when_nobody_calls_any_more(
    make_slot: MakeSlot, mailbox: Mailbox, how: str
) -> None:
    slot = make_slot(batch_size=3, batch_idle_timeout=1000)
    slot.run(bodies.leave_behind, mailbox.path, how, "returns")
    pids = mailbox.read()

    slot.close()

    assert survivors(pids) == set()


@pytest.mark.parametrize("how", bodies.LEFT)
def test_what_is_left_goes_though_its_requester_is_still_there(
    forkserver: Launcher, mailbox: Mailbox, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = Supervisor(forkserver.address, ProcessOptions("test"))
    pickled = pickling.dumps((bodies.leave_behind, (mailbox.path, how, "returns"), {}))

    supervisor.call(pickled).result()

    # The lifeline, which would end those of the group, is not cut.
    assert supervisor.wait_exited(PATIENCE)
    assert supervisor.exit_code == ExitCode.LEFT_PROCESSES
    assert survivors(mailbox.read()) == set()
    supervisor.close()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_body_that_leaves_nothing_is_done(forkserver: Launcher) -> None:
    supervisor = Supervisor(forkserver.address, ProcessOptions("test"))
    # It has had processes of its own, and has waited for them.
    supervisor.call(pickling.dumps((bodies.use_the_standard_library, (), {}))).result()

    assert supervisor.wait_exited(PATIENCE)
    assert supervisor.exit_code == ExitCode.DONE
    supervisor.close()


@pytest.mark.fault(26)
def test_what_is_left_by_a_body_that_exits_goes_while_another_child_lives(
    make_slot: MakeSlot, mailbox: Mailbox
) -> None:
    make_slot(batch_size=3, batch_idle_timeout=1000).run(abs, -1)

    with pytest.raises(ChildLostError):
        make_slot().run(bodies.leave_behind, mailbox.path, "as a daemon", "exits")

    left = survivors(mailbox.read(), timeout=1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == set()


def test_another_child_and_its_processes_are_not_swept_up(
    make_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    slot = make_slot()
    with Background(slot.run, bodies.leave_behind_and_wait, mailbox.path, word.path) as call:
        pids = mailbox.read()

        make_slot().run(bodies.leave_behind, mailbox.path, "as a daemon", "returns")

        assert survivors(mailbox.read()) == set()
        assert survivors(pids, timeout=0) == set(pids)
        word.give("well")
        assert call.result()[1] == "well"
    assert survivors(pids) == set()


# ── what is to live ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def keep() -> Iterator[list[int]]:
    """Pids of processes that are to live; ended after the test."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_gone(pids)


@pytest.mark.fault(26)
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
@pytest.mark.parametrize("how", bodies.LEFT)
@pytest.mark.parametrize("ending", ["returns", "raises"])
def test_what_a_body_leaves_lives_on_where_that_is_wanted(
    *,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    keep: list[int],
    how: str,
    ending: str,
    start_method: str,
) -> None:
    slot = make_slot(keep_children=True, start_method=start_method)
    with contextlib.suppress(LookupError):
        slot.run(bodies.leave_behind, mailbox.path, how, ending)
    keep += mailbox.read()
    slot.close()

    # Others come and go, and are swept up.
    make_slot().run(bodies.leave_behind, mailbox.path, how, "returns")

    assert survivors(mailbox.read()) == set()
    assert survivors(keep, timeout=0) == set(keep)


@pytest.mark.parametrize("ending", ["crashes", "is killed", "exits"])
def test_a_daemon_outlives_the_crash_of_its_child_where_that_is_wanted(
    make_slot: MakeSlot, mailbox: Mailbox, keep: list[int], ending: str
) -> None:
    slot = make_slot(keep_children=True)
    with pytest.raises(ChildLostError):
        slot.run(bodies.leave_behind, mailbox.path, "as a daemon", ending)
    keep += mailbox.read()

    make_slot().run(bodies.leave_behind, mailbox.path, "as a daemon", "returns")

    assert survivors(mailbox.read()) == set()
    assert survivors(keep, timeout=0) == set(keep)


def test_what_is_kept_does_not_end_a_batch(
    make_slot: MakeSlot, mailbox: Mailbox, keep: list[int]
) -> None:
    slot = make_slot(keep_children=True, batch_size=3)

    pids = [slot.run(bodies.leave_behind, mailbox.path, "as a daemon", "returns") for _ in range(3)]
    for _ in pids:
        keep += mailbox.read()

    assert len(set(pids)) == 1
    wait_gone(pids)
    assert survivors(keep, timeout=0) == set(keep)


def test_what_is_kept_outlives_the_forkserver(
    new_launcher: NewLauncher, make_slot: MakeSlot, mailbox: Mailbox, keep: list[int]
) -> None:
    launcher = new_launcher(preload=["harness.bodies"])
    slot = make_slot(address=launcher.address, keep_children=True)
    slot.run(bodies.leave_behind, mailbox.path, "as a daemon", "returns")
    keep += mailbox.read()
    slot.close()

    launcher.stop()

    assert survivors(keep, timeout=0) == set(keep)


def test_what_is_kept_may_leave_a_daemon_itself_when_the_child_has_long_ended(
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    keep: list[int],
) -> None:
    launcher = new_launcher(preload=["harness.bodies"])
    slot = make_slot(address=launcher.address, keep_children=True)
    # What it waits for comes when its parent, which ran the body, has long ended.
    daemon = f"setsid sh -c 'echo [$$] >{mailbox.path}; exec sleep 1000'"
    child, shell = slot.run(bodies.leave_a_shell, f"read word <{word.path}; {daemon} &")
    slot.close()
    wait_gone([child])

    word.give("go\n")
    keep += mailbox.read()
    wait_gone([shell])
    settle(launcher)
    # Others come and go, and are swept up.
    other = make_slot(address=launcher.address)
    other.run(bodies.leave_behind, mailbox.path, "as a daemon", "returns")

    assert survivors(mailbox.read()) == set()
    assert survivors(keep, timeout=0) == set(keep)


@pytest.mark.fault(26)
def test_a_limit_ends_also_what_would_be_kept(
    make_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    slot = make_slot(keep_children=True, term_grace=0.05)
    pickled = pickling.dumps((bodies.leave_behind_and_wait, (mailbox.path, word.path), {}))
    limits = CallOptions("test", time_limit=0.3)

    with pytest.raises(TimeIsUpError):
        slot.children.call(pickled, slot.options, lambda: slot.address, limits)

    assert survivors(mailbox.read()) == set()


# ── without the forkserver ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def run_without_forkserver(
    new_launcher: NewLauncher, make_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> Callable[..., list[int]]:
    """Runs a body that reports pids, and kills the forkserver before it gives its word."""
    launcher = new_launcher(preload=["harness.bodies"])
    slot = make_slot(address=launcher.address)

    def run(body: Callable[..., object], *args: object) -> list[int]:
        with Background(slot.run, body, mailbox.path, *args, word.path) as call:
            pids: list[int] = mailbox.read()
            (forkserver,) = launcher.pids()
            os.kill(forkserver, signal.SIGKILL)
            wait_gone([forkserver])
            word.give()
            with contextlib.suppress(ChildLostError):
                call.result()
        return pids

    return run


@pytest.mark.fault(26)
@pytest.mark.parametrize("how", bodies.LEFT)
def test_what_a_body_leaves_goes_without_a_forkserver_too(
    run_without_forkserver: Callable[..., list[int]], how: str
) -> None:
    pids = run_without_forkserver(bodies.leave_behind, how, "returns")

    assert survivors(pids) == set()


@pytest.mark.fault(26)
def test_the_group_of_a_lost_child_goes_without_a_forkserver_too(
    run_without_forkserver: Callable[..., list[int]],
) -> None:
    # A program: what is only forked still has the lifeline.
    assert survivors(run_without_forkserver(bodies.leave_a_program)) == set()


# ── a preload's own ─────────────────────────────────────────────────────────────────────────────

#: What a preload starts: it lives until its input ends, and tells its pid.
SERVICE = """
import subprocess, sys
service = subprocess.Popen(
    [sys.executable, "-c", "import sys; sys.stdin.read()"],
    stdin=open({fifo!r}),
    start_new_session={new_session},
)
"""


@pytest.fixture
def end(tmp_path: Path) -> Iterator[Path]:
    """A fifo that whoever reads it finds at its end when the test is over."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # Opened for both, or opening it would wait; closing it is the end.
    descriptor = os.open(fifo, os.O_RDWR)
    yield fifo
    os.close(descriptor)


@pytest.mark.parametrize("new_session", [True, False])
def test_processes_of_a_preload_are_spared(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    end: Path,
    new_session: bool,
) -> None:
    source = SERVICE.format(fifo=str(end), new_session=new_session)
    (tmp_path / "serving.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["serving", "harness.bodies"])
    slot = make_slot(address=launcher.address)
    service: int = slot.run(lambda: __import__("serving").service.pid)

    for ending in ("returns", "crashes"):
        try:
            slot.run(bodies.leave_behind, mailbox.path, "as a daemon", ending)
        except ChildLostError:
            pass
        assert survivors(mailbox.read()) == set()

    assert survivors([service], timeout=0) == {service}
    assert slot.run(abs, -1) == 1
