"""The launcher replaces forkservers that die, and no call suffers from it."""

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from harness import bodies
from harness.processes import (
    PATIENCE,
    Background,
    Mailbox,
    Slot,
    Word,
    program,
    survivors,
    wait_connected,
    wait_gone,
    wait_status,
)
from isolated_tasks.errors import ChildLostError, ForkserverError
from isolated_tasks.process import launcher as launching
from isolated_tasks.process import pickling, system
from isolated_tasks.process.children import Children
from isolated_tasks.process.launcher import FIRST_DELAY, LAST_DELAY, Launcher, Plan
from isolated_tasks.process.options import ProcessOptions
from isolated_tasks.process.supervisor import Supervisor

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]


@pytest.fixture
def launcher(new_launcher: NewLauncher) -> Launcher:
    return new_launcher(preload=["harness.bodies"])


def kill_forkserver(launcher: Launcher) -> int:
    (pid,) = launcher.pids()
    os.kill(pid, signal.SIGKILL)
    wait_gone([pid])
    return pid


def replace_forkserver(launcher: Launcher) -> int:
    """What the owner of a launcher does when it hears that the forkserver is gone."""
    (dead,) = launcher.pids()
    # Not at once: a child that is being born holds a copy of the status socket for a moment.
    while launcher.pids() == [dead]:
        assert select.select(launcher.descriptors(), [], [], PATIENCE)[0]
        assert launcher.check() is None
    launcher.wait_loaded(PATIENCE)
    (pid,) = launcher.pids()
    return pid


def tells_exit_codes() -> bool:
    """Whether this kernel tells the exit code of a process that somebody else has reaped."""
    with subprocess.Popen(["sh", "-c", "exit 3"]) as process:
        pidfd = system.open_pidfd(process.pid)
        process.wait()
    if pidfd is None:
        return False
    try:
        return system.pidfd_exit_code(pidfd) == 3
    finally:
        os.close(pidfd)


# ── between calls ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(39)
def test_a_dead_forkserver_is_noticed_and_replaced(launcher: Launcher, make_slot: MakeSlot) -> None:
    slot = make_slot(address=launcher.address)
    address = launcher.address
    before = slot.run(os.getppid)

    assert kill_forkserver(launcher) == before
    ready, _, _ = select.select(launcher.descriptors(), [], [], PATIENCE)
    assert ready
    after = replace_forkserver(launcher)

    assert after != before
    assert launcher.address == address
    assert slot.run(os.getppid) == after


def test_the_replacement_has_loaded_the_same(launcher: Launcher) -> None:
    (before,) = launcher.loaded()
    kill_forkserver(launcher)

    replace_forkserver(launcher)

    (after,) = launcher.loaded()
    assert [entry["name"] for entry in after.entries] == [e["name"] for e in before.entries]
    assert after.pid != before.pid


def test_a_launcher_that_is_well_has_nothing_to_do(launcher: Launcher) -> None:
    pids = launcher.pids()

    assert launcher.check() is None

    assert launcher.pids() == pids
    assert select.select(launcher.descriptors(), [], [], 0)[0] == []


@pytest.mark.fault(39)
def test_a_call_made_while_there_is_no_forkserver_is_served_by_the_next_one(
    launcher: Launcher,
) -> None:
    kill_forkserver(launcher)
    # It connects and asks; the connection waits in the queue of the launcher's socket.
    supervisor = Supervisor(launcher.address, ProcessOptions("test"))
    after = replace_forkserver(launcher)

    outcome = supervisor.call(pickling.dumps((os.getppid, (), {})))

    assert outcome.result() == after
    assert supervisor.wait_exited(PATIENCE)
    supervisor.close()


def test_a_call_replaces_the_forkserver_that_it_waits_for(launcher: Launcher) -> None:
    # As in a worker whose slots are its main process: nobody else is there to do it.
    def address() -> str:
        launcher.check()
        return launcher.address

    (before,) = launcher.pids()
    os.kill(before, signal.SIGSTOP)
    wait_status(before, psutil.STATUS_STOPPED)
    children = Children()
    pickled = pickling.dumps((os.getppid, (), {}))
    with Background(children.call, pickled, ProcessOptions("test"), address) as call:
        wait_connected(launcher.address)
        os.kill(before, signal.SIGKILL)

        after = call.result().result()

    children.close()
    assert launcher.pids() == [after]
    assert after != before


def test_a_call_made_while_nobody_replaces_the_forkserver_fails_in_time(
    launcher: Launcher, make_slot: MakeSlot
) -> None:
    kill_forkserver(launcher)
    slot = make_slot(address=launcher.address, start_timeout=0.1, exit_timeout=0.1)

    with pytest.raises(ForkserverError, match=r"within 0\.1 s") as caught:
        slot.run(abs, -1)

    assert caught.value.address == launcher.address
    slot.children.close(timeout=0.1)


