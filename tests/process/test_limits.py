"""What a body is bound by: clocks, memory, CPU time, files; and who may send it signals."""

import logging
import os
import queue
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import bodies
from harness.processes import (
    PATIENCE,
    Background,
    Mailbox,
    Slot,
    Word,
    survivors,
    wait_connected,
    wait_gone,
    wait_status,
)
from isolated_tasks.errors import (
    ChildLostError,
    CPUTimeLimitExceeded,
    ForkserverError,
    MemoryLimitExceeded,
)
from isolated_tasks.process import memory, pickling, stopping
from isolated_tasks.process.cgroup import is_full
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.options import CallOptions
from isolated_tasks.process.protocol import Call
from isolated_tasks.process.supervisor import Supervisor, TimeIsUpError

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]

MIB = 1 << 20
#: The memory of a process that does nothing stays below this, with all that is preloaded.
EMPTY = 200 * MIB


def run(
    slot: Slot,
    function: Callable[..., Any],
    *args: Any,
    soft: float | None = None,
    hard: float | None = None,
    **kwargs: Any,
) -> Any:
    """Run the function in a child, as the call "id" of the task "test", within time limits."""
    options = CallOptions("test", "id", soft_time_limit=soft, time_limit=hard)
    pickled = pickling.dumps((function, args, kwargs))
    return slot.children.call(pickled, slot.options, lambda: slot.address, options).result()


