"""Faults of bodies: each hurts its own call alone, and that says what it was."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import bodies, faulty
from harness.faults import fault
from harness.processes import (
    Background,
    Mailbox,
    Slot,
    Word,
    program,
    survivors,
    wait_status,
)
from isolated_tasks.errors import ChildLostError, UnpicklableError
from isolated_tasks.process import pickling
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.options import CallOptions
from isolated_tasks.process.protocol import Stop
from isolated_tasks.process.supervisor import StoppedError, TimeIsUpError

MakeSlot = Callable[..., Slot]


def lose(slot: Slot, body: Callable[..., object], *args: object) -> ChildLostError:
    with pytest.raises(ChildLostError) as caught:
        slot.run(body, *args)
    assert caught.value.started
    return caught.value


def run(slot: Slot, options: CallOptions, function: Callable[..., Any], *args: Any) -> Any:
    pickled = pickling.dumps((function, args, {}))
    return slot.children.call(pickled, slot.options, lambda: slot.address, options).result()


# ── deaths ──────────────────────────────────────────────────────────────────────────────────────


@fault(1)
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE"])
def test_a_crash_in_c_is_named_and_shows_the_frames_of_the_body(either: Slot, name: str) -> None:
    error = lose(either, faulty.crash, name)

    assert (error.signal, error.exit_code) == (name, -signal.Signals[name])
    assert re.search(r'faulty\.py", line \d+ in crash\n', error.crash_traceback)
    assert error.crash_traceback in str(error)


@fault(1)
def test_a_crash_in_a_thread_of_the_body_shows_the_frames_of_all_threads(either: Slot) -> None:
    error = lose(either, faulty.crash_in_a_thread, "SIGSEGV")

    assert error.signal == "SIGSEGV"
    for function in ("crash", "crash_in_a_thread"):
        assert f" in {function}\n" in error.crash_traceback


@fault(2)
def test_of_a_kill_from_outside_is_said_what_is_known_and_no_more(
    either: Slot, mailbox: Mailbox, word: Word
) -> None:
    with Background(either.run, bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        os.kill(pid, signal.SIGKILL)

        with pytest.raises(ChildLostError) as caught:
            call.result()

    error = caught.value
    assert (error.pid, error.signal, error.crash_traceback) == (pid, "SIGKILL", "")
    assert not error.oom_killed
    assert re.findall("[a-z]+ by the kernel's out-of-memory", str(error)) == [
        "possibly by the kernel's out-of-memory"
    ]


@fault(3)
def test_a_body_that_exits_in_c_is_lost(either: Slot) -> None:
    error = lose(either, faulty.exit_in_c, 0)

    assert (error.exit_code, error.signal) == (0, None)


# ── bodies that do not end ──────────────────────────────────────────────────────────────────────


@fault(6)
def test_an_endless_loop_in_c_is_ended_by_the_hard_limit(either: Slot, mailbox: Mailbox) -> None:
    limits = CallOptions("test", "id", soft_time_limit=0.05, time_limit=0.1)

    with pytest.raises(TimeIsUpError):
        run(either, limits, faulty.compute_in_c_timed, mailbox.path)

    assert survivors(mailbox.read()) == set()


@fault(7)
def test_a_body_that_minds_neither_signals_nor_exceptions_is_killed(
    either: Slot, mailbox: Mailbox
) -> None:
    limits = CallOptions("test", "id", soft_time_limit=0.05, time_limit=0.1)

    with pytest.raises(TimeIsUpError):
        run(either, limits, faulty.mind_nothing, mailbox.path)

    assert survivors(mailbox.read()) == set()


@fault(7)
def test_an_exit_hook_that_ignores_the_alarm_is_ended_by_the_next_call(
    make_slot: MakeSlot, mailbox: Mailbox
) -> None:
    slot = make_slot(exit_timeout=0.1)
    assert slot.run(bodies.register, faulty.ignore_the_alarm_and_stay, mailbox.path)
    (pid,) = mailbox.read()

    assert slot.run(os.getpid) != pid

    assert survivors([pid], timeout=0) == set()


@fault(10)
def test_a_body_that_somebody_has_stopped_can_be_ended(
    make_slot: MakeSlot, forkserver: Launcher, mailbox: Mailbox, word: Word, start_method: str
) -> None:
    slot = make_slot(start_method=start_method, term_grace=0.05)
    # The forkserver of all remembers whom it was asked to stop.
    call_id = f"stopped-{start_method}"
    named = CallOptions("test", "id", call_id=call_id)
    with Background(run, slot, named, bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        os.kill(pid, signal.SIGSTOP)
        wait_status(pid, psutil.STATUS_STOPPED)
        forkserver.stop_call(Stop(call_id, signal.SIGTERM, "revoked"))

        with pytest.raises(StoppedError):
            call.result()

    assert survivors([pid]) == set()


@fault(10)
def test_a_body_that_has_stopped_is_ended_by_its_limit(either: Slot, mailbox: Mailbox) -> None:
    limits = CallOptions("test", "id", time_limit=0.1)

    with pytest.raises(TimeIsUpError):
        run(either, limits, bodies.hang_timed, mailbox.path, "stopped")

    assert survivors(mailbox.read()) == set()


# ── recursion ───────────────────────────────────────────────────────────────────────────────────


@fault(8)
def test_endless_recursion_is_an_exception_of_the_body(either: Slot) -> None:
    with pytest.raises(RecursionError) as caught:
        either.run(faulty.recurse)

    assert caught.traceback[-1].name == "recurse"
    # Of a thousand frames the two ends come along.
    assert 50 < len(caught.traceback) < 300


@fault(8)
def test_an_overflow_of_the_stack_is_a_crash_that_shows_where(either: Slot) -> None:
    error = lose(either, faulty.overflow_the_stack)

    assert error.signal == "SIGSEGV"
    assert " in deeper\n" in error.crash_traceback


@fault(8)
@pytest.mark.parametrize(
    ("body", "args"),
    [(faulty.return_endless, ()), (faulty.return_nested, (100_000,))],
    ids=["reduce", "lists"],
)
def test_a_result_that_is_nested_too_deeply_is_named(
    either: Slot, body: Callable[..., object], args: tuple[object, ...]
) -> None:
    with pytest.raises(UnpicklableError, match="nested too deeply"):
        either.run(body, *args)


@fault(8)
def test_an_exception_that_is_nested_without_end_keeps_its_text(either: Slot) -> None:
    with pytest.raises(Exception, match="text") as caught:
        either.run(faulty.fail_endlessly)

    assert "EndlessError" in f"{type(caught.value).__name__} {caught.value}"


# ── the end of the process ──────────────────────────────────────────────────────────────────────


@fault(9)
def test_a_thread_that_never_ends_is_cut_while_the_result_stands(
    make_slot: MakeSlot, start_method: str, caplog: pytest.LogCaptureFixture
) -> None:
    slot = make_slot(start_method=start_method, exit_timeout=0.1)

    assert slot.run(faulty.leave_a_thread_for_ever) == "started"
    slot.close()

    assert "was killed by SIGALRM after its last outcome" in caplog.text


@fault(9)
def test_what_would_crash_when_it_is_collected_is_not(
    either: Slot, caplog: pytest.LogCaptureFixture
) -> None:
    assert either.run(faulty.keep_what_crashes) == "kept"
    either.close()

    assert caplog.text == ""


@fault(9)
def test_a_crash_in_what_the_body_drops_is_one_of_the_body(either: Slot) -> None:
    error = lose(either, faulty.drop_what_crashes)

    assert error.signal == "SIGSEGV"
    assert " in __del__\n" in error.crash_traceback


# ── descriptors ─────────────────────────────────────────────────────────────────────────────────


@fault(12)
@pytest.mark.parametrize(
    ("batch_size", "by"),
    [(1, "/dev/null"), (1, "a program"), (1, "a socket"), (3, "/dev/null"), (3, "a socket")],
)
def test_a_body_that_replaces_our_descriptors_is_lost(
    make_slot: MakeSlot, start_method: str, by: str, batch_size: int
) -> None:
    # With a socket that blocks, a batch waits for its next call for ever; until it is killed.
    slot = make_slot(
        start_method=start_method,
        batch_size=batch_size,
        batch_idle_timeout=0.1,
        exit_timeout=1,
    )

    with pytest.raises(ChildLostError) as caught:
        slot.run(faulty.replace_all_descriptors, by)

    is_told = "closed the socket that its outcome would have come by" in str(caught.value)
    assert is_told == ((batch_size, by) == (3, "a socket"))


@fault(12)
def test_what_a_body_writes_into_our_descriptors_is_no_result(either: Slot) -> None:
    # Its call socket, its lifeline, which is a pipe's other end, and its crash file.
    with pytest.raises(Exception, match=r"not a frame|was killed by SIGKILL"):
        either.run(faulty.write_into_all_descriptors)


@fault(12)
def test_a_body_that_has_closed_its_lifeline_goes_with_its_requester(
    forkserver: Launcher, mailbox: Mailbox, start_method: str
) -> None:
    how = ("without descriptors", f"--{start_method}")
    with program("harness.requester", forkserver.address, mailbox.path, *how) as requester:
        pids = mailbox.read()

        requester.kill()

        assert survivors(pids) == set()


# ── what a process is ───────────────────────────────────────────────────────────────────────────


@fault(13)
def test_what_a_body_changes_in_its_process_is_not_there_for_the_next_one(
    either: Slot, tmp_path: Path
) -> None:
    before = either.run(faulty.surroundings)

    changed = either.run(faulty.change_surroundings, str(tmp_path))

    # Or this would prove nothing.
    assert [name for name in before if before[name] == changed[name]] == []
    assert either.run(faulty.surroundings) == before
