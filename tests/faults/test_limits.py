"""Faults of limits and of their accounting."""

import ast
import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from harness import bodies, faulty
from harness.faults import IN_FULL, fault
from harness.processes import (
    PATIENCE,
    Background,
    Mailbox,
    NoSuchRightError,
    Slot,
    stranger,
    survivors,
    wait_gone,
)
from isolated_tasks import process
from isolated_tasks.errors import ChildLostError, ForkserverError, MemoryLimitExceeded
from isolated_tasks.process import cgroup, pickling
from isolated_tasks.process import launcher as launching
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.options import CallOptions, ProcessOptions, StartMethod
from isolated_tasks.process.protocol import Stop
from isolated_tasks.process.supervisor import StoppedError, Supervisor, TimeIsUpError

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]
NewLimiter = Callable[..., Launcher]

MIB = 1 << 20
#: The memory of a process that does nothing stays below this, with all that is preloaded.
EMPTY = 200 * MIB


# ── memory ──────────────────────────────────────────────────────────────────────────────────────


@fault(46)
@pytest.mark.parametrize(
    ("body", "size"),
    [
        (faulty.grow_slowly, 4 * MIB),
        (faulty.grow_at_once, 1024 * MIB),
        (faulty.share_memory, 400 * MIB),
    ],
    ids=["slowly", "at once", "shared"],
)
def test_growth_is_stopped_however_it_comes(
    *,
    limiter: Launcher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    body: Callable[..., object],
    size: int,
    start_method: str,
) -> None:
    slot = make_slot(
        address=limiter.address, memory_limit_bytes=EMPTY + 100 * MIB, start_method=start_method
    )

    with pytest.raises(MemoryLimitExceeded) as caught:
        slot.run(body, mailbox.path, size)

    # The kernel also kills where there is some room, but not enough for what is asked for at once.
    assert cgroup.is_full(caught.value.peak, EMPTY + 100 * MIB)
    assert survivors(mailbox.read()) == set()


@fault(46)
def test_what_is_no_growth_is_not_taken_for_it(
    limiter: Launcher, make_slot: MakeSlot, start_method: str, tmp_path: Path
) -> None:
    slot = make_slot(
        address=limiter.address,
        memory_limit_bytes=EMPTY + 200 * MIB,
        start_method=start_method,
        batch_size=4,
    )

    assert slot.run(faulty.use_and_free, 150 * MIB, 5) == "well"
    assert slot.run(faulty.map_a_file, str(tmp_path / "large"), 10 << 30) == "well"
    assert slot.run(faulty.reserve, 10 << 30) == "well"
    assert slot.run(faulty.start_threads, 200) == "well"


@fault(46)
def test_what_the_forkserver_holds_is_not_the_child_s(
    new_limiter: NewLimiter, make_slot: MakeSlot, tmp_path: Path, mailbox: Mailbox
) -> None:
    # A fresh interpreter shares nothing with it.
    (tmp_path / "large.py").write_text("memory = bytearray(b'x') * (400 << 20)")
    launcher = new_limiter("large")
    slot = make_slot(address=launcher.address, memory_limit_bytes=300 * MIB)

    # Its resident memory is above the limit.
    assert slot.run(faulty.resident_bytes_after, 0.25) > 400 * MIB
    with pytest.raises(MemoryLimitExceeded):
        slot.run(faulty.grow_at_once, mailbox.path, 300 * MIB)


# ── at the same time ────────────────────────────────────────────────────────────────────────────


