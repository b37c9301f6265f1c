"""Calls that somebody wants stopped: whichever process made them, wherever they are by then."""

import os
import queue
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import bodies
from harness.processes import (
    KILL_TIME,
    PATIENCE,
    Background,
    Mailbox,
    Slot,
    Word,
    program,
    settle,
    survivors,
    wait_connected,
    wait_gone,
    wait_status,
)
from isolated_tasks.process import pickling
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.options import CallOptions
from isolated_tasks.process.protocol import Stop
from isolated_tasks.process.supervisor import StoppedError

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]

MIB = 1 << 20


@pytest.fixture
def launcher(new_launcher: NewLauncher) -> Launcher:
    return new_launcher(preload=["harness.bodies"], memory_budget_bytes=1000 * MIB)


@pytest.fixture
def new_slot(launcher: Launcher, make_slot: MakeSlot) -> MakeSlot:
    """Slots with as much patience for what is stopped as a test may need."""
    return lambda **options: make_slot(
        **{"address": launcher.address, "term_grace": 1000, **options}
    )


def run(slot: Slot, call_id: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run the function in a child, as a call that can be stopped by this name."""
    pickled = pickling.dumps((function, args, {}))
    options = CallOptions("test", call_id, call_id=call_id)
    return slot.children.call(pickled, slot.options, lambda: slot.address, options).result()


def stop(call_id: str, number: int = signal.SIGTERM) -> Stop:
    return Stop(call_id, number, "revoked")


def bereave(launcher: Launcher) -> None:
    """Kill the forkserver, and see to it that the one child's requester waits for the next."""
    (pid,) = launcher.pids()
    os.kill(pid, signal.SIGKILL)
    wait_gone([pid])
    wait_connected(launcher.address)


def ends(call: Background) -> bool:
    """Whether the call ends, without anything being done about it."""
    tick = threading.Event()
    for _ in range(int(KILL_TIME / 0.01)):
        if not call.is_running:
            return True
        tick.wait(0.01)
    return False


# ── a call that runs ────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(32)
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_call_that_runs_is_stopped_and_its_finally_blocks_run(
    launcher: Launcher, new_slot: MakeSlot, mailbox: Mailbox, batch_size: int, start_method: str
) -> None:
    slot = new_slot(batch_size=batch_size, batch_idle_timeout=1000, start_method=start_method)
    with Background(run, slot, "x", bodies.wait_and_clean_up, mailbox.path) as call:
        pid, _ = mailbox.read()
        launcher.stop_call(stop("x"))

        with pytest.raises(StoppedError, match="revoked"):
            call.result()

    assert mailbox.read() == [pid, "cleaned up"]
    assert survivors([pid], timeout=0) == set()
    assert run(slot, "y", abs, -1) == 1


def test_the_call_of_another_process_is_stopped(launcher: Launcher, mailbox: Mailbox) -> None:
    with program("harness.requester", launcher.address, mailbox.path, "told to end"):
        pid, _ = mailbox.read()
        launcher.stop_call(stop("x"))

        assert mailbox.read() == [pid, "cleaned up"]
        assert mailbox.read() == ["StoppedError"]
        assert survivors([pid], timeout=0) == set()


def test_only_the_call_that_is_named_is_stopped(
    launcher: Launcher, new_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    one, other = new_slot(), new_slot()
    with Background(run, other, "other", bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        with Background(run, one, "one", bodies.wait_and_clean_up, mailbox.path) as stopped:
            mailbox.read()
            for name in ("one", "nobody", "", "on"):
                launcher.stop_call(stop(name))

            with pytest.raises(StoppedError):
                stopped.result()
        settle(launcher)
        word.give("done")

        assert call.result() == (pid, "done")


@pytest.mark.fault(25)
def test_each_rung_is_logged_and_the_last_one_asks_nobody(
    *,
    launcher: Launcher,
    new_slot: MakeSlot,
    mailbox: Mailbox,
    caplog: pytest.LogCaptureFixture,
) -> None:
    slot = new_slot(term_grace=0.05)
    body = (bodies.hang_timed, mailbox.path, "deadlocked in C")
    with Background(run, slot, "x", *body) as call:
        pids = mailbox.read()
        launcher.stop_call(stop("x", signal.SIGINT))

        with pytest.raises(StoppedError):
            call.result()

    assert survivors(pids) == set()
    assert re.findall("x.: child pid=([0-9]+)(.*) gets (SIG[A-Z]+): (.*)", caplog.text) == [
        (str(pids[0]), "", "SIGINT", "revoked"),
        (str(pids[0]), ", with its group,", "SIGTERM", "revoked"),
        (str(pids[0]), ", with its group,", "SIGKILL", "revoked"),
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP])
def test_a_signal_that_ends_a_body_ends_it_once(
    *,
    launcher: Launcher,
    new_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    number: signal.Signals,
) -> None:
    body = (bodies.leave_slowly, mailbox.path, word.path)
    with Background(run, new_slot(), "x", *body) as call:
        mailbox.read()
        launcher.stop_call(stop("x", number))
        reported = mailbox.read()
        # A second request, of whatever kind, is for a body that is on its way.
        launcher.stop_call(stop("x", signal.SIGKILL))
        settle(launcher)
        word.give("in peace")

        assert mailbox.read() == ["cleaned up", "in peace"]
        with pytest.raises(StoppedError):
            call.result()
    # SIGTERM follows at once, and may come while the handler of another one runs.
    assert reported[1] in {-(256 - number), -(256 - signal.SIGTERM)}


def test_a_kill_leaves_no_time(launcher: Launcher, new_slot: MakeSlot, mailbox: Mailbox) -> None:
    with Background(run, new_slot(), "x", bodies.wait_and_clean_up, mailbox.path) as call:
        pid, _ = mailbox.read()
        launcher.stop_call(stop("x", signal.SIGKILL))

        with pytest.raises(StoppedError):
            call.result()

    assert survivors([pid]) == set()
    # Nothing has come since.
    bodies.report(mailbox.path, "the next message")
    assert mailbox.read() == ["the next message"]


# ── a call that does not run yet ────────────────────────────────────────────────────────────────


def test_a_call_that_waits_for_memory_is_stopped_and_makes_room(
    *,
    launcher: Launcher,
    new_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    waits: "queue.Queue[str]",
    tmp_path: Path,
) -> None:
    traces = tmp_path / "traces"
    holder, large, small = (new_slot(memory_limit_bytes=size * MIB) for size in (600, 900, 100))
    with Background(run, holder, "holder", bodies.report_and_wait, mailbox.path, word.path):
        mailbox.read()
        with Background(run, large, "large", bodies.append, str(traces), "begun") as stopped:
            waits.get(timeout=PATIENCE)
            with Background(run, small, "small", abs, -1) as behind:
                waits.get(timeout=PATIENCE)
                launcher.stop_call(stop("large"))

                with pytest.raises(StoppedError):
                    stopped.result()
                assert behind.result() == 1
        word.give()

    assert not traces.exists()


def test_a_call_that_comes_after_the_request_does_not_begin(
    launcher: Launcher, new_slot: MakeSlot, tmp_path: Path
) -> None:
    traces = tmp_path / "traces"
    slot = new_slot()
    launcher.stop_call(stop("x"))
    settle(launcher)

    with pytest.raises(StoppedError):
        run(slot, "x", bodies.append, str(traces), "begun")

    assert not traces.exists()
    assert run(slot, "y", abs, -1) == 1


def test_a_call_whose_process_is_there_and_whose_body_is_not_does_not_begin(
    launcher: Launcher, new_slot: MakeSlot, mailbox: Mailbox, tmp_path: Path
) -> None:
    traces = tmp_path / "traces"
    body = (bodies.begin_after_a_signal, mailbox.path, bodies.append, str(traces), "begun")
    with Background(run, new_slot(), "x", *body) as call:
        mailbox.read()
        launcher.stop_call(stop("x"))

        with pytest.raises(StoppedError):
            call.result()

    assert not traces.exists()


def test_a_call_that_was_sent_to_nobody_yet_is_stopped(
    new_launcher: NewLauncher, make_slot: MakeSlot, tmp_path: Path
) -> None:
    # Asked for while the forkserver still loads.
    traces = tmp_path / "traces"
    launcher = new_launcher(preload=["harness.bodies"], wait=False)
    slot = make_slot(address=launcher.address)
    launcher.stop_call(stop("x"))

    with pytest.raises(StoppedError):
        run(slot, "x", bodies.append, str(traces), "begun")

    assert not traces.exists()


# ── the calls of a batch ────────────────────────────────────────────────────────────────────────


def test_the_second_call_of_a_batch_is_stopped_and_not_the_third(
    launcher: Launcher, new_slot: MakeSlot, mailbox: Mailbox
) -> None:
    slot = new_slot(batch_size=5, batch_idle_timeout=1000)
    first = run(slot, "1", os.getpid)
    with Background(run, slot, "2", bodies.wait_and_clean_up, mailbox.path) as call:
        pid, _ = mailbox.read()
        launcher.stop_call(stop("2"))

        with pytest.raises(StoppedError):
            call.result()

    assert pid == first
    assert mailbox.read() == [pid, "cleaned up"]
    assert run(slot, "3", os.getpid) != pid


def test_a_request_that_comes_between_two_calls_is_for_the_one_that_it_names(
    launcher: Launcher, new_slot: MakeSlot, tmp_path: Path
) -> None:
    traces = tmp_path / "traces"
    slot = new_slot(batch_size=5, batch_idle_timeout=1000)
    pid = run(slot, "1", os.getpid)
    for name in ("1", "3"):
        launcher.stop_call(stop(name))
    settle(launcher)

    assert run(slot, "2", os.getpid) == pid
    with pytest.raises(StoppedError):
        run(slot, "3", bodies.append, str(traces), "begun")
    assert run(slot, "4", os.getpid) == pid
    assert not traces.exists()


def test_a_request_that_comes_while_another_call_runs_is_remembered(
    *, launcher: Launcher, new_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    slot = new_slot(batch_size=5, batch_idle_timeout=1000)
    body = (bodies.report_and_wait, mailbox.path, word.path)
    with Background(run, slot, "1", *body) as call:
        (pid,) = mailbox.read()
        launcher.stop_call(stop("2"))
        settle(launcher)
        word.give("done")

        assert call.result() == (pid, "done")

    with pytest.raises(StoppedError):
        run(slot, "2", abs, -1)
    assert run(slot, "3", abs, -1) == 1


# ── when the forkserver goes ────────────────────────────────────────────────────────────────────


@pytest.mark.fault(39)
@pytest.mark.parametrize("moment", ["while it loads", "when it has loaded"])
def test_the_next_forkserver_knows_whom_to_tell(
    launcher: Launcher, new_slot: MakeSlot, mailbox: Mailbox, moment: str
) -> None:
    with Background(run, new_slot(), "x", bodies.wait_and_clean_up, mailbox.path) as call:
        pid, _ = mailbox.read()
        bereave(launcher)
        launcher.check()
        if moment == "when it has loaded":
            launcher.wait_loaded(PATIENCE)
            settle(launcher)
        launcher.stop_call(stop("x"))

        with pytest.raises(StoppedError):
            call.result()

    assert mailbox.read() == [pid, "cleaned up"]
    assert survivors([pid]) == set()


def test_a_request_waits_for_a_forkserver_that_cannot_be_started_yet(
    *,
    launcher: Launcher,
    new_slot: MakeSlot,
    mailbox: Mailbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with Background(run, new_slot(), "x", bodies.wait_and_clean_up, mailbox.path) as call:
        mailbox.read()
        bereave(launcher)
        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_spawn", refuse)
            assert launcher.check() is not None
        launcher.stop_call(stop("x"))
        monkeypatch.setattr(launcher._places[0], "not_before", 0.0)
        launcher.check()

        with pytest.raises(StoppedError):
            call.result()


def test_a_request_is_not_lost_because_nobody_has_seen_the_forkserver_go(
    launcher: Launcher, new_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    body = (bodies.report_and_wait, mailbox.path, word.path)
    with Background(run, new_slot(), "x", *body) as call:
        mailbox.read()
        bereave(launcher)
        launcher.stop_call(stop("x"))
        launcher.check()
        launcher.wait_loaded(PATIENCE)
        settle(launcher)

        stopped = ends(call)
        if not stopped:
            word.give()
        assert stopped
        with pytest.raises(StoppedError):
            call.result()


def test_a_request_that_a_forkserver_has_not_read_when_it_dies_goes_to_the_next(
    launcher: Launcher, new_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    body = (bodies.report_and_wait, mailbox.path, word.path)
    with Background(run, new_slot(), "x", *body) as call:
        mailbox.read()
        (forkserver,) = launcher.pids()
        os.kill(forkserver, signal.SIGSTOP)
        wait_status(forkserver, psutil.STATUS_STOPPED)
        # It is in its socket.
        launcher.stop_call(stop("x"))
        bereave(launcher)
        launcher.check()
        launcher.wait_loaded(PATIENCE)
        settle(launcher)

        stopped = ends(call)
        if not stopped:
            word.give()
        assert stopped
        with pytest.raises(StoppedError):
            call.result()


@pytest.mark.fault(22)
def test_a_burst_of_requests_from_several_threads_arrives_whole(
    launcher: Launcher, new_slot: MakeSlot, mailbox: Mailbox
) -> None:
    with Background(run, new_slot(), "last", bodies.wait_and_clean_up, mailbox.path) as call:
        mailbox.read()
        # More than the socket takes at a time.
        (forkserver,) = launcher.pids()
        os.kill(forkserver, signal.SIGSTOP)
        wait_status(forkserver, psutil.STATUS_STOPPED)

        def send(part: int) -> None:
            for number in range(1500):
                launcher.stop_call(stop(f"{part}-{number}-{'x' * 100}"))

        with Background(send, 1), Background(send, 2), Background(send, 3):
            pass
        launcher.stop_call(stop("last"))
        os.kill(forkserver, signal.SIGCONT)

        tick = threading.Event()
        while call.is_running and not tick.wait(0.01):
            # As the bootstep does, which is told of the backlog.
            launcher.check()
        with pytest.raises(StoppedError):
            call.result()
    assert launcher.pids() == [forkserver]
