"""A child that ends without an outcome: its call fails, says how, and harms nobody else."""

import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import bodies
from harness.processes import PATIENCE, Background, Mailbox, Slot, survivors
from isolated_tasks.errors import ChildLostError, ProtocolError
from isolated_tasks.process import pickling
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.options import ProcessOptions
from isolated_tasks.process.supervisor import Supervisor

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]


def lose(slot: Slot, body: Callable[..., object], *args: object) -> ChildLostError:
    """Run a body that does not come back, and another one that does."""
    with pytest.raises(ChildLostError) as caught:
        slot.run(body, *args)
    assert slot.run(abs, -1) == 1
    return caught.value


# ── how it ended ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(3, 4)
@pytest.mark.parametrize("code", [0, 1, 3, 255])
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_body_that_exits_is_lost_with_its_exit_code(
    make_slot: MakeSlot, start_method: str, code: int
) -> None:
    error = lose(make_slot(start_method=start_method), bodies.leave, code)

    assert (error.exit_code, error.signal) == (code, None)
    assert f"exit code {code}" in str(error)


@pytest.mark.fault(3)
def test_a_body_that_becomes_another_program_is_lost(either: Slot) -> None:
    error = lose(either, bodies.become, "/bin/true")

    assert (error.exit_code, error.signal) == (0, None)


@pytest.mark.fault(1)
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_crash_in_c_is_named_with_the_frames_of_the_body_and_none_of_ours(
    make_slot: MakeSlot, start_method: str
) -> None:
    error = lose(make_slot(start_method=start_method), bodies.crash_in_c)

    assert (error.exit_code, error.signal) == (-signal.SIGSEGV, "SIGSEGV")
    assert re.search(r'bodies\.py", line \d+ in crash_in_c', error.crash_traceback)
    assert "isolated_tasks" not in error.crash_traceback
    assert "SIGSEGV" in str(error)
    assert error.crash_traceback in str(error)


def test_an_abort_is_named(slot: Slot) -> None:
    error = lose(slot, bodies.abort)

    assert error.signal == "SIGABRT"
    assert " in abort" in error.crash_traceback


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGALRM, signal.SIGUSR2, signal.SIGXCPU])
def test_a_signal_is_named_and_leaves_no_crash_traceback(
    slot: Slot, number: signal.Signals
) -> None:
    error = lose(slot, bodies.kill_myself, number)

    assert (error.exit_code, error.signal) == (-number, number.name)
    assert error.crash_traceback == ""


def test_a_realtime_signal_has_a_name_of_its_own(slot: Slot) -> None:
    number = signal.SIGRTMIN + 3

    assert lose(slot, bodies.kill_myself, number).signal == f"signal {number}"


@pytest.mark.fault(2)
def test_of_a_kill_nobody_claims_to_know_the_reason(slot: Slot) -> None:
    assert "possibly" in str(lose(slot, bodies.kill_myself, signal.SIGKILL))


def test_a_child_that_goes_before_the_body_has_begun_has_not_started_it(
    either: Slot,
) -> None:
    error = lose(either, bodies.leave_before_it_begins, 7)

    assert (error.started, error.exit_code) == (False, 7)
    assert "before the body had begun" in str(error)
    assert "worker_process_init" in str(error)
    assert lose(either, bodies.leave, 7).started is True


def test_the_error_says_whose_child_it_was_and_what_it_used(make_slot: MakeSlot) -> None:
    error = lose(make_slot(name="tasks.render"), bodies.hold_and_leave, 200 << 20)

    assert error.task == "tasks.render"
    assert error.started is True
    assert error.pid is not None
    assert error.pid != os.getpid()
    assert error.peak_rss_bytes is not None
    assert 200 << 20 < error.peak_rss_bytes < 400 << 20
    assert error.user_seconds is not None
    assert error.system_seconds is not None
    assert error.user_seconds + error.system_seconds > 0
    for part in ("tasks.render", f"pid={error.pid}", "MiB"):
        assert part in str(error)


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_the_peak_is_the_child_s_own_and_not_the_forkserver_s(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    start_method: str,
) -> None:
    (tmp_path / "greedy.py").write_text("memory = bytearray(b'x') * (300 << 20); del memory")
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["greedy"])
    slot = make_slot(address=launcher.address, start_method=start_method)

    peak = lose(slot, bodies.leave, 0).peak_rss_bytes

    assert peak is not None
    assert 4 << 20 < peak < 150 << 20