def running(*args: Any, **kwargs: Any) -> Background:
    """The same in the background."""
    return Background(lambda: run(*args, **kwargs))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> "queue.Queue[int]":
    """What each look at the memory of a child has found."""
    found: queue.Queue[int] = queue.Queue()
    original = memory.tree_bytes

    def look(pid: int, *, above: int | None = None) -> int:
        size = original(pid, above=above)
        found.put(size)
        return size

    monkeypatch.setattr(memory, "tree_bytes", look)
    return found


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Options with which nobody is killed who has been asked to go."""
    monkeypatch.setattr(stopping, "TIME_LIMIT_GRACE", 1000)
    return {"term_grace": 1000}


@pytest.fixture
def launcher(limiter: Launcher) -> Launcher:
    """One for each way in which memory limits are kept."""
    return limiter


@pytest.fixture(params=["the forkserver is dead", "the forkserver is replaced"])
def bereave(request: pytest.FixtureRequest, launcher: Launcher) -> Callable[[], None]:
    """Kills the forkserver, of which one child runs; where it is asked for another one comes."""

    def kill() -> None:
        (pid,) = launcher.pids()
        os.kill(pid, signal.SIGKILL)
        wait_gone([pid])
        if request.param == "the forkserver is replaced":
            # The child's requester comes with it.
            wait_connected(launcher.address)
            launcher.check()
            launcher.wait_loaded(PATIENCE)

    return kill


# ── the soft time limit ─────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(33)
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_body_may_handle_its_soft_time_limit(
    make_slot: MakeSlot, caplog: pytest.LogCaptureFixture, start_method: str
) -> None:
    _, said = run(
        make_slot(start_method=start_method),
        bodies.shielded,
        bodies.wait_for_the_soft_limit,
        soft=0.05,
    )

    assert said == "handled"
    assert [record.getMessage() for record in caplog.records] == [
        "Soft time limit (0.05s) exceeded for test[id]"
    ]


def test_a_soft_time_limit_that_is_not_handled_is_what_the_call_raises(slot: Slot) -> None:
    with pytest.raises(TimeoutError) as caught:
        run(slot, bodies.hang_alone, "asleep", soft=0.05)

    assert "hang_alone" in [entry.name for entry in caught.traceback]
    assert slot.run(abs, -1) == 1


@pytest.mark.fault(6)
def test_a_soft_limit_that_is_handled_too_late_is_followed_by_the_hard_one(slot: Slot) -> None:
    with pytest.raises(TimeIsUpError):
        run(slot, bodies.hang_alone, "deadlocked in C", soft=0.05, hard=0.1)


@pytest.mark.fault(48)
def test_a_soft_limit_that_comes_when_the_body_has_ended_does_nothing(
    make_slot: MakeSlot, caplog: pytest.LogCaptureFixture
) -> None:
    slot = make_slot(batch_size=3)

    came = run(slot, bodies.return_before_the_signal, signal.SIGUSR1, soft=0.05)

    assert came == signal.SIGUSR1
    assert "Soft time limit (0.05s) exceeded" in caplog.text


def test_a_process_that_was_told_of_a_soft_limit_is_not_used_again(make_slot: MakeSlot) -> None:
    slot = make_slot(batch_size=5, batch_idle_timeout=1000)
    first = [run(slot, os.getpid, soft=1000) for _ in range(2)]
    told, _ = run(slot, bodies.shielded, bodies.wait_for_the_soft_limit, soft=0.05)
    after = [run(slot, os.getpid, soft=1000) for _ in range(2)]

    assert first == [told, told]
    assert after[0] == after[1] != told
    assert survivors([told]) == set()


def test_each_call_of_a_batch_has_a_clock_of_its_own(make_slot: MakeSlot) -> None:
    slot = make_slot(batch_size=3, batch_idle_timeout=1000)
    pid = run(slot, os.getpid, hard=1000)

    with pytest.raises(TimeIsUpError):
        run(slot, bodies.hang_alone, "asleep", hard=0.05)

    assert survivors([pid]) == set()
    assert run(slot, os.getpid) != pid


# ── the hard time limit ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batch_size", [1, 3])
def test_at_the_hard_time_limit_finally_blocks_run(
    make_slot: MakeSlot, mailbox: Mailbox, patient: dict[str, float], batch_size: int
) -> None:
    slot = make_slot(batch_size=batch_size, batch_idle_timeout=1000, **patient)

    with pytest.raises(TimeIsUpError, match=r"^0\.05$"):
        run(slot, bodies.shielded, bodies.wait_and_clean_up, mailbox.path, hard=0.05)

    (pid, _), (same, last) = mailbox.read(), mailbox.read()
    assert (same, last) == (pid, "cleaned up")
    # It was not killed, and is gone all the same.
    assert survivors([pid], timeout=0) == set()
    assert slot.run(abs, -1) == 1


@pytest.mark.fault(7)
def test_a_body_that_swallows_its_end_is_stopped_all_the_same(
    make_slot: MakeSlot, mailbox: Mailbox, patient: dict[str, float]
) -> None:
    with pytest.raises(TimeIsUpError):
        run(make_slot(**patient), bodies.shielded, bodies.swallow_the_end, mailbox.path, hard=0.05)

    # As billiard's pool processes have it.
    assert mailbox.read() == [-(256 - signal.SIGTERM)]


@pytest.mark.fault(6, 7, 10, 25)
@pytest.mark.parametrize("stubborn", [False, True], ids=["", "stubborn"])
@pytest.mark.parametrize("how", [*bodies.HANGING, "deadlocked in C"])
def test_at_the_hard_time_limit_a_body_goes_however_it_hangs_and_takes_its_processes_along(
    slot: Slot, mailbox: Mailbox, how: str, *, stubborn: bool
) -> None:
    with pytest.raises(TimeIsUpError):
        run(slot, bodies.hang_timed, mailbox.path, how, stubborn=stubborn, hard=0.1)

    assert survivors(mailbox.read()) == set()
    assert slot.run(abs, -1) == 1


@pytest.mark.fault(6)
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_each_rung_of_the_ladder_is_logged_with_its_reason(
    make_slot: MakeSlot, mailbox: Mailbox, caplog: pytest.LogCaptureFixture, start_method: str
) -> None:
    slot = make_slot(start_method=start_method)

    with pytest.raises(TimeIsUpError):
        run(slot, bodies.hang_timed, mailbox.path, "deadlocked in C", stubborn=True, hard=0.1)

    pid = mailbox.read()[0]
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in records] == [
        "Hard time limit (0.1s) exceeded for test[id]",
        f"test[id]: child pid={pid}, with its group, gets SIGTERM: "
        "hard time limit (0.1 s) exceeded",
        f"test[id]: child pid={pid}, with its group, gets SIGKILL: "
        "hard time limit (0.1 s) exceeded",
    ]
    assert [record.levelno for record in records] == [logging.ERROR, *[logging.WARNING] * 2]


def test_the_grace_is_the_most_patience_there_is(
    make_slot: MakeSlot, mailbox: Mailbox, word: Word, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "TIME_LIMIT_GRACE", 1000)
    slot = make_slot(term_grace=0.05)

    # It takes until it is told, and is never told.
    with pytest.raises(TimeIsUpError):
        run(slot, bodies.shielded, bodies.leave_slowly, mailbox.path, word.path, hard=0.05)


@pytest.mark.fault(39)
def test_time_limits_hold_without_the_forkserver(
    *,
    launcher: Launcher,
    bereave: Callable[[], None],
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    caplog: pytest.LogCaptureFixture,
) -> None:
    slot = make_slot(address=launcher.address)
    body = (bodies.hang_timed, mailbox.path, "asleep")
    with running(slot, *body, stubborn=True, fifo=word.path, hard=0.1) as call:
        pids = mailbox.read()
        bereave()
        word.give()

        with pytest.raises(TimeIsUpError):
            call.result()

    assert survivors(pids) == set()
    assert re.findall("gets (SIG[A-Z]+)", caplog.text) == ["SIGTERM", "SIGKILL"]
    launcher.check()
    assert slot.run(abs, -1) == 1


def test_without_the_forkserver_finally_blocks_run(
    *,
    launcher: Launcher,
    bereave: Callable[[], None],
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    patient: dict[str, float],
) -> None:
    slot = make_slot(address=launcher.address, **patient)
    body = (bodies.begin_when_told, mailbox.path, word.path, bodies.wait_and_clean_up)
    with running(slot, *body, mailbox.path, hard=0.05) as call:
        mailbox.read()
        bereave()
        word.give()

        with pytest.raises(TimeIsUpError):
            call.result()

    assert [mailbox.read()[1], mailbox.read()[1]] == ["begun", "cleaned up"]


#: A forkserver that does not come to report what it has forked.
SPEECHLESS = """
import signal
from isolated_tasks.process import system
system.open_pidfd = lambda pid: signal.pause()
"""


@pytest.mark.fault(39)
def test_a_forkserver_that_dies_before_it_reports_a_child_is_done_without(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    patient: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "speechless.py").write_text(SPEECHLESS)
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["speechless", "harness.bodies"], serves=False)
    (forkserver,) = launcher.pids()
    slot = make_slot(address=launcher.address, **patient)
    body = (bodies.begin_when_told, mailbox.path, word.path, bodies.wait_and_clean_up)
    with running(slot, *body, mailbox.path, hard=0.05) as call:
        (pid,) = mailbox.read()
        os.kill(forkserver, signal.SIGKILL)
        wait_gone([forkserver])
        # Its requester knows who it is all the same, and shows it to the next one.
        wait_connected(launcher.address)
        word.give()

        assert [mailbox.read(), mailbox.read()] == [[pid, "begun"], [pid, "cleaned up"]]
        with pytest.raises(TimeIsUpError):
            call.result()

    assert survivors([pid], timeout=0) == set()


# ── where the clock starts ──────────────────────────────────────────────────────────────────────


def test_the_clock_starts_when_the_body_begins_and_not_before(
    slot: Slot, mailbox: Mailbox, word: Word
) -> None:
    body = (bodies.begin_when_told, mailbox.path, word.path, bodies.hang_alone, "asleep")
    with running(slot, *body, soft=0.05, hard=0.1) as call:
        pids = mailbox.read()

        # Much longer than its limits, and it is still there.
        assert survivors(pids, timeout=0.5) == set(pids)
        assert call.is_running
        word.give()

        with pytest.raises((TimeIsUpError, TimeoutError)):
            call.result()


@pytest.mark.fault(42)
def test_a_body_that_never_begins_is_an_error_of_the_start(
    make_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    slot = make_slot(start_timeout=1)
    body = (bodies.begin_when_told, mailbox.path, word.path, abs, -1)

    with pytest.raises(ForkserverError, match="has not begun the body within 1 s"):
        run(slot, *body, hard=1000)

    assert survivors(mailbox.read()) == set()
    assert slot.run(abs, -1) == 1


# ── signals ─────────────────────────────────────────────────────────────────────────────────────

TERMINATING = (signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)


@pytest.mark.fault(34)
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_what_a_stranger_sends_does_not_end_a_body(
    make_slot: MakeSlot, mailbox: Mailbox, word: Word, start_method: str
) -> None:
    slot = make_slot(start_method=start_method, batch_size=3, batch_idle_timeout=1000)
    with running(slot, bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        for number in (*TERMINATING, signal.SIGINT):
            os.kill(pid, number)
            os.killpg(pid, number)
        word.give("done")

        assert call.result() == (pid, "done")

    # Nor a process that waits for its next call.
    for number in (*TERMINATING, signal.SIGUSR1):
        os.kill(pid, number)
    assert slot.run(os.getpid) == pid


def test_a_signal_that_a_call_overtakes_does_not_end_it(
    make_slot: MakeSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = make_slot(batch_size=3, batch_idle_timeout=1000)
    pid = slot.run(os.getpid)
    os.kill(pid, signal.SIGSTOP)
    wait_status(pid, psutil.STATUS_STOPPED)
    for number in TERMINATING:
        os.kill(pid, number)
    original = Supervisor._write

    def write(self: Supervisor, channel: Any, message: Any) -> None:
        original(self, channel, message)
        if isinstance(message, Call):
            # When it sees the signals there is something to be read.
            os.kill(pid, signal.SIGCONT)

    with monkeypatch.context() as patched:
        patched.setattr(Supervisor, "_write", write)

        assert slot.run(os.getpid) == pid


@pytest.mark.parametrize("number", TERMINATING)
def test_what_comes_while_a_body_leaves_does_not_cut_it_short(
    *,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    patient: dict[str, float],
    number: signal.Signals,
) -> None:
    slot = make_slot(**patient)
    with running(
        slot, bodies.shielded, bodies.leave_slowly, mailbox.path, word.path, hard=0.05
    ) as call:
        mailbox.read()
        pid, code = mailbox.read()
        assert code == -(256 - signal.SIGTERM)
        os.kill(pid, number)
        word.give("in peace")

        assert mailbox.read() == ["cleaned up", "in peace"]
        with pytest.raises(TimeIsUpError):
            call.result()


@pytest.mark.parametrize("number", [*TERMINATING, signal.SIGUSR1])
@pytest.mark.parametrize("how", ["fork", "multiprocessing", "program"])
def test_processes_of_the_body_obey_signals_as_they_do_anywhere(
    slot: Slot, how: str, number: signal.Signals
) -> None:
    assert slot.run(bodies.end_a_process_of_mine, how, number) == -number


# ── the memory of all its processes ─────────────────────────────────────────────────────────────


def test_a_body_that_holds_more_than_its_memory_limit_is_killed(
    *,
    launcher: Launcher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    caplog: pytest.LogCaptureFixture,
) -> None:
    slot = make_slot(
        address=launcher.address, memory_limit_bytes=EMPTY + 100 * MIB, name="tasks.grow"
    )
    with running(slot, bodies.report_and_hold, mailbox.path, word.path, 400 * MIB) as call:
        (pid,) = mailbox.read()
        word.give()

        with pytest.raises(MemoryLimitExceeded) as caught:
            call.result()

    error = caught.value
    assert survivors([pid]) == set()
    assert (error.task, error.task_id, error.pid) == ("tasks.grow", "id", pid)
    assert error.limit == 300 * MIB
    assert error.peak is not None
    # A control group, where one can be had, holds not one page more.
    assert error.limit <= error.peak < 400 * MIB + EMPTY
    assert "memory_limit=300 MiB" in str(error)
    said = (
        rf"child pid={pid}, with its group, (gets SIGKILL|was killed by the kernel): memory limit"
    )
    assert re.search(said, caplog.text)
    assert slot.run(abs, -1) == 1


@pytest.mark.fault(27)
def test_what_a_grandchild_holds_counts_also_where_it_has_left_the_group(
    launcher: Launcher, make_slot: MakeSlot, mailbox: Mailbox, start_method: str
) -> None:
    slot = make_slot(
        address=launcher.address, memory_limit_bytes=2 * EMPTY, start_method=start_method
    )

    with pytest.raises(MemoryLimitExceeded) as caught:
        slot.run(bodies.hold_elsewhere, mailbox.path, 500 * MIB)

    pids = [*mailbox.read(), *mailbox.read()]
    assert is_full(caught.value.peak, 2 * EMPTY)
    assert survivors(pids) == set()


@pytest.mark.fault(46)
def test_pages_that_processes_share_count_once(
    *,
    launcher: Launcher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    looks: "queue.Queue[int]",
) -> None:
    # Four of them: their RSS comes to more than a gigabyte.
    slot = make_slot(address=launcher.address, memory_limit_bytes=EMPTY + 400 * MIB)
    with running(slot, bodies.share, mailbox.path, word.path, 300 * MIB, 3) as call:
        mailbox.read()
        while not looks.empty():
            looks.get()
        # The first may have begun before all were there.
        found = [looks.get(timeout=PATIENCE) for _ in range(3)]
        word.give("done")

        assert call.result() == "done"
    assert all(size > 300 * MIB for size in found[1:])


def test_without_a_limit_nobody_looks(slot: Slot, looks: "queue.Queue[int]") -> None:
    slot.run(abs, -1)

    assert looks.empty()


@pytest.mark.fault(39)
def test_the_memory_limit_holds_without_the_forkserver(
    *,
    launcher: Launcher,
    bereave: Callable[[], None],
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
) -> None:
    slot = make_slot(address=launcher.address, memory_limit_bytes=EMPTY + 100 * MIB)
    with running(slot, bodies.report_and_hold, mailbox.path, word.path, 400 * MIB) as call:
        pids = mailbox.read()
        bereave()
        word.give()

        with pytest.raises(MemoryLimitExceeded):
            call.result()

    assert survivors(pids) == set()
    launcher.check()
    assert slot.run(abs, -1) == 1


@pytest.mark.fault(26)
def test_a_grandchild_elsewhere_is_killed_without_the_forkserver_too(
    *,
    launcher: Launcher,
    bereave: Callable[[], None],
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
) -> None:
    slot = make_slot(address=launcher.address, memory_limit_bytes=2 * EMPTY)
    body = (bodies.hold_elsewhere, mailbox.path, 500 * MIB)
    with running(slot, *body, fifo=word.path) as call:
        pids = [*mailbox.read(), *mailbox.read()]
        bereave()
        word.give()

        with pytest.raises(MemoryLimitExceeded):
            call.result()

    left = survivors(pids, timeout=1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == set()


# ── killed by somebody else ─────────────────────────────────────────────────────────────────────


@pytest.mark.fault(2)
def test_a_kill_by_somebody_else_is_told_with_the_limit_and_the_last_look(
    make_slot: MakeSlot, mailbox: Mailbox, word: Word, looks: "queue.Queue[int]"
) -> None:
    slot = make_slot(memory_limit_bytes=5000 * MIB)
    with running(slot, bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        # Until the one before the last is noted.
        for _ in range(2):
            looks.get(timeout=PATIENCE)
        os.kill(pid, signal.SIGKILL)

        with pytest.raises(ChildLostError) as caught:
            call.result()

    error = caught.value
    assert (error.signal, error.oom_killed) == ("SIGKILL", False)
    assert error.memory_limit == 5000 * MIB
    assert error.last_bytes is not None
    assert MIB < error.last_bytes < EMPTY
    for part in (
        "possibly by the kernel's out-of-memory killer",
        "memory_limit 5000 MiB",
        f"{error.last_bytes / MIB:.0f} MiB when last seen",
    ):
        assert part in str(error)
    # Nobody is told to give it the limit that it has.
    assert "with a memory_limit the error would" not in str(error)


@pytest.mark.fault(47)
@pytest.mark.parametrize(
    ("count", "verdict", "words"),
    [
        ("itertools.count().__next__", True, "was killed by the kernel's out-of-memory killer"),
        ("lambda: 7", False, "possibly by the kernel's"),
        ("lambda: None", None, "possibly by the kernel's"),
    ],
    ids=["rises", "stays", "nobody counts"],
)
def test_whether_the_kernel_has_killed_it_is_what_its_count_says(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    count: str,
    verdict: bool | None,
    words: str,
) -> None:
    # What the kernel does at the end of its memory would be done to more than this test.
    module = (
        f"import itertools\nfrom isolated_tasks.process import memory\nmemory.oom_kills = {count}\n"
    )
    (tmp_path / "counting.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    slot = make_slot(address=new_launcher(preload=["counting", "harness.bodies"]).address)

    for _ in range(2):
        with pytest.raises(ChildLostError, match=words) as caught:
            slot.run(bodies.kill_myself, signal.SIGKILL)
        assert caught.value.oom_killed is verdict

    # Of another death that count says nothing.
    with pytest.raises(ChildLostError) as caught:
        slot.run(bodies.leave, 3)
    assert caught.value.oom_killed is False


# ── the soft memory limit ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_beyond_the_soft_memory_limit_the_guilty_line_gets_a_memory_error(
    make_slot: MakeSlot, start_method: str
) -> None:
    slot = make_slot(start_method=start_method, soft_memory_limit_bytes=EMPTY + 200 * MIB)

    with pytest.raises(MemoryError) as caught:
        slot.run(bodies.allocate, 500 * MIB)

    assert "bytearray(size)  # the guilty line" in str(caught.traceback[-1].statement)
    assert slot.run(bodies.allocate, 100 * MIB) == 100 * MIB


def test_a_body_may_handle_its_soft_memory_limit(make_slot: MakeSlot) -> None:
    slot = make_slot(soft_memory_limit_bytes=EMPTY + 200 * MIB)

    assert slot.run(bodies.try_to_allocate, 500 * MIB) == "MemoryError"
    assert slot.run(bodies.try_to_allocate, 100 * MIB) == "allocated"


def test_the_soft_memory_limit_is_lifted_for_the_result(make_slot: MakeSlot) -> None:
    slot = make_slot(soft_memory_limit_bytes=EMPTY + 200 * MIB)

    assert run(slot, bodies.return_large, 500 * MIB) == 500 * MIB


def test_what_one_call_of_a_batch_leaves_is_not_the_memory_error_of_the_next(
    make_slot: MakeSlot,
) -> None:
    slot = make_slot(batch_size=9, soft_memory_limit_bytes=EMPTY + 400 * MIB)

    calls = [slot.run(bodies.try_to_hold, size * MIB) for size in (700, 1, 300, 300, 1, 1)]

    pids = [pid for pid, _ in calls]
    assert [said for _, said in calls] == ["MemoryError", "held", "held", "held", "held", "held"]
    # One that holds more than half of what it may is not used again.
    assert len(set(pids)) == 3
    assert pids[0] == pids[1] == pids[2]
    assert pids[4] == pids[5]


def test_a_body_may_lower_what_it_may_have_for_good(make_slot: MakeSlot) -> None:
    slot = make_slot(max_open_files=64, batch_size=2)

    assert slot.run(bodies.lower_the_hard_limit_of_files, 64) == 64
    assert slot.run(abs, -1) == 1


@pytest.mark.fault(13)
def test_a_body_s_own_handlers_are_not_the_next_one_s(make_slot: MakeSlot) -> None:
    slot = make_slot(batch_size=2)

    pid = slot.run(bodies.ignore_sigusr1)

    assert slot.run(bodies.dispositions)["SIGUSR1"] == "handler"
    assert pid


def test_a_process_that_holds_more_already_does_not_begin_the_body(
    make_slot: MakeSlot, tmp_path: Path
) -> None:
    slot = make_slot(soft_memory_limit_bytes=1 * MIB)

    with pytest.raises(MemoryError, match=r"before the body begins, [0-9]+ bytes too many"):
        run(slot, bodies.append, str(tmp_path / "traces"), "begun", hard=1000)

    assert not (tmp_path / "traces").exists()


# ── CPU time and the rest ───────────────────────────────────────────────────────────────────────


def test_each_call_of_a_batch_may_use_its_cpu_time_and_beyond_it_is_killed_with_its_frames(
    make_slot: MakeSlot,
) -> None:
    slot = make_slot(batch_size=4, cpu_time_limit=1, name="tasks.compute")
    # More than the limit together.
    pids = {run(slot, bodies.burn, 0.7) for _ in range(2)}

    with pytest.raises(CPUTimeLimitExceeded) as caught:
        run(slot, bodies.burn, 1000)

    error = caught.value
    assert {error.pid} == pids
    assert (error.task, error.task_id, error.limit) == ("tasks.compute", "id", 1)
    assert re.search(r'bodies\.py", line \d+ in burn', error.crash_traceback)
    assert "cpu_time_limit=1 s" in str(error)
    assert error.crash_traceback in str(error)


def test_a_signal_of_the_same_number_without_a_limit_is_a_lost_child(slot: Slot) -> None:
    with pytest.raises(ChildLostError) as caught:
        slot.run(bodies.kill_myself, signal.SIGXCPU)

    assert caught.value.signal == "SIGXCPU"


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_niceness_is_added_once(
    make_slot: MakeSlot, forkserver: Launcher, start_method: str
) -> None:
    (parent,) = forkserver.pids()
    slot = make_slot(nice=5, batch_size=2, start_method=start_method)

    calls = [slot.run(bodies.niceness) for _ in range(2)]

    assert calls[0] == calls[1]
    assert calls[0][1] == psutil.Process(parent).nice() + 5
    assert make_slot().run(bodies.niceness)[1] == psutil.Process(parent).nice()


def test_a_body_opens_no_more_files_than_it_may(make_slot: MakeSlot) -> None:
    slot = make_slot(max_open_files=40, batch_size=2)

    calls = [slot.run(bodies.highest_descriptor) for _ in range(2)]

    assert calls[0] == calls[1]
    assert calls[0][1] == 39


def test_a_limit_on_open_files_is_not_one_on_the_forkserver(
    make_slot: MakeSlot, forkserver: Launcher
) -> None:
    (pid,) = forkserver.pids()
    before = psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE)

    make_slot(max_open_files=40).run(abs, -1)

    assert psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE) == before
