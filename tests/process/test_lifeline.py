"""Whatever ends a requester ends its child and its grandchildren too."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import psutil
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
    wait_connected,
    wait_gone,
    wait_status,
)
from isolated_tasks.process.launcher import Launcher

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]

#: What a process that hangs looks like from outside.
STATUS = {
    "asleep": psutil.STATUS_SLEEPING,
    "spinning": psutil.STATUS_RUNNING,
    "stuck in C": psutil.STATUS_SLEEPING,
    "stopped": psutil.STATUS_STOPPED,
}


def test_every_way_to_hang_is_tried() -> None:
    assert set(STATUS) == set(bodies.HANGING)


@pytest.fixture
def launcher(new_launcher: NewLauncher) -> Launcher:
    return new_launcher(preload=["harness.bodies"])


@pytest.fixture(params=["with the forkserver", "without the forkserver"])
def bereave(request: pytest.FixtureRequest, launcher: Launcher) -> Callable[[], None]:
    """Kills the forkserver where the test is to do without; nobody replaces it."""

    def kill_or_not() -> None:
        if request.param == "without the forkserver":
            (pid,) = launcher.pids()
            os.kill(pid, signal.SIGKILL)
            wait_gone([pid])

    return kill_or_not


@pytest.mark.fault(29)
@pytest.mark.parametrize("how", bodies.HANGING)
def test_a_killed_requester_takes_its_child_and_grandchildren_along(
    *,
    launcher: Launcher,
    bereave: Callable[[], None],
    mailbox: Mailbox,
    how: str,
    start_method: str,
) -> None:
    arguments = (launcher.address, mailbox.path, how, f"--{start_method}")
    with program("harness.requester", *arguments) as requester:
        pids = mailbox.read()
        wait_status(pids[0], STATUS[how])
        bereave()
        if how != "stopped":
            # The kernel ends (SIGHUP) a group that has lost its last parent while one of it is
            # stopped; see setpgid(2), "orphaned process group".
            assert survivors(pids, timeout=0) == set(pids)

        requester.kill()

        assert survivors(pids) == set()


@pytest.mark.fault(29)
def test_a_group_that_is_stopped_goes_as_a_whole(
    launcher: Launcher, bereave: Callable[[], None], mailbox: Mailbox
) -> None:
    with program("harness.requester", launcher.address, mailbox.path, "asleep") as requester:
        pids = mailbox.read()
        os.killpg(pids[0], signal.SIGSTOP)
        for pid in pids:
            wait_status(pid, psutil.STATUS_STOPPED)
        bereave()

        requester.kill()

        assert survivors(pids) == set()


@pytest.mark.fault(31)
def test_a_copy_of_the_requester_does_not_keep_its_child_alive(
    launcher: Launcher, bereave: Callable[[], None], mailbox: Mailbox, start_method: str
) -> None:
    arguments = (launcher.address, mailbox.path, "asleep", "--copy", f"--{start_method}")
    with program("harness.requester", *arguments) as requester:
        # The copy and the child report in any order.
        messages = sorted([mailbox.read(), mailbox.read()], key=len)
        (copy,), pids = messages
        bereave()
        try:
            requester.kill()

            assert survivors(pids) == set()
            assert survivors([copy], timeout=0) == {copy}
        finally:
            os.kill(copy, signal.SIGKILL)


@pytest.mark.fault(30)
def test_a_requester_that_is_killed_before_its_child_is_born_leaves_none(
    new_launcher: NewLauncher, mailbox: Mailbox
) -> None:
    launcher = new_launcher(preload=["harness.bodies"])
    (forkserver,) = launcher.pids()
    os.kill(forkserver, signal.SIGSTOP)
    wait_status(forkserver, psutil.STATUS_STOPPED)
    with program("harness.requester", launcher.address, mailbox.path, "asleep") as requester:
        # Once it has asked, it sleeps.
        wait_connected(launcher.address)
        wait_status(requester.pid, psutil.STATUS_SLEEPING)
        requester.kill()
        requester.wait()

    os.kill(forkserver, signal.SIGCONT)
    slot = Slot(launcher.address)

    # It was asked first, so that a child of the dead one would have been there before this one.
    assert slot.run(bodies.siblings) == 1
    slot.close()


# ── the child is faster ─────────────────────────────────────────────────────────────────────────

#: A forkserver that is stopped, once, as soon as it has a child.
FORKSERVER_IS_SLOW = """
import os, signal
original = os.setpgid
def stop(pid, group):
    if (pid, group) == (0, 0):
        return original(pid, group)
    os.setpgid = original
    os.kill(os.getpid(), signal.SIGSTOP)
