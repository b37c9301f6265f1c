"""A process is killed before each step of a call's life, one run for each step.

Whoever it is, the call has one verdict, the body has run once at most, nothing survives, and the
next call works. A step is a call into the kernel; `harness.killing` says how it is hit.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness import doomed
from harness.doomed import CASES
from harness.killing import Order
from harness.process_fixtures import MakeSlot, NewLauncher
from harness.processes import PATIENCE, Background, Slot, program, settle, survivors, wait_gone
from isolated_tasks.errors import ChildLostError
from isolated_tasks.process import launcher as launching
from isolated_tasks.process.cgroup import PREFIX
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.pickling import Pickled

#: More steps than a call has; a role that goes on beyond them does not end.
MANY = 2000

EVERY_STEP = bool(os.environ.get("EVERY_STEP"))

#: Each step takes a process or two, so only some are tried, other ones in each case, unless all are
#: asked for: ``make interleavings``.
PACE = 1 if EVERY_STEP else 17
#: A child needs nobody started beside it, so there are more of its steps: in the case that is
#: first, and where it is forked.
CHILD_PACE = 1 if EVERY_STEP else 7
#: Beyond this step there are looks at each process of the machine, and little else.
LONG = 200 if EVERY_STEP else 120

pytestmark = pytest.mark.timeout(3000 if EVERY_STEP else 120)

each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    monkeypatch.setenv("ISOLATED_TASKS_TEST_ORDER", "")  # undone after the test
    return Order(tmp_path / "order")


@pytest.fixture
def launcher(order: Order, new_launcher: NewLauncher) -> Launcher:
    return new_launcher(preload=["harness.bodies", "harness.killing"])


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    return tmp_path / "traces"


def runs(traces: Path) -> int:
    """How often the body has run since the last time."""
    count = len(traces.read_text().splitlines()) if traces.exists() else 0
    traces.unlink(missing_ok=True)
    return count


def left(traces: Path) -> list[int]:
    """The processes that bodies have left since the last time."""
    path = Path(f"{traces}.left")
    pids = [int(pid) for pid in path.read_text().split()] if path.exists() else []
    path.unlink(missing_ok=True)
    return pids


def children_of(pid: int) -> set[int]:
    try:
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def steps(case: str, start_method: str, *, pace: int = PACE) -> Iterator[int]:
    """Those that are tried, until there are no more."""
    yield 1
    step = 2
    if not EVERY_STEP:
        step += 2 * list(CASES).index(case) + (start_method == "spawn")
    while step < MANY:
        yield step
        step += pace if step < LONG else max(pace, step // (20 if EVERY_STEP else 2))
    raise AssertionError("it does not end")


def groups_of(pids: list[int], launcher: Launcher) -> list[str]:
    """The control groups that these forkservers have made and that are still there."""
    (loaded,) = launcher.loaded()
    _, found, folder = loaded.memory_limits.partition(" groups below ")
    names = os.listdir(folder) if found else []
    return [name for pid in pids for name in names if name.startswith(f"{PREFIX}{pid}-")]


def call(slot: Slot, pickled: Pickled) -> str:
    """The verdict of one call; any other end of it fails the test."""
    try:
        slot.children.call(pickled, slot.options, lambda: slot.address).result()
    except ChildLostError as exc:
        return "lost" if exc.started else "not begun"
    return "returned"


def prepare(slot: Slot, case: str) -> None:
    """What comes before the call, with nobody killed."""
    before = doomed.prepare(case)
    if before is not None:
        assert call(slot, before) == "returned"


@pytest.mark.fault(2, 48)
@each_case
def test_a_child_may_be_killed_at_any_step(
    *,
    launcher: Launcher,
    order: Order,
    make_slot: MakeSlot,
    traces: Path,
    case: str,
    start_method: str,
) -> None:
    slot = make_slot(address=launcher.address, start_method=start_method, **CASES[case])
    (forkserver,) = launcher.pids()
    verdicts = []
    in_detail = EVERY_STEP or case == "one call" or start_method == "forkserver"
    for step in steps(case, start_method, pace=CHILD_PACE if in_detail else PACE):
        prepare(slot, case)
        order.give("child", step)
        verdicts.append(call(slot, doomed.body(case, str(traces))))
        slot.close()
        hit = order.was_carried_out()
        # Nobody is told that nothing of the body has run when something has.
        assert runs(traces) <= (0 if verdicts[-1] == "not begun" else 1)
        assert survivors(left(traces)) == set()
        # What is killed with the child's group may end after it; what has ended is its to reap.
        wait_gone(children_of(forkserver))
        settle(launcher)
        assert children_of(forkserver) == set()
        assert launcher.pids() == [forkserver]
        if not hit:
            break

    print(f"killed before each of {step - 1} steps")
    # Before it has accepted the call it is replaced, and nobody notices; then it is lost, first
    # without and then with its body begun, until it has sent the outcome. The steps between
    # acceptance and body may be too few for one of them to be hit.
    assert set(verdicts) <= {"returned", "not begun", "lost"}
    assert "lost" in verdicts or not in_detail
    assert verdicts[-1] == "returned"


@pytest.mark.fault(39)
@each_case
def test_a_forkserver_may_be_killed_at_any_step(
    *,
    launcher: Launcher,
    order: Order,
    make_slot: MakeSlot,
    traces: Path,
    case: str,
    start_method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Else those that are killed one soon after the other are replaced with pauses.
    monkeypatch.setattr(launching, "SETTLED_SECONDS", 0.0)
    slot = make_slot(address=launcher.address, start_method=start_method, **CASES[case])
    verdicts = []
    killed: list[int] = []
    for step in steps(case, start_method):
        prepare(slot, case)
        before = launcher.pids()
        order.give("forkserver", step)
        with Background(call, slot, doomed.body(case, str(traces))) as verdict:
            while verdict.is_running:
                # Its owner, who would hear of it, replaces it.
                launcher.check()
        slot.close()
        verdicts.append(verdict.result())
        hit = order.was_carried_out()
        if hit:
            killed += before
            wait_gone(before)
            launcher.check()
            launcher.wait_loaded(PATIENCE)
        assert runs(traces) == 1
        assert survivors(left(traces)) == set()
        (forkserver,) = launcher.pids()
        settle(launcher)
        assert children_of(forkserver) == set()
        if not hit:
            break

    print(f"killed before each of {step - 1} steps")
    assert set(verdicts) == {"returned"}
    assert killed
    # Each sweeps away what the ones before have left; of the last one there may be what was in use.
    assert groups_of(killed[:-1], launcher) == []


@pytest.mark.fault(29, 30)
@each_case
def test_a_requester_may_be_killed_at_any_step(
    *,
    launcher: Launcher,
    order: Order,
    make_slot: MakeSlot,
    traces: Path,
    case: str,
    start_method: str,
) -> None:
    (forkserver,) = launcher.pids()
    ran = []
    for step in steps(case, start_method):
        order.give("requester", step)
        arguments = (launcher.address, case, start_method, str(traces))
        with program("harness.doomed", *arguments) as requester:
            code = requester.wait(PATIENCE)
        hit = order.was_carried_out()
        assert code == (-9 if hit else 0)
        # One more goes through the forkserver: it has dealt with what came before.
        assert make_slot(address=launcher.address).run(abs, -1) == 1
        wait_gone(children_of(forkserver))
        assert survivors(left(traces)) == set()
        ran.append(runs(traces))
        assert launcher.pids() == [forkserver]
        if not hit:
            break

    print(f"killed before each of {step - 1} steps")
    assert ran[-1] == 1
    assert set(ran) == {0, 1}
    assert os.getpid() == psutil.Process(forkserver).ppid()