@fault(48)
def test_a_limit_a_stop_and_the_end_at_the_same_time_make_one_verdict(
    forkserver: Launcher, make_slot: MakeSlot, mailbox: Mailbox, start_method: str
) -> None:
    slot = make_slot(start_method=start_method, term_grace=0.05)
    rounds = (20 if start_method == "spawn" else 50) * (20 if IN_FULL else 1)
    limit, size = 0.02, MIB
    verdicts: Counter[str] = Counter()

    def call(number: int, call_id: str) -> str:
        options = CallOptions("test", str(number), call_id=call_id, time_limit=limit)
        # As often before as after the limit.
        arguments = (mailbox.path, number, 2 * limit * number / rounds, size)
        pickled = pickling.dumps((faulty.begin_and_end, arguments, {}))
        try:
            outcome = slot.children.call(pickled, slot.options, lambda: slot.address, options)
            assert len(outcome.result()) == size
        except (TimeIsUpError, StoppedError) as exc:
            return type(exc).__name__
        return "result"

    for number in range(rounds):
        call_id = f"race-{start_method}-{number}"
        with Background(call, number, call_id) as running:
            assert mailbox.read() == [number]
            # As often before as after the limit, in another order.
            time.sleep(2 * limit * (number * 7 % rounds) / rounds)
            forkserver.stop_call(Stop(call_id, signal.SIGTERM, "revoked"))
            verdicts[running.result()] += 1

    assert verdicts.total() == rounds
    # Or this would prove little.
    assert len(verdicts) > 1, verdicts
    assert mailbox.is_empty


# ── clocks ──────────────────────────────────────────────────────────────────────────────────────

#: The time of day goes back and forth by days.
JUMPY = """
import itertools, time
days = itertools.cycle([0, 86400 * 30, -86400 * 30])
original = time.time
time.time = lambda: original() + next(days)
def set_up(argument):
    pass
"""


@fault(49)
def test_a_clock_that_jumps_ends_nothing(
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    start_method: str,
) -> None:
    (tmp_path / "jumpy.py").write_text(JUMPY)
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["harness.bodies"], setup="jumpy:set_up", setup_name="the app")
    slot = make_slot(
        address=launcher.address,
        start_method=start_method,
        batch_size=5,
        batch_idle_timeout=1000,
    )
    original, days = time.time, itertools.cycle([0, 86400 * 30, -86400 * 30])
    monkeypatch.setattr(time, "time", lambda: original() + next(days))
    limited = CallOptions("test", "id", soft_time_limit=500, time_limit=1000)

    def call(options: CallOptions, body: Callable[..., object], *args: object) -> object:
        pickled = pickling.dumps((body, args, {}))
        return slot.children.call(pickled, slot.options, lambda: slot.address, options).result()

    jumps = call(limited, faulty.tell_the_time_thrice)
    assert isinstance(jumps, list)
    assert max(jumps) - min(jumps) > 86400 * 30, "the child's clock does not jump"
    assert len({call(limited, os.getpid) for _ in range(4)}) == 1
    with pytest.raises(TimeIsUpError):
        call(CallOptions("test", "id", time_limit=0.05), bodies.hang_alone, "asleep")


