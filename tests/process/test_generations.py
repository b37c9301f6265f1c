"""A forkserver is replaced while it lives, and no call is lost; one that is worn says so itself."""

import contextlib
import dataclasses
import itertools
import os
import resource
import select
import signal
import threading
import time
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
from isolated_tasks.errors import ChildLostError, ForkserverError
from isolated_tasks.process import breaker, pickling
from isolated_tasks.process import launcher as launching
from isolated_tasks.process.launcher import LAST_DELAY, Launcher
from isolated_tasks.process.options import CallOptions
from isolated_tasks.process.protocol import Stop
from isolated_tasks.process.supervisor import StoppedError
from isolated_tasks.process.transport import Channel

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]

MIB = 1 << 20


@pytest.fixture
def launcher(new_launcher: NewLauncher) -> Launcher:
    return new_launcher(preload=["harness.bodies"])


def check_until(launcher: Launcher, predicate: Callable[[], bool]) -> None:
    """What the owner of a launcher does, until it is so."""
    deadline = time.monotonic() + PATIENCE
    while not predicate():
        assert time.monotonic() < deadline, "nothing happens"
        # Not only for what forkservers say: of the end of a call nobody is told here.
        select.select(launcher.descriptors(), [], [], 0.01)
        launcher.check()


def only(launcher: Launcher) -> int:
    (pid,) = launcher.pids()
    return pid


def wait_replaced(launcher: Launcher, before: int) -> int:
    check_until(launcher, lambda: only(launcher) != before)
    return only(launcher)


# ── while nobody calls ──────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(45)
def test_the_next_one_loads_beside_the_one_before_and_takes_its_place(
    launcher: Launcher, make_slot: MakeSlot, caplog: pytest.LogCaptureFixture
) -> None:
    slot = make_slot(address=launcher.address)
    before = only(launcher)

    with caplog.at_level("INFO"):
        launcher.replace("a test wants it")
        # Not yet: the next one has to load first.
        assert only(launcher) == before
        assert slot.run(os.getppid) == before
        after = wait_replaced(launcher, before)

    assert slot.run(os.getppid) == after
    assert survivors([before]) == set()
    assert f"forkserver pid={before} is to be replaced: a test wants it" in caplog.text


@pytest.mark.fault(45)
def test_at_once_means_that_no_call_runs_what_was_loaded_before(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    module = tmp_path / "changing_module.py"
    module.write_text("import os\ndef answer(): return 'old'\n")
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["changing_module"])
    slot = make_slot(address=launcher.address)

    def ask() -> Any:
        return slot.run(bodies.call_by_name, "changing_module", "answer")

    assert ask() == "old"
    # Of another length: a cached bytecode file is told by time, in seconds, and size.
    module.write_text("import os\ndef answer(): return 'the new one'\n")

    launcher.replace("changed code", at_once=True)

    assert ask() == "the new one"


@pytest.mark.fault(45)
def test_one_that_dies_as_it_loads_leaves_the_one_before_in_place(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = tmp_path / "deadly_later.py"
    module.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["deadly_later"])
    before = only(launcher)
    module.write_text("import os\nos._exit(3)\n")

    launcher.replace("a test wants it")
    check_until(launcher, lambda: "while it was loading" in caplog.text)

    assert "the one that it was to replace goes on" in caplog.text
    assert make_slot(address=launcher.address).run(os.getppid) == before
    # It is tried again, after a pause.
    module.write_text("")
    wait = launcher.check()
    assert wait is not None
    monkeypatch.setattr(launcher._places[0], "not_before", 0.0)
    launcher.check()
    wait_replaced(launcher, before)


FAILS_FOR_NOW = """
import os
if os.path.exists({flag!r}):
    raise LookupError("not now")
"""


@pytest.fixture
def flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """While it is there, the preload ``fails_for_now`` fails."""
    flag = tmp_path / "flag"
    (tmp_path / "fails_for_now.py").write_text(FAILS_FOR_NOW.format(flag=str(flag)))
    monkeypatch.syspath_prepend(tmp_path)
    return flag


TURNED_DOWN = "has failed to load fails_for_now, so the one that it was to replace goes on"


