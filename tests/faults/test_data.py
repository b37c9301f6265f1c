"""Faults of what travels: arguments, results, exceptions, output."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import bodies, faulty
from harness.faults import fault, in_full
from harness.processes import PATIENCE, Mailbox, Slot, Word, program, settle, survivors, wait_status
from isolated_tasks.errors import ChildLostError, ForkserverError, UnpicklableError
from isolated_tasks.process import pickling, protocol
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.options import CallOptions
from isolated_tasks.process.supervisor import Supervisor, TimeIsUpError

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]


# ── what does not pickle, or does not load ──────────────────────────────────────────────────────


@fault(15)
@pytest.mark.parametrize("error", ["AttributeError", "TypeError", "PicklingError"])
def test_a_result_that_does_not_pickle_is_named_with_the_reason(either: Slot, error: str) -> None:
    with pytest.raises(UnpicklableError) as caught:
        either.run(faulty.return_unpicklable, error)

    assert caught.value.path == 'result["here"][0]'
    assert caught.value.type_name == "harness.faulty.Unpicklable"
    assert caught.value.reason == f"{error}: not this one"


@fault(16)
@pytest.mark.parametrize(
    ("how", "expected", "text"),
    [
        ("two arguments", faulty.TwoArguments, "here: badly"),
        ("a lambda", ValueError, "text"),
        ("a lock", ValueError, "text"),
        ("a generator", ValueError, "text"),
        ("no text", faulty.Mute, "unspeakable"),
        ("an error when it is loaded", faulty.FromElsewhere, "text"),
        ("its own traceback", ValueError, "text"),
        ("itself as its cause", ValueError, "text"),
    ],
)
def test_an_exception_that_does_not_travel_well_keeps_its_type_its_text_and_its_frames(
    either: Slot, how: str, expected: type[Exception], text: str
) -> None:
    with pytest.raises(expected) as caught:
        either.run(faulty.fail_oddly, how)

    assert caught.value.args[0] == text
    assert caught.traceback[-1].name == "fail_oddly"


@fault(17)
@pytest.mark.parametrize(
    ("what", "when", "how", "expected"),
    [
        # As anything that the caller does before there is a call.
        ("argument", "pickled", "an error", LookupError),
        ("argument", "pickled", "SystemExit", SystemExit),
        ("argument", "loaded", "an error", LookupError),
        ("argument", "loaded", "SystemExit", SystemExit),
        ("argument", "loaded", "an exit", "exit code 7"),
        ("argument", "loaded", "a crash", "killed by SIGSEGV"),
        ("result", "pickled", "an error", UnpicklableError),
        ("result", "pickled", "SystemExit", "exit code 70"),
        ("result", "pickled", "an exit", "exit code 7"),
        ("result", "pickled", "a crash", "killed by SIGSEGV"),
        ("result", "loaded", "an error", UnpicklableError),
        # It is the caller that loads it. Celery's side has the child load it first.
        ("result", "loaded", "SystemExit", SystemExit),
    ],
)
def test_what_pickling_and_loading_do_is_told_as_what_it_is(
    either: Slot, what: str, when: str, how: str, expected: type[BaseException] | str
) -> None:
    error = ChildLostError if isinstance(expected, str) else expected
    trap = faulty.Trap(when, how)

    with pytest.raises(error) as caught:
        either.run(*((bodies.echo, trap) if what == "argument" else (faulty.Trap, when, how)))

    if isinstance(expected, str):
        assert expected in str(caught.value)
    elif expected is SystemExit:
        assert caught.value.args == (7,)
    else:
        assert "on purpose" in str(caught.value)


@fault(17)
@pytest.mark.parametrize(("what", "when"), [("argument", "pickled"), ("result", "loaded")])
@pytest.mark.parametrize(("how", "exit_code"), [("an exit", 7), ("a crash", -signal.SIGSEGV)])
def test_a_requester_that_ends_over_its_own_pickles_leaves_nothing(
    forkserver: Launcher, what: str, when: str, how: str, exit_code: int
) -> None:
    with program("harness.caller", forkserver.address, what, when, how) as caller:
        assert caller.wait(PATIENCE) == exit_code


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────

#: Where something changes on the way: small buffers go in the pickle, small frames are read
#: together, large ones into mappings; and what a socket takes at a time.
BORDERS = (
    0,
    protocol.SCRATCH_SIZE,
    pickling.OUT_OF_BAND_FROM,
    protocol.MAPPED_FROM,
    3 << 20,
)


@fault(18)
def test_arguments_and_results_of_all_sizes_come_whole(
    make_slot: MakeSlot, start_method: str
) -> None:
    slot = make_slot(start_method=start_method, batch_size=1000)

    for size in sorted({max(0, border + more) for border in BORDERS for more in (-1, 0, 1)}):
        expected = faulty.bytes_and_arrays(size)
        ((data, array, parts),), _ = slot.run(bodies.echo, faulty.bytes_and_arrays(size))

        assert (data, array.tobytes(), parts) == (expected[0], expected[0], expected[2]), size


@in_full
@fault(18)
@pytest.mark.parametrize("size", [(2 << 30) + 1, (4 << 30) + 1])
def test_a_result_of_gigabytes_comes_whole(either: Slot, size: int) -> None:
    array = either.run(faulty.large_array, size)

    assert (len(array), array[0], array[-1]) == (size, 1, 2)


@in_full
@fault(18)
def test_bytes_of_more_than_two_gigabytes_come_whole(either: Slot) -> None:
    size = (2 << 30) + 10

    result = either.run(bodies.many_bytes, size)

    assert (len(result), result[:1], result[-1:]) == (size, b"a", b"z")


# ── children that go in the middle ──────────────────────────────────────────────────────────────


@fault(20, 48)
def test_a_child_that_is_killed_while_its_argument_is_sent_is_replaced_unseen(
    make_slot: MakeSlot, start_method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slot = make_slot(start_method=start_method)
    killed: list[int] = []
    original = Supervisor._take

    def take(self: Supervisor, message: Any) -> None:
        original(self, message)
        if isinstance(message, protocol.Started) and not killed:
            # More is to be sent than a socket takes, so the child has not got it all.
            killed.append(message.pid)
            os.kill(message.pid, signal.SIGKILL)

    monkeypatch.setattr(Supervisor, "_take", take)

    pid = slot.run(lambda _: bodies.append(str(tmp_path / "traces"), "begun"), bytes(100 << 20))

    assert [pid] != killed
    assert len(killed) == 1
    assert (tmp_path / "traces").read_text() == "begun\n"


# ── no room ─────────────────────────────────────────────────────────────────────────────────────


def held(launcher: Launcher) -> int:
    """Descriptors of a forkserver that has nothing to do."""
    settle(launcher)
    (pid,) = launcher.pids()
    return len(os.listdir(f"/proc/{pid}/fd"))


#: Ways for a child to die before it has read anything, by start method.
STILLBORN = {
    "forkserver": "from isolated_tasks.process import child\n"
    "child._be_born = lambda *_: child.os._exit(9)\n",
    "spawn": "",
}


@fault(21, 44)
def test_descriptors_that_went_to_a_child_that_died_at_birth_are_not_kept(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    start_method: str,
) -> None:
    (tmp_path / "stillborn.py").write_text(STILLBORN[start_method])
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["stillborn"], serves=False)
    # With such a seed an interpreter does not come up.
    env = {"PYTHONHASHSEED": "none"} if start_method == "spawn" else {}

    def lose() -> None:
        # A slot of its own, which begins without the pauses of the one before.
        slot = make_slot(address=launcher.address, start_method=start_method, env=env)
        with pytest.raises(ChildLostError, match="children in a row went") as caught:
            slot.run(bodies.echo, bytes(1 << 20))
        assert not caught.value.started
        slot.close()

    lose()
    before = held(launcher)
    for _ in range(2):
        lose()

    assert held(launcher) == before


@fault(21, 38)
def test_a_forkserver_that_may_not_write_what_a_fresh_interpreter_reads_says_so(
    new_launcher: NewLauncher, make_slot: MakeSlot
) -> None:
    launcher = new_launcher(preload=["harness.bodies"])
    (pid,) = launcher.pids()
    slot = make_slot(address=launcher.address, start_method="spawn")
    slot.run(abs, -1)
    slot.close()
    before = held(launcher)
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))

    for _ in range(3):
        with pytest.raises(ForkserverError, match="File too large"):
            slot.run(abs, -1)
    slot.close()

    assert held(launcher) == before
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert slot.run(abs, -1) == 1


# ── slow readers ────────────────────────────────────────────────────────────────────────────────


@fault(22)
def test_a_child_waits_for_a_requester_that_does_not_read(
    forkserver: Launcher, mailbox: Mailbox, word: Word, start_method: str
) -> None:
    size = 100 << 20
    arguments = ("large", mailbox.path, word.path, str(size), f"--{start_method}")
    with program("harness.caller", forkserver.address, *arguments) as caller:
        (pid,) = mailbox.read()
        caller.send_signal(signal.SIGSTOP)
        wait_status(caller.pid, psutil.STATUS_STOPPED)
        word.give()

        assert survivors([pid], timeout=0.3) == {pid}
        caller.send_signal(signal.SIGCONT)

        assert caller.communicate(timeout=PATIENCE)[0] == f"{size}\n"


# ── output ──────────────────────────────────────────────────────────────────────────────────────


@fault(23)
def test_a_megabyte_that_is_no_text_and_has_no_lines_harms_nobody(either: Slot) -> None:
    assert either.run(faulty.write_much, 1 << 20) == "a result"


@fault(23)
def test_a_body_whose_output_nobody_reads_is_ended_by_its_limit(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    start_method: str,
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # Opened for both, it waits for nobody, and nobody will ever read what is in it.
    (tmp_path / "unread.py").write_text(
        f"import os\nfifo = os.open({str(fifo)!r}, os.O_RDWR)\nos.dup2(fifo, 1)\nos.dup2(fifo, 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["unread", "harness.faulty"])
    slot = make_slot(address=launcher.address, start_method=start_method)
    pickled = pickling.dumps((faulty.write_much, (1 << 20,), {}))

    with pytest.raises(TimeIsUpError):
        slot.children.call(
            pickled, slot.options, lambda: slot.address, CallOptions("test", time_limit=0.1)
        )