@fault(49)
def test_no_module_of_the_process_wing_asks_for_the_time_of_day() -> None:
    found = []
    for path in Path(process.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if ast.unparse(node) in ("time.time", "datetime", "time.localtime", "time.gmtime"):
                found.append(f"{path.name}:{getattr(node, 'lineno', 0)}")

    assert found == []


# ── numbers that are used again ─────────────────────────────────────────────────────────────────


@pytest.fixture
def reaped(make_slot: MakeSlot) -> tuple[Slot, int]:
    """A slot that knows of an idle child, and the number that this has had."""
    slot = make_slot(batch_size=9, batch_idle_timeout=1000)
    pid = slot.run(os.getpid)
    os.kill(pid, signal.SIGKILL)
    wait_gone([pid])
    tick = threading.Event()
    while psutil.pid_exists(pid):
        tick.wait(0.001)
    return slot, pid


@fault(50)
def test_a_stranger_with_the_number_of_a_child_is_left_alone(
    reaped: tuple[Slot, int], forkserver: Launcher
) -> None:
    slot, pid = reaped
    try:
        with stranger(pid) as other:
            # All that might send something: a stop, the next call, the end of the slot.
            forkserver.stop_call(Stop("nobody-s", signal.SIGKILL, "revoked"))
            assert slot.run(os.getpid) != pid
            slot.close()

            assert survivors([other.pid], timeout=0.1) == {pid}
    except NoSuchRightError as exc:
        pytest.skip(f"no right to choose pids: {exc}")


@fault(50)
@pytest.mark.parametrize("keep_children", [False, True])
def test_a_child_that_has_gone_unseen_is_not_killed_by_its_number(
    *, forkserver: Launcher, start_method: StartMethod, keep_children: bool
) -> None:
    options = ProcessOptions(
        "test",
        start_method,
        batch_size=9,
        batch_idle_timeout=1000,
        keep_children=keep_children,
    )
    supervisor = Supervisor(forkserver.address, options)
    pid = supervisor.call(pickling.dumps((os.getpid, (), {}))).result()
    os.kill(pid, signal.SIGKILL)
    wait_gone([pid])
    tick = threading.Event()
    while psutil.pid_exists(pid):
        tick.wait(0.001)

    try:
        with stranger(pid) as other:
            (below,) = psutil.Process(other.pid).children()
            # It has not looked since, and takes the child for one that lives.
            supervisor.kill()
            assert supervisor.wait_exited(PATIENCE)
            supervisor.close()

            assert survivors([pid, below.pid], timeout=0.1) == {pid, below.pid}
    except NoSuchRightError as exc:
        supervisor.close()
        pytest.skip(f"no right to choose pids: {exc}")


# ── all of it ───────────────────────────────────────────────────────────────────────────────────


@fault(51)
def test_calls_have_one_verdict_each_while_children_and_forkservers_are_killed(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    start_method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Else those that are killed one soon after the other are replaced with pauses.
    monkeypatch.setattr(launching, "SETTLED_SECONDS", 0.0)
    traces = tmp_path / "traces"
    launcher = new_launcher(preload=["harness.faulty"])
    slot = make_slot(address=launcher.address, slots=3, start_method=start_method)
    each = 5 if start_method == "spawn" else 60
    if IN_FULL:
        each *= 20

    def calls(first: int) -> list[str]:
        return [one(number) for number in range(first, first + each)]

    def one(number: int) -> str:
        options = CallOptions("test", str(number), time_limit=0.05 if number % 5 == 0 else None)
        body = (faulty.begin_and_stay if number % 5 == 0 else bodies.append, (str(traces), number))
        try:
            slot.children.call(
                pickling.dumps((*body, {})), slot.options, lambda: slot.address, options
            ).result()
        except (ChildLostError, TimeIsUpError, ForkserverError) as exc:
            return type(exc).__name__
        return "result"

    callers = [Background(calls, first) for first in (0, 10_000, 20_000)]
    tick = threading.Event()
    kills, killed_at = 0, 0
    with callers[0], callers[1], callers[2]:
        while any(caller.is_running for caller in callers):
            launcher.check()
            begun = len(traces.read_text().split()) if traces.exists() else 0
            # Some calls come through between two kills, or this would only show that none do.
            if begun >= killed_at + 2:
                kills, killed_at = kills + 1, begun
                _kill(launcher.pids() if kills % 8 == 0 else _children(launcher))
            tick.wait(0.002)

    verdicts = Counter(verdict for caller in callers for verdict in caller.result())
    assert verdicts.total() == 3 * each
    assert verdicts["result"] > 0
    # Or this would prove little.
    assert len(verdicts) > 1, verdicts
    numbers = traces.read_text().split()
    assert len(numbers) == len(set(numbers))


def _children(launcher: Launcher) -> list[int]:
    try:
        return [child.pid for pid in launcher.pids() for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def _kill(pids: list[int]) -> None:
    """Kill the first of them, if there is one."""
    for pid in pids[:1]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
