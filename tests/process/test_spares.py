"""Children that are there before their call: they save a fork, and cost nothing but that."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from harness import bodies
from harness.processes import Background, Mailbox, Slot, Word, program, settle, survivors, wait_gone
from isolated_tasks.process import pickling
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.options import CallOptions, ProcessOptions
from isolated_tasks.process.protocol import Stop
from isolated_tasks.process.supervisor import StoppedError

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]


@pytest.fixture
def launcher(new_launcher: NewLauncher) -> Launcher:
    return new_launcher(preload=["harness.bodies"])


@pytest.fixture
def new_slot(launcher: Launcher, make_slot: MakeSlot) -> MakeSlot:
    # However busy this machine is.
    defaults = {"address": launcher.address, "spares": 1, "batch_idle_timeout": 600.0}
    return lambda **options: make_slot(**{**defaults, **options})


def children_of(launcher: Launcher) -> set[int]:
    """The children that there are once all has settled."""
    settle(launcher)
    (pid,) = launcher.pids()
    return {child.pid for child in psutil.Process(pid).children()}


def spare_of(slot: Slot, launcher: Launcher) -> int:
    """Have two calls made, and return the process that is there for the third."""
    first, second = slot.run(os.getpid), slot.run(os.getpid)
    wait_gone([first, second])
    (spare,) = children_of(launcher)
    return spare


def test_a_call_is_served_by_a_spare_and_leaves_another(
    launcher: Launcher, new_slot: MakeSlot
) -> None:
    slot = new_slot()
    spare = spare_of(slot, launcher)

    assert slot.run(os.getpid) == spare

    wait_gone([spare])
    (another,) = children_of(launcher)
    assert slot.run(os.getpid) == another


def test_without_spares_there_is_none(launcher: Launcher, new_slot: MakeSlot) -> None:
    slot = new_slot(spares=0)
    pids = {slot.run(os.getpid) for _ in range(3)}
    wait_gone(pids)

    assert children_of(launcher) == set()
    assert len(pids) == 3


def test_one_call_is_no_reason_to_expect_another(launcher: Launcher, new_slot: MakeSlot) -> None:
    slot = new_slot()
    others = [ProcessOptions(name) for name in "abcb"]

    wait_gone([slot.outcome(options, os.getpid).result() for options in others])

    assert children_of(launcher) == set()


@pytest.mark.parametrize(
    "options",
    [{"start_method": "spawn"}, {"memory_limit_bytes": 1 << 30}, {"batch_size": 2}],
    ids=str,
)
def test_what_would_hold_something_has_no_spare(
    launcher: Launcher, new_slot: MakeSlot, options: dict[str, object]
) -> None:
    slot = new_slot(**options)
    wait_gone({slot.run(os.getpid) for _ in range(4)})

    assert children_of(launcher) == set()


def test_there_are_no_more_spares_than_may_be(launcher: Launcher, new_slot: MakeSlot) -> None:
    slot = new_slot()
    first = spare_of(slot, launcher)
    # One for the other task takes its place.
    other = ProcessOptions("other")
    pids = [slot.outcome(other, os.getpid).result() for _ in range(2)]
    wait_gone([first, *pids])

    (spare,) = children_of(launcher)

    assert slot.outcome(other, os.getpid).result() == spare


def test_slots_of_one_process_share_the_spares(
    launcher: Launcher, new_slot: MakeSlot, tmp_path: Path
) -> None:
    slot = new_slot(slots=3, spares=2)
    slot.run(os.getpid)
    words = [Word(tmp_path) for _ in range(3)]
    running: set[int] = set()
    with contextlib.ExitStack() as stack:
        for word in words:
            stack.enter_context(Background(slot.run, bodies.wait_for_word, word.path))
        while len(running) < 5:
            running = children_of(launcher)
        for word in words:
            word.give()

    served = {slot.run(os.getpid) for _ in range(2)}
    assert served <= running


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_spare_that_has_ended_costs_nothing(
    launcher: Launcher, new_slot: MakeSlot, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    slot = new_slot()
    spare = spare_of(slot, launcher)
    os.kill(spare, number)
    wait_gone([spare])
    settle(launcher)

    assert slot.run(os.getpid) != spare

    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"child pid={spare} task=test was killed by" in line
    assert line.endswith("before it had a call")


def test_a_spare_that_ends_as_its_call_comes_is_replaced(
    launcher: Launcher, new_slot: MakeSlot
) -> None:
    slot = new_slot()
    spare = spare_of(slot, launcher)
    os.kill(spare, signal.SIGSTOP)
    with Background(slot.run, os.getpid) as call:
        # It has been sent, and is never read.
        os.kill(spare, signal.SIGKILL)

        assert call.result() != spare


def test_spares_are_of_no_forkserver_that_was_replaced(
    launcher: Launcher, new_slot: MakeSlot
) -> None:
    slot = new_slot()
    spare = spare_of(slot, launcher)
    (before,) = launcher.pids()
    launcher.replace("a test wants it")
    while launcher.pids() == [before]:
        launcher.check()
    # It is told that its forkserver retires, and sees that when it is asked.
    while slot.children._spares[0].is_usable:
        pass

    assert slot.run(os.getppid) == launcher.pids()[0]

    wait_gone([spare])


def test_a_spare_that_nobody_needs_ends(
    launcher: Launcher, new_slot: MakeSlot, caplog: pytest.LogCaptureFixture
) -> None:
    slot = new_slot(batch_idle_timeout=0.2)
    for _ in range(2):
        slot.run(os.getpid)

    (spare,) = slot.children._spares
    assert spare.wait_exited(30)

    assert children_of(launcher) == set()
    assert slot.run(abs, -1) == 1
    assert not caplog.records


def test_renewed_is_renewed(launcher: Launcher, new_slot: MakeSlot) -> None:
    slot = new_slot()
    spare = spare_of(slot, launcher)

    slot.children.renew()

    wait_gone([spare])
    assert slot.run(os.getpid) != spare


def test_a_spare_without_its_forkserver_serves_no_call(
    launcher: Launcher, new_slot: MakeSlot
) -> None:
    slot = new_slot()
    spare = spare_of(slot, launcher)
    (before,) = launcher.pids()
    os.kill(before, signal.SIGKILL)
    wait_gone([before])
    launcher.check()
    launcher.wait_loaded(30)

    assert slot.run(os.getppid) == launcher.pids()[0]

    wait_gone([spare])


def test_a_requester_that_is_killed_takes_its_spare_along(
    launcher: Launcher, mailbox: Mailbox
) -> None:
    with program("harness.spares", launcher.address, mailbox.path) as requester:
        mailbox.read()
        (spare,) = children_of(launcher)

        requester.kill()

        assert survivors([spare]) == set()


def test_a_call_that_was_stopped_before_its_spare_was_asked_for_does_not_begin(
    launcher: Launcher, new_slot: MakeSlot
) -> None:
    slot = new_slot()
    launcher.stop_call(Stop("x", signal.SIGTERM, "a test wants it"))
    settle(launcher)
    spare = spare_of(slot, launcher)
    pickled = pickling.dumps((os.getpid, (), {}))
    options = CallOptions("test", "x", call_id="x")

    with pytest.raises(StoppedError):
        slot.children.call(pickled, slot.options, lambda: slot.address, options, spares=1)

    assert slot.run(os.getpid) != spare


def test_a_forkserver_that_is_stopped_does_not_hold_up_a_call(
    launcher: Launcher, new_slot: MakeSlot
) -> None:
    slot = new_slot()
    spare = spare_of(slot, launcher)
    (pid,) = launcher.pids()
    os.kill(pid, signal.SIGSTOP)
    try:
        # What comes from it, the exit included, is waited for by nobody.
        assert slot.run(os.getpid) == spare
    finally:
        os.kill(pid, signal.SIGCONT)


def test_children_in_their_order_of_birth_never_share_a_slot_s_memory(
    launcher: Launcher, new_slot: MakeSlot
) -> None:
    slot = new_slot()
    for _ in range(30):
        # This one, the spare, and nobody who is still exiting.
        assert slot.run(bodies.siblings) <= 2
