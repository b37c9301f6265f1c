"""What bodies write on stderr reaches the worker's, and the last of it stands in errors."""

import contextlib
import os
import pty
import signal
from collections.abc import Callable, Iterator

import pytest

from harness import bodies
from harness.processes import Background, Mailbox, Slot, Word, wait_gone
from isolated_tasks.errors import (
    ChildLostError,
    CPUTimeLimitExceeded,
    IsolationError,
    MemoryLimitExceeded,
)
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.stderr import KEPT_BYTES, SHOWN_LINES

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]

MIB = 1 << 20

both_start_methods = pytest.mark.parametrize("start_method", ["forkserver", "spawn"])


def lose(slot: Slot, text: str) -> ChildLostError:
    with pytest.raises(ChildLostError) as caught:
        slot.run(bodies.say_and_end, text, "abort")
    return caught.value


# ── passed on ───────────────────────────────────────────────────────────────────────────────────


@both_start_methods
def test_what_a_body_says_is_there_when_its_call_has_ended(
    make_slot: MakeSlot, capfd: pytest.CaptureFixture[str], start_method: str
) -> None:
    slot = make_slot(start_method=start_method, batch_size=2)

    for number in range(2):
        slot.run(bodies.say_and_end, f"line {number}\n", "return")

        assert capfd.readouterr().err == f"line {number}\n"


def test_what_a_body_says_is_there_at_once(slot: Slot, mailbox: Mailbox, word: Word) -> None:
    reader, writer = os.pipe()
    own = os.dup(2)
    os.dup2(writer, 2)
    try:
        with Background(slot.run, bodies.say_and_wait, "now", mailbox.path, word.path) as call:
            mailbox.read()
            assert os.read(reader, 100) == b"now"
            word.give("well")
            call.result()
    finally:
        os.dup2(own, 2)
        for descriptor in (own, reader, writer):
            os.close(descriptor)


@pytest.mark.fault(23)
def test_a_flood_comes_through_whole(slot: Slot, capfd: pytest.CaptureFixture[str]) -> None:
    text = "".join(f"{number}\n" for number in range(200_000))

    slot.run(bodies.say_and_end, text, "return")

    assert capfd.readouterr().err == text


@pytest.mark.fault(23)
def test_processes_of_the_body_are_heard_too(slot: Slot, capfd: pytest.CaptureFixture[str]) -> None:
    slot.run(bodies.run_program, ["sh", "-c", "echo from a program >&2"])

    assert capfd.readouterr().err == "from a program\n"


def test_exit_hooks_are_heard_when_nobody_waits_any_more(
    new_launcher: NewLauncher, make_slot: MakeSlot, capfd: pytest.CaptureFixture[str]
) -> None:
    slot = make_slot(address=new_launcher().address)

    pid = slot.run(bodies.flood_at_exit)
    wait_gone([pid])

    assert len(capfd.readouterr().err) == 1_000_000


def test_between_two_calls_of_a_batch_stderr_is_the_worker_s(make_slot: MakeSlot) -> None:
    slot = make_slot(batch_size=3)

    during = slot.run(os.readlink, "/proc/self/fd/2")
    pid = slot.run(os.getpid)

    assert during.startswith("pipe:")
    assert os.readlink(f"/proc/{pid}/fd/2") == os.readlink("/proc/self/fd/2") != during


def test_a_terminal_is_left_alone(make_slot: MakeSlot) -> None:
    main, terminal = pty.openpty()
    own = os.dup(2)
    os.dup2(terminal, 2)
    try:
        assert make_slot().run(os.isatty, 2)
        assert lose(make_slot(), "nobody keeps this\n").stderr == ""
    finally:
        os.dup2(own, 2)
        for descriptor in (own, main, terminal):
            os.close(descriptor)


def test_a_worker_without_stderr_runs_bodies_all_the_same(make_slot: MakeSlot) -> None:
    own = os.dup(2)
    os.close(2)
    try:
        result = make_slot().run(bodies.say_and_end, "to nobody\n", "return")
    finally:
        os.dup2(own, 2)
        os.close(own)
    assert result == "said"