@pytest.mark.fault(41, 45)
def test_one_that_fails_to_load_what_the_one_before_has_loaded_is_turned_down(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    flag: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # So long that the test is over before it is.
    monkeypatch.setattr(launching, "FIRST_DELAY", LAST_DELAY)
    launcher = new_launcher(preload=["fails_for_now"])
    slot = make_slot(address=launcher.address)
    before = only(launcher)
    flag.touch()

    launcher.replace("a test wants it")
    check_until(launcher, lambda: TURNED_DOWN in caplog.text)

    assert slot.run(os.getppid) == before
    # It is tried again, after a pause.
    wait = launcher.check()
    assert wait is not None
    assert 0 < wait <= LAST_DELAY
    flag.unlink()
    monkeypatch.setattr(launcher._places[0], "not_before", 0.0)
    after = wait_replaced(launcher, before)
    assert slot.run(os.getppid) == after
    wait_gone([before])


def test_a_call_that_one_has_taken_before_it_is_turned_down_returns(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    flag: Path,
    mailbox: Mailbox,
    word: Word,
    caplog: pytest.LogCaptureFixture,
) -> None:
    launcher = new_launcher(preload=["fails_for_now"])
    slot = make_slot(address=launcher.address)
    before = only(launcher)
    flag.touch()
    launcher.replace("a test wants it")
    successor = launcher._places[0].successor
    assert successor is not None
    assert successor.descriptor is not None
    # It says so when it serves; the launcher, which looks later, does not know yet.
    assert select.select([successor.descriptor], [], [], PATIENCE)[0]
    os.kill(before, signal.SIGSTOP)
    wait_status(before, psutil.STATUS_STOPPED)
    try:
        call = Background(slot.run, bodies.report_and_wait, mailbox.path, word.path)
        with call:
            (pid,) = mailbox.read()
            os.kill(before, signal.SIGCONT)
            check_until(launcher, lambda: TURNED_DOWN in caplog.text)
            word.give("well")

            assert call.result() == (pid, "well")
    finally:
        os.kill(before, signal.SIGCONT)
    slot.close()
    check_until(launcher, lambda: launcher._generations() == launcher._current())
    assert only(launcher) == before
    assert survivors([successor.pid], timeout=0) == set()


@pytest.mark.parametrize("end", ["it dies", "at_once"])
def test_there_is_another_one_at_once_though_successors_of_it_would_wait(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    flag: Path,
    caplog: pytest.LogCaptureFixture,
    end: str,
) -> None:
    monkeypatch.setattr(launching, "FIRST_DELAY", LAST_DELAY)
    launcher = new_launcher(preload=["fails_for_now"])
    before = only(launcher)
    flag.touch()
    launcher.replace("a test wants it")
    check_until(launcher, lambda: TURNED_DOWN in caplog.text)

    flag.unlink()

    if end == "it dies":
        # It has lasted.
        monkeypatch.setattr(launching, "SETTLED_SECONDS", 0.0)
        os.kill(before, signal.SIGKILL)
        wait_gone([before])
        launcher.check()
    else:
        launcher.replace("changed code", at_once=True)

    # Else it would be calls that wait.
    assert launcher.pids()
    assert make_slot(address=launcher.address).run(os.getppid) == only(launcher)


def test_one_that_fails_to_load_what_the_one_before_could_not_load_either_takes_its_place(
    new_launcher: NewLauncher, make_slot: MakeSlot, flag: Path
) -> None:
    flag.touch()
    launcher = new_launcher(preload=["fails_for_now"])
    before = only(launcher)

    launcher.replace("a test wants it")
    after = wait_replaced(launcher, before)

    assert make_slot(address=launcher.address).run(os.getppid) == after


def test_one_whose_predecessor_dies_as_it_loads_takes_over(
    launcher: Launcher, make_slot: MakeSlot
) -> None:
    before = only(launcher)
    launcher.replace("a test wants it")

    os.kill(before, signal.SIGKILL)
    after = wait_replaced(launcher, before)
    launcher.wait_loaded(PATIENCE)

    assert only(launcher) == after
    assert make_slot(address=launcher.address).run(os.getppid) == after


def test_stopping_in_the_middle_stops_all(launcher: Launcher, make_slot: MakeSlot) -> None:
    make_slot(address=launcher.address).run(abs, -1)
    launcher.replace("a test wants it")
    pids = [generation.pid for generation in launcher._generations()]
    assert len(pids) == 2

    launcher.stop()

    assert survivors(pids, timeout=0) == set()


# ── while calls run ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(45)
def test_a_call_under_way_ends_where_it_began_and_its_forkserver_after_it(
    launcher: Launcher, make_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    slot = make_slot(address=launcher.address)
    with Background(slot.run, bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        before = only(launcher)
        launcher.replace("a test wants it")
        after = wait_replaced(launcher, before)
        assert make_slot(address=launcher.address).run(os.getppid) == after
        assert survivors([before], timeout=0) == {before}

        word.give("well")

        assert call.result() == (pid, "well")
    wait_gone([before])
    launcher.check()


def has_adopted(forkserver: int) -> bool:
    """Whether it looks after a child of another one: it holds a pidfd, as it does for no other."""
    folder = Path(f"/proc/{forkserver}/fd")
    with contextlib.suppress(FileNotFoundError):  # closed since it was listed
        return any("[pidfd]" in os.readlink(one) for one in folder.iterdir())
    return False


@pytest.mark.fault(39, 45)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_call_whose_forkserver_is_dead_outlives_the_one_that_looks_after_it_too(
    *, limiter: Launcher, make_slot: MakeSlot, mailbox: Mailbox, word: Word, at_once: bool
) -> None:
    slot = make_slot(address=limiter.address, memory_limit_bytes=200 * MIB)
    with Background(slot.run, bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        dead = only(limiter)
        os.kill(dead, signal.SIGKILL)
        second = wait_replaced(limiter, dead)
        check_until(limiter, lambda: has_adopted(second))

        limiter.replace("a test wants it", at_once=at_once)
        third = wait_replaced(limiter, second)
        wait_gone([second])
        check_until(limiter, lambda: has_adopted(third))

        word.give("well")
        assert call.result() == (pid, "well")


def test_a_call_under_way_is_stopped_whoever_its_forkserver_is(
    *, launcher: Launcher, make_slot: MakeSlot, mailbox: Mailbox
) -> None:
    slot = make_slot(address=launcher.address)
    call_options = CallOptions("test", "x", call_id="x")
    pickled = pickling.dumps((bodies.wait_and_clean_up, (mailbox.path,), {}))

    def run() -> Any:
        return slot.children.call(pickled, slot.options, lambda: slot.address, call_options)

    with Background(run) as call:
        pid, _ = mailbox.read()
        before = only(launcher)
        launcher.replace("a test wants it")
        wait_replaced(launcher, before)

        launcher.stop_call(Stop("x", signal.SIGTERM, "revoked"))

        assert mailbox.read() == [pid, "cleaned up"]
        with pytest.raises(StoppedError):
            call.result()


@pytest.mark.fault(45)
def test_a_batch_ends_with_the_call_that_it_serves(
    launcher: Launcher, make_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    slot = make_slot(address=launcher.address, batch_size=100, batch_idle_timeout=1000)
    with Background(slot.run, bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        before = only(launcher)
        launcher.replace("a test wants it", at_once=True)
        word.give("well")
        assert call.result() == (pid, "well")

    # Who has not heard of it yet may call it once more.
    check_until(launcher, lambda: slot.run(os.getppid) != before)
    wait_gone([pid, before])


def test_an_idle_batch_is_not_used_again(launcher: Launcher, make_slot: MakeSlot) -> None:
    slot = make_slot(address=launcher.address, batch_size=100, batch_idle_timeout=1000)
    old = slot.run(os.getpid)
    before = only(launcher)

    launcher.replace("a test wants it", at_once=True)
    check_until(launcher, lambda: slot.run(os.getppid) != before)

    wait_gone([old, before])


def test_who_knows_that_it_is_to_be_replaced_does_not_use_a_batch_again(
    launcher: Launcher, make_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    slot = make_slot(address=launcher.address, slots=2, batch_size=100, batch_idle_timeout=1000)
    with Background(slot.run, bodies.report_and_wait, mailbox.path, word.path) as call:
        (busy,) = mailbox.read()
        idle = slot.run(os.getpid)

        slot.children.renew()

        assert slot.run(os.getpid) not in (busy, idle)
        word.give("well")
        assert call.result() == (busy, "well")
    pids = {slot.run(os.getpid) for _ in range(3)}
    assert not pids & {busy, idle}
    wait_gone([busy, idle])


@pytest.mark.fault(45)
def test_a_stream_of_calls_runs_once_each_while_forkservers_are_replaced(
    launcher: Launcher, make_slot: MakeSlot, tmp_path: Path
) -> None:
    traces = tmp_path / "traces"
    traces.touch()
    slot = make_slot(address=launcher.address)
    servers = set()
    with Background(
        lambda: [slot.run(bodies.append, str(traces), number) for number in range(60)]
    ) as calls:
        while calls.is_running:
            before = only(launcher)
            servers.add(before)
            launcher.replace("a test wants it", at_once=len(servers) % 2 == 0)
            wait_replaced(launcher, before)
        calls.result()

    assert traces.read_text().split() == [str(number) for number in range(60)]
    assert len(servers) > 1


class Sender:
    """A thread that has a call stopped, in the middle of telling the forkserver so."""

    def __init__(self, launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
        self._is_sending, self._go_on = threading.Event(), threading.Event()
        stop = Stop("nobody's", signal.SIGTERM, "revoked")
        self._call = Background(launcher.stop_call, stop)
        drop = Channel._drop

        def drop_later(channel: Channel, sent: int) -> None:
            # It is sent by now, and yet to be forgotten.
            if threading.current_thread() is not threading.main_thread():
                self._is_sending.set()
                assert self._go_on.wait(PATIENCE)
            drop(channel, sent)

        monkeypatch.setattr(Channel, "_drop", drop_later)

    def __enter__(self) -> None:
        self._call.__enter__()
        assert self._is_sending.wait(PATIENCE)

    def __exit__(self, *_: object) -> None:
        self._go_on.set()
        self._call.result()


@pytest.mark.fault(45)
def test_a_forkserver_is_replaced_while_another_thread_has_calls_stopped(
    new_launcher: NewLauncher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Here and not by a fixture, whose stderr would not be ours.
    launcher = new_launcher()
    before = only(launcher)
    with Sender(launcher, monkeypatch):
        launcher.replace("a test wants it", at_once=True)
        assert only(launcher) != before
        # The other thread has yet to tell it.
        assert survivors([before], timeout=0) == {before}

    wait_gone([before])
    check_until(launcher, lambda: launcher._generations() == launcher._current())
    # It has not been told twice, say, or half of it.
    assert capfd.readouterr().err == ""


def test_one_that_is_told_twice_to_take_no_more_minds_its_business(
    new_launcher: NewLauncher, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = new_launcher()
    (generation,) = launcher._generations()
    generation.retire()
    # It is to hear both at once, and not to be gone after the first.
    os.kill(generation.pid, signal.SIGSTOP)
    wait_status(generation.pid, psutil.STATUS_STOPPED)
    try:
        launcher.replace("a test wants it", at_once=True)
    finally:
        os.kill(generation.pid, signal.SIGCONT)
    wait_gone([generation.pid])
    check_until(launcher, lambda: launcher._generations() == launcher._current())

    assert capfd.readouterr().err == ""


def test_a_forkserver_is_stopped_while_another_thread_has_calls_stopped(
    new_launcher: NewLauncher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Here and not by a fixture, whose stderr would not be ours.
    launcher = new_launcher()
    before = only(launcher)
    with contextlib.ExitStack() as stack:
        with Sender(launcher, monkeypatch):
            stopping = stack.enter_context(Background(launcher.stop))
        stopping.result()

    assert survivors([before], timeout=0) == set()
    assert capfd.readouterr().err == ""


# ── memory ──────────────────────────────────────────────────────────────────────────────────────


def test_the_budget_is_one_for_a_forkserver_and_those_before_it(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
) -> None:
    launcher = new_launcher(preload=["harness.bodies"], memory_budget_bytes=1000 * MIB)
    large = make_slot(address=launcher.address, memory_limit_bytes=600 * MIB)
    with Background(large.run, bodies.report_and_wait, mailbox.path, word.path) as running:
        (pid,) = mailbox.read()
        before = only(launcher)
        launcher.replace("a test wants it")
        wait_replaced(launcher, before)
        fits = make_slot(address=launcher.address, memory_limit_bytes=400 * MIB)
        # The new one has to hear first what the old one still holds.
        with Background(fits.run, abs, -1) as small:
            check_until(launcher, lambda: not small.is_running)
            assert small.result() == 1
        other = make_slot(address=launcher.address, memory_limit_bytes=600 * MIB)
        with Background(other.run, os.getppid) as waiting:
            wait_connected(launcher.address, more_than=1)
            assert waiting.is_running
            word.give("well")
            assert running.result() == (pid, "well")
            large.close()
            check_until(launcher, lambda: not waiting.is_running)
            assert waiting.result() == only(launcher)


def test_who_waits_for_memory_asks_the_next_one(
    *, new_launcher: NewLauncher, make_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    launcher = new_launcher(preload=["harness.bodies"], memory_budget_bytes=1000 * MIB)
    large = make_slot(address=launcher.address, memory_limit_bytes=600 * MIB)
    other = make_slot(address=launcher.address, memory_limit_bytes=600 * MIB)
    with Background(large.run, bodies.report_and_wait, mailbox.path, word.path) as running:
        (pid,) = mailbox.read()
        with Background(other.run, os.getppid) as waiting:
            wait_connected(launcher.address, more_than=2)
            # More often than a call would be tried that kills its children.
            for _ in range(breaker.OPEN_FROM + 1):
                before = only(launcher)
                launcher.replace("a test wants it")
                wait_replaced(launcher, before)
            assert waiting.is_running
            word.give("well")
            assert running.result() == (pid, "well")
            large.close()
            check_until(launcher, lambda: not waiting.is_running)
            assert waiting.result() == only(launcher)


# ── wear ────────────────────────────────────────────────────────────────────────────────────────


def test_one_that_has_started_enough_children_is_replaced(
    new_launcher: NewLauncher, make_slot: MakeSlot, caplog: pytest.LogCaptureFixture
) -> None:
    launcher = new_launcher(max_starts=3)
    slot = make_slot(address=launcher.address)
    before = only(launcher)

    with caplog.at_level("INFO"):
        assert [slot.run(os.getppid) for _ in range(3)] == [before] * 3
        after = wait_replaced(launcher, before)

    assert slot.run(os.getppid) == after
    assert "it has started 3 children (isolated_forkserver_max_calls)" in caplog.text


#: Each fork leaves something behind in the forkserver.
GROWING = """
import os
held = []
os.register_at_fork(before=lambda: held.append(b"x" * (8 << 20)))
"""


def test_one_that_grows_with_each_child_is_replaced(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "growing.py").write_text(GROWING)
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["growing"])
    slot = make_slot(address=launcher.address)
    before = only(launcher)

    with caplog.at_level("INFO"):
        for _ in range(50):
            slot.run(abs, -1)
        wait_replaced(launcher, before)

    assert "it has grown from" in caplog.text


# ── children that do not come to a body ─────────────────────────────────────────────────────────


STILLBORN = """
import os
from isolated_tasks.process import child
if os.path.exists({flag!r}):
    child._be_born = lambda *_: child.os._exit(9)
"""


@pytest.mark.fault(42, 44)
def test_children_that_die_at_birth_open_the_breaker_and_have_the_forkserver_replaced(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    (tmp_path / "stillborn_for_now.py").write_text(STILLBORN.format(flag=str(flag)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 0.001)
    launcher = new_launcher(preload=["stillborn_for_now"])
    slot = make_slot(address=launcher.address)
    before = only(launcher)

    with pytest.raises(ChildLostError, match="5 children in a row") as caught:
        slot.run(abs, -1)
    error = caught.value
    assert error.started is False
    assert (error.exit_code, error.stderr) == (9, "")
    assert error.peak_rss_bytes
    # Open: one try for each call.
    with pytest.raises(ChildLostError, match="6 children in a row"):
        slot.run(abs, -1)
    flag.unlink()
    with caplog.at_level("INFO"):
        wait_replaced(launcher, before)

    assert "5 children in a row went before they had begun a body" in caplog.text
    assert slot.run(abs, -1) == 1
    assert not slot.children._breaker.failures


@pytest.mark.fault(21, 38)
def test_that_a_requester_had_no_descriptors_does_not_make_its_forkserver_worn(
    launcher: Launcher, make_slot: MakeSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 0.001)
    slot = make_slot(address=launcher.address)
    short = dataclasses.replace(slot.options, start_timeout=0.2)
    before = only(launcher)
    # One that has started but a few could not be judged.
    for _ in range(breaker.OPEN_FROM):
        slot.run(abs, -1)
    slot.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = next(n for n in itertools.count() if not os.path.exists(f"/proc/self/fd/{n}"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(ForkserverError, match="Too many open files"):
            slot.outcome(short, abs, -1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert slot.children._breaker.is_open

    # It is told with the next request, and would say so before its call returns.
    assert slot.run(os.getppid) == before

    launcher.check()
    assert launcher._places[0].current is not None
    assert launcher._places[0].current.worn is None
    assert only(launcher) == before


STERILE = """
import os
from isolated_tasks.process import system
fork, tries = system.fork, 0
def fork_later():
    global tries
    tries += 1
    if tries <= 8:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()
system.fork = fork_later
"""


@pytest.mark.fault(38, 42)
def test_a_fork_that_fails_for_a_while_fails_no_call(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "sterile_for_a_while.py").write_text(STERILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 0.001)
    slot = make_slot(address=new_launcher(preload=["sterile_for_a_while"]).address)

    assert slot.run(abs, -1) == 1


@pytest.mark.fault(44)
def test_while_the_breaker_is_open_a_call_waits_no_longer_than_it_would_for_a_child(
    make_slot: MakeSlot,
) -> None:
    slot = make_slot(start_timeout=0.05)
    for _ in range(30):
        slot.children._breaker.failed("a test wants it")

    with pytest.raises(ForkserverError, match=r"within 0\.05 s .*in 30 s.*a test wants it"):
        slot.run(abs, -1)

    # The next call is to wait no longer.
    slot.children._breaker.succeeded()