# ── when it ended ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(19)
def test_a_child_killed_half_way_through_its_result_is_lost_and_the_bytes_are_told(
    either: Slot,
) -> None:
    error = lose(either, bodies.die_while_sending, 200 << 20)

    assert error.signal == "SIGKILL"
    here, whole = map(int, re.findall(r"\((\d+) of (\d+) bytes\)", str(error))[0])
    assert 0 < here < whole
    assert whole > 200 << 20


@pytest.mark.fault(20)
def test_a_child_that_dies_before_it_has_read_a_large_argument_is_lost(either: Slot) -> None:
    # It is loaded in the child, and that is what kills it, with nothing of the rest loaded.
    class Deadly:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[int]]:
            return bodies.leave, (3,)

    error = lose(either, bodies.echo, Deadly(), bytes(100 << 20))

    assert error.exit_code == 3


@pytest.mark.fault(17)
def test_a_result_that_kills_while_it_is_pickled_is_a_lost_child(either: Slot) -> None:
    class Deadly:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[int]]:
            os._exit(4)

    assert lose(either, lambda: Deadly()).exit_code == 4


@pytest.mark.fault(12)
def test_a_body_that_closes_all_descriptors_is_lost_and_not_waited_for(either: Slot) -> None:
    assert lose(either, bodies.close_all_descriptors).exit_code not in (None, 0)


# ── other processes of the body ─────────────────────────────────────────────────────────────────


@pytest.mark.fault(24, 26)
def test_a_daemon_that_holds_the_call_socket_open_delays_no_verdict_and_goes(
    either: Slot, mailbox: Mailbox
) -> None:
    error = lose(either, bodies.leave_a_daemon, mailbox.path, 3)

    assert error.exit_code == 3
    # It is in a session of its own, and goes all the same.
    assert survivors(mailbox.read()) == set()


def test_grandchildren_go_with_their_child(forkserver: Launcher) -> None:
    supervisor = Supervisor(forkserver.address, ProcessOptions("test"))
    pids = supervisor.call(pickling.dumps((bodies.leave_grandchildren, (), {}))).result()

    # Its lifeline, which would end them too, is not cut before.
    assert supervisor.wait_exited(PATIENCE)
    assert survivors(pids) == set()

    supervisor.close()


@pytest.mark.fault(11)
@pytest.mark.parametrize("body", [bodies.fork_and_both_return, bodies.fork_and_the_copy_raises])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_copy_of_the_child_that_comes_back_into_our_code_says_nothing_and_ends(
    make_slot: MakeSlot, body: Callable[[], tuple[str, int]], batch_size: int, start_method: str
) -> None:
    slot = make_slot(batch_size=batch_size, start_method=start_method)

    assert slot.run(body) == ("original", 0)
    assert slot.run(body) == ("original", 0)


# ── noise ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(12, 23)
def test_garbage_on_stdout_and_stderr_is_no_outcome(either: Slot) -> None:
    assert either.run(bodies.write_garbage) == "fine"


@pytest.mark.fault(12)
def test_garbage_on_the_call_socket_fails_its_own_call(either: Slot) -> None:
    with pytest.raises(ChildLostError, match="sent what is not a message") as caught:
        either.run(bodies.talk_nonsense)

    error = caught.value
    assert error.started is True
    # Killed, or gone by itself before.
    assert error.exit_code is not None
    assert error.peak_rss_bytes
    assert "must not touch descriptors" in str(error)
    assert either.run(abs, -1) == 1


@pytest.mark.fault(12)
def test_garbage_and_the_end_together_fail_their_own_call(slot: Slot) -> None:
    # Whichever of the two is seen first.
    for _ in range(20):
        with pytest.raises(ChildLostError):
            slot.run(bodies.talk_nonsense_and_leave, 3)

    assert slot.run(abs, -1) == 1


@pytest.mark.fault(12, 48)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_outcome_stands_whatever_comes_after_it(make_slot: MakeSlot, batch_size: int) -> None:
    slot = make_slot(batch_size=batch_size)

    assert slot.run(bodies.send_an_outcome_and_nonsense) == "it stands"
    assert slot.run(abs, -1) == 1


def test_garbage_after_the_outcome_does_not_take_it_back_and_harms_no_call(slot: Slot) -> None:
    assert slot.run(bodies.register, bodies.talk_nonsense) == "registered"
    assert slot.run(bodies.register, bodies.talk_nonsense) == "registered"
    slot.close()


def test_a_forkserver_that_talks_nonsense_is_an_error_of_the_call(
    make_slot: MakeSlot, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        slot = make_slot(address=str(tmp_path / "socket"))
        with Background(slot.run, abs, -1) as call:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

                with pytest.raises(ProtocolError):
                    call.result()