os.setpgid = stop
"""


@pytest.mark.fault(30)
def test_a_child_whose_forkserver_has_yet_to_do_anything_goes_with_its_requester(
    *, new_launcher: NewLauncher, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "forkserver_is_slow.py").write_text(FORKSERVER_IS_SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["harness.bodies", "forkserver_is_slow"])
    (forkserver,) = launcher.pids()
    with program("harness.requester", launcher.address, mailbox.path, "asleep") as requester:
        pids = mailbox.read()
        wait_status(forkserver, psutil.STATUS_STOPPED)

        # The forkserver hears of this later: what ends the child is the lifeline, which is for the
        # group that it leads.
        requester.kill()

        assert survivors(pids) == set()
    os.kill(forkserver, signal.SIGCONT)


# ── requesters that live ────────────────────────────────────────────────────────────────────────


@INTERRUPTS
@pytest.mark.fault(35)
def test_an_exception_that_ends_the_wait_kills_the_child(
    *,
    launcher: Launcher,
    bereave: Callable[[], None],
    mailbox: Mailbox,
    interrupt: Callable[[], None],
    make_slot: MakeSlot,
    start_method: str,
) -> None:
    slot = make_slot(address=launcher.address, start_method=start_method)
    pids: list[int] = []

    def wait_and_interrupt() -> None:
        pids.extend(mailbox.read())
        bereave()
        interrupt()

    with Background(wait_and_interrupt), pytest.raises(Interrupted):
        slot.run(bodies.hang, mailbox.path, "stuck in C")

    assert survivors(pids) == set()
    launcher.check()
    assert slot.run(abs, -1) == 1


@INTERRUPTS
@pytest.mark.fault(35)
def test_an_exception_while_a_large_argument_is_sent_leaves_no_child(
    *, new_launcher: NewLauncher, interrupt: Callable[[], None], make_slot: MakeSlot
) -> None:
    launcher = new_launcher(preload=["harness.bodies"])
    (forkserver,) = launcher.pids()
    os.kill(forkserver, signal.SIGSTOP)
    wait_status(forkserver, psutil.STATUS_STOPPED)
    slot = make_slot(address=launcher.address)

    def wait_and_interrupt() -> None:
        wait_connected(launcher.address)
        interrupt()

    with Background(wait_and_interrupt), pytest.raises(Interrupted):
        slot.run(len, bytes(50 << 20))
    os.kill(forkserver, signal.SIGCONT)

    assert slot.run(bodies.siblings) == 1


def test_the_lifeline_of_one_child_is_not_that_of_another(
    make_slot: MakeSlot, forkserver: Launcher, mailbox: Mailbox, word: Word
) -> None:
    slot = make_slot()
    with Background(slot.run, bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        with program("harness.requester", forkserver.address, mailbox.path, "asleep") as other:
            pids = mailbox.read()
            other.kill()
            assert survivors(pids) == set()
        word.give("done")

        assert call.result() == (pid, "done")


# ── the main process ────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(29)
@pytest.mark.parametrize("ending", ["call", "preload"])
def test_a_killed_main_process_takes_its_forkserver_and_all_children_along(
    mailbox: Mailbox, ending: str
) -> None:
    with program("harness.owner", mailbox.path, ending) as owner:
        forkserver, directory = mailbox.read()
        pids = [forkserver, *mailbox.read()]
        assert os.path.isdir(directory)

        owner.kill()

        assert survivors(pids) == set()
    if ending == "call":
        assert not os.path.exists(directory)
    else:
        # A forkserver that is stuck in C cannot clear up. The name is never used again.
        for name in os.listdir(directory):
            os.unlink(os.path.join(directory, name))
        os.rmdir(directory)


def test_what_the_last_child_has_left_goes_before_the_forkserver(mailbox: Mailbox) -> None:
    with program("harness.owner", mailbox.path, "daemon") as owner:
        forkserver, _ = mailbox.read()
        pids = mailbox.read()
        # So that it finds its main process and its last child gone at the same time.
        os.kill(forkserver, signal.SIGSTOP)
        wait_status(forkserver, psutil.STATUS_STOPPED)
        owner.kill()
        owner.wait()

        os.kill(forkserver, signal.SIGCONT)

        # The daemon, and its child, which the forkserver inherits only when that is dead.
        assert survivors([*pids, forkserver]) == set()


def test_a_main_process_that_leaves_without_a_word_leaves_nothing_behind(mailbox: Mailbox) -> None:
    with program("harness.owner", mailbox.path, "exit") as owner:
        forkserver, directory = mailbox.read()

        assert _exit_code(owner) == 0

        wait_gone([forkserver])
    assert not os.path.exists(directory)


def _exit_code(process: "Popen[str]") -> int:
    process.communicate(timeout=30)
    return process.returncode