@pytest.mark.fault(23)
def test_a_worker_whose_stderr_nobody_reads_any_more_runs_bodies_all_the_same(
    make_slot: MakeSlot,
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    own = os.dup(2)
    os.dup2(writer, 2)
    try:
        result = make_slot().run(bodies.say_and_end, "to nobody\n", "return")
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(writer)
    assert result == "said"


@contextlib.contextmanager
def read_slowly(*, piece: int, is_blocking: bool) -> Iterator[Background]:
    """Have a pipe for stderr, ours and that of forkservers from here on, and somebody read it.

    Args:
        piece: How much is read at a time, in bytes.
        is_blocking: Whether who writes to it waits for the reader.

    Yields:
        The reader, whose result is what has come; it is complete when the block has ended.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, is_blocking)

    def read() -> bytes:
        data = b""
        while new := os.read(reader, piece):
            data += new
            # Until the other end has filled it again, as a rule.
            os.sched_yield()
        return data

    own = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)
    with Background(read) as call:
        try:
            yield call
        finally:
            os.dup2(own, 2)
            os.close(own)
    os.close(reader)


@pytest.mark.fault(23)
def test_a_flood_comes_through_whole_where_stderr_does_not_block(make_slot: MakeSlot) -> None:
    text = "".join(f"{number:07}\n" for number in range(1 << 17))
    slot = make_slot()

    with read_slowly(piece=1000, is_blocking=False) as reader:
        slot.run(bodies.say_and_end, text, "return")

    assert reader.result() == text.encode()


def test_what_exit_hooks_say_comes_after_what_the_body_has_said(
    new_launcher: NewLauncher, make_slot: MakeSlot
) -> None:
    with read_slowly(piece=65536, is_blocking=True) as reader:
        launcher = new_launcher(preload=["harness.bodies"], serves=False)
        slot = make_slot(address=launcher.address)
        for number in range(40):
            slot.run(bodies.say_now_and_at_exit, f"body {number}\n", f"hook {number}\n")
        slot.close()
        launcher.stop()

    said = reader.result().decode().splitlines()
    assert said == [f"{who} {number}" for number in range(40) for who in ("body", "hook")]


# ── in errors ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(1, 23)
@both_start_methods
def test_the_last_lines_are_in_the_error_of_a_lost_child(
    make_slot: MakeSlot, start_method: str
) -> None:
    error = lose(make_slot(start_method=start_method), "first\nlast\n")

    assert error.stderr == "first\nlast\n"
    assert "The last lines on stderr:\nfirst\nlast" in str(error)


@pytest.mark.fault(23)
def test_only_the_last_lines_are_kept(slot: Slot) -> None:
    error = lose(slot, "".join(f"{number}\n" for number in range(100_000)))

    assert error.stderr == "".join(f"{n}\n" for n in range(100_000 - SHOWN_LINES, 100_000))


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("text", "kept"),
    [("x" * 1_000_000, "x" * KEPT_BYTES), ("bad: \udcff\n", "bad: \ufffd\n"), ("", "")],
    ids=["no newline", "no UTF-8", "nothing"],
)
def test_anything_may_come(slot: Slot, text: str, kept: str) -> None:
    assert lose(slot, text).stderr == kept


def test_what_another_call_of_the_batch_said_is_not_in_the_error(make_slot: MakeSlot) -> None:
    slot = make_slot(batch_size=3)
    slot.run(bodies.say_and_end, "the first call\n", "return")

    assert lose(slot, "the second call\n").stderr == "the second call\n"


@pytest.mark.fault(1)
def test_what_the_c_library_says_as_it_aborts_is_in_the_error(slot: Slot) -> None:
    with pytest.raises(ChildLostError) as caught:
        slot.run(bodies.free_twice)

    assert caught.value.signal == "SIGABRT"
    assert "free()" in caught.value.stderr


# ── what to do about it ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "arguments", "advice"),
    [
        (bodies.leave, (0,), "has to return or raise: look for os._exit"),
        (bodies.leave, (3,), "has to return or raise: look for os._exit"),
        (bodies.crash_in_c, (), "fault of native code"),
        (bodies.abort, (), "has given up"),
        (bodies.kill_myself, (signal.SIGKILL,), r"the kernel's log \(dmesg\) says so"),
        (bodies.kill_myself, (signal.SIGUSR2,), "Somebody has sent that signal"),
    ],
    ids=["exit 0", "exit 3", "SIGSEGV", "SIGABRT", "SIGKILL", "SIGUSR2"],
)
def test_a_lost_child_s_error_says_what_to_do(
    slot: Slot, body: Callable[..., object], arguments: tuple[object, ...], advice: str
) -> None:
    with pytest.raises(ChildLostError, match=advice):
        slot.run(body, *arguments)


@pytest.mark.parametrize(
    ("options", "body", "arguments", "expected", "advice"),
    [
        (
            {"memory_limit_bytes": 100 * MIB},
            bodies.hold_and_wait,
            (300 * MIB,),
            MemoryLimitExceeded,
            "or make it a ladder",
        ),
        ({"cpu_time_limit": 1}, bodies.spin_for_ever, (), CPUTimeLimitExceeded, "the frames below"),
    ],
    ids=["memory", "CPU time"],
)
def test_the_error_of_a_limit_says_how_it_ended_and_what_to_do(
    *,
    make_slot: MakeSlot,
    options: dict[str, int],
    body: Callable[..., object],
    arguments: tuple[object, ...],
    expected: type[IsolationError],
    advice: str,
) -> None:
    with pytest.raises(expected, match=advice) as caught:
        make_slot(**options).run(body, *arguments)

    error = caught.value
    assert error.started is True  # type: ignore[attr-defined]
    assert error.signal in ("SIGKILL", "SIGXCPU")  # type: ignore[attr-defined]
    assert error.peak_rss_bytes > 0  # type: ignore[attr-defined]
    assert error.user_seconds is not None  # type: ignore[attr-defined]