# ── during a call ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(39)
@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_call_under_way_carries_on_and_returns(
    *,
    launcher: Launcher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    is_replaced: bool,
    start_method: str,
) -> None:
    slot = make_slot(address=launcher.address, start_method=start_method)
    with Background(slot.run, bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        kill_forkserver(launcher)
        if is_replaced:
            replace_forkserver(launcher)
        word.give("done")

        assert call.result() == (pid, "done")


@pytest.mark.fault(39)
@pytest.mark.parametrize("code", [0, 3, -signal.SIGSEGV, -signal.SIGKILL])
def test_a_child_that_is_lost_without_a_forkserver_is_told_as_well_as_the_kernel_can(
    *, launcher: Launcher, make_slot: MakeSlot, mailbox: Mailbox, word: Word, code: int
) -> None:
    slot = make_slot(address=launcher.address)
    with Background(slot.run, bodies.report_wait_and_leave, mailbox.path, word.path, code) as call:
        (pid,) = mailbox.read()
        kill_forkserver(launcher)
        word.give()

        with pytest.raises(ChildLostError) as caught:
            call.result()

    assert caught.value.pid == pid
    assert caught.value.peak_rss_bytes is None
    # An older kernel tells as long as init has not reaped it.
    assert caught.value.exit_code in ({code} if tells_exit_codes() else {code, None})
    if code == -signal.SIGSEGV:
        assert "report_wait_and_leave" in caught.value.crash_traceback


@pytest.mark.fault(24)
def test_a_grandchild_that_holds_the_call_socket_open_does_not_delay_the_verdict_either(
    *, launcher: Launcher, make_slot: MakeSlot, mailbox: Mailbox, word: Word, start_method: str
) -> None:
    slot = make_slot(address=launcher.address, start_method=start_method)
    body = bodies.report_wait_and_leave_a_daemon
    with Background(slot.run, body, mailbox.path, word.path) as call:
        mailbox.read()
        kill_forkserver(launcher)
        word.give()
        (daemon,) = mailbox.read()
        try:
            with pytest.raises(ChildLostError):
                call.result()
        finally:
            os.kill(daemon, signal.SIGKILL)


@pytest.mark.fault(39)
def test_a_batch_carries_on_without_its_forkserver(launcher: Launcher, make_slot: MakeSlot) -> None:
    slot = make_slot(address=launcher.address, batch_size=3)
    pid = slot.run(os.getpid)

    kill_forkserver(launcher)

    assert [slot.run(os.getpid) for _ in range(2)] == [pid, pid]
    slot.close()
    replace_forkserver(launcher)
    assert slot.run(os.getpid) != pid


@pytest.mark.fault(39)
def test_a_new_call_runs_beside_one_whose_forkserver_is_dead(
    *, launcher: Launcher, make_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    slot = make_slot(address=launcher.address, slots=2)
    with Background(slot.run, bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        kill_forkserver(launcher)
        after = replace_forkserver(launcher)

        assert slot.run(os.getppid) == after

        word.give("done")
        assert call.result() == (pid, "done")


@pytest.mark.fault(51)
def test_a_stream_of_calls_runs_once_each_while_forkservers_are_killed(
    launcher: Launcher, make_slot: MakeSlot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the pauses of those that do not last.
    monkeypatch.setattr("isolated_tasks.process.launcher.SETTLED_SECONDS", 0.0)
    traces = tmp_path / "traces"
    slot = make_slot(address=launcher.address)

    def stream() -> list[int]:
        return [slot.run(bodies.append, str(traces), number) for number in range(150)]

    with Background(stream) as calls:
        for killed in range(5):
            # Somewhere in the middle of a call, each time.
            seen = 20 * (killed + 1)
            while not traces.exists() or len(traces.read_text().split()) < seen:
                if not calls.is_running:
                    pytest.fail(f"the stream has ended: {calls.result()}")
            kill_forkserver(launcher)
            replace_forkserver(launcher)

        assert len(set(calls.result())) == 150
    assert traces.read_text().split() == [str(number) for number in range(150)]


# ── forkservers that do not come up ─────────────────────────────────────────────────────────────


def test_a_forkserver_that_dies_while_it_loads_is_started_again_after_a_while(
    new_launcher: NewLauncher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "deadly.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["deadly"], wait=False)

    with pytest.raises(ForkserverError, match="died while it loaded"):
        launcher.wait_loaded(PATIENCE)

    wait = launcher.check()
    assert wait is not None
    assert 0 < wait <= FIRST_DELAY
    # What killed it is mended, and time has passed.
    (tmp_path / "deadly.py").write_text("")
    monkeypatch.setattr(launcher._places[0], "not_before", 0.0)
    assert launcher.check() is None
    while not launcher.loaded():
        assert select.select(launcher.descriptors(), [], [], PATIENCE)[0]
        launcher.check()


@pytest.mark.fault(41)
def test_a_forkserver_that_does_not_get_ready_is_an_error_and_can_be_stopped(
    new_launcher: NewLauncher, monkeypatch: pytest.MonkeyPatch, mailbox: Mailbox
) -> None:
    monkeypatch.setenv("HANG_IN_PRELOAD", mailbox.path)
    launcher = new_launcher(preload=["harness.hanging"], wait=False)
    (pid,) = mailbox.read()

    with pytest.raises(ForkserverError, match=r"within 0\.05 s"):
        launcher.wait_loaded(0.05)
    launcher.stop()

    assert survivors([pid], timeout=0) == set()


@pytest.mark.fault(39)
def test_forkservers_that_die_soon_after_they_have_loaded_are_replaced_with_growing_pauses(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place,) = launcher._places
    waits = []
    # Once is no pattern.
    kill_forkserver(launcher)
    replace_forkserver(launcher)
    for _ in range(2):
        kill_forkserver(launcher)
        waits.append(launcher.check())
        assert launcher.pids() == []
        # The pause is over.
        place.not_before = 0.0
        assert launcher.check() is None
        launcher.wait_loaded(PATIENCE)
    first, second = waits
    assert first is not None
    assert second is not None
    assert 0 < first <= 2 * FIRST_DELAY < second <= 4 * FIRST_DELAY

    # One that has lasted does not count, nor do those before it.
    monkeypatch.setattr(launching, "SETTLED_SECONDS", 0.0)
    for _ in range(3):
        kill_forkserver(launcher)
        replace_forkserver(launcher)


#: Writes nonsense to the main process when it starts a child, while there is such a file.
GARBLED = """
import os
arguments = open("/proc/self/cmdline").read().split("\\0")
status = int(arguments[arguments.index("isolated_tasks.process.forkserver") + 2])
def talk():
    if os.path.exists({flag!r}):
        os.write(status, b"GET / HTTP/1.1 Host: nobody")
os.register_at_fork(after_in_parent=talk)
"""


def test_a_forkserver_that_sends_nonsense_is_replaced_and_takes_nothing_along(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    flag = tmp_path / "flag"
    (tmp_path / "garbled.py").write_text(GARBLED.format(flag=str(flag)))
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["garbled"])
    (before,) = launcher.pids()
    slot = make_slot(address=launcher.address)
    flag.touch()

    assert slot.run(abs, -1) == 1
    flag.unlink()
    launcher.check()

    assert f"forkserver pid={before} sent nonsense" in caplog.text
    launcher.wait_loaded(PATIENCE)
    assert launcher.pids() != [before]
    assert slot.run(abs, -2) == 2


def test_a_start_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonesuch/python")
    launcher = Launcher(Plan())

    with pytest.raises(FileNotFoundError):
        launcher.start()

    assert launcher.pids() == []


def test_a_replacement_that_cannot_be_started_is_tried_again_after_a_while(
    launcher: Launcher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("isolated_tasks.process.launcher.SETTLED_SECONDS", 0.0)
    kill_forkserver(launcher)
    (server,) = launcher._places
    waits = []
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/nonesuch/python")
        # Three times in a row; then after a night of it.
        for failures in (0, 1, 2, 5000):
            broken.setattr(server, "failures", failures)
            broken.setattr(server, "not_before", 0.0)
            waits.append(launcher.check())

    assert waits == [FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY, LAST_DELAY]
    assert "/nonesuch/python" in caplog.text
    assert launcher.check() is None
    assert make_slot(address=launcher.address).run(abs, -1) == 1


# ── the socket's place ──────────────────────────────────────────────────────────────────────────


def test_a_long_temporary_folder_does_not_make_the_address_too_long(
    new_launcher: NewLauncher, make_slot: MakeSlot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    launcher = new_launcher()

    assert make_slot(address=launcher.address).run(abs, -1) == 1
    directory = os.path.dirname(launcher.address)
    launcher.stop()
    assert not os.path.exists(directory)


@pytest.mark.fault(36)
def test_a_fork_of_the_main_process_cannot_stop_or_replace_its_forkserver(
    mailbox: Mailbox,
) -> None:
    with program("harness.owner", mailbox.path, "fork") as owner:
        forkserver, directory = mailbox.read()

        # What the copy has to say: which address it knows, and what it has seen.
        assert mailbox.read() == ["copy stopped"]
        assert mailbox.read() == ["original calls", forkserver]

        owner.communicate(timeout=PATIENCE)
        wait_gone([forkserver])
    assert not os.path.exists(directory)
