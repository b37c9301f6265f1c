"""The kernel runs out of memory for a whole worker, in a control group: it takes the child."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.worker import Worker
from isolated_tasks import ChildLostError
from isolated_tasks.process import memory
from isolated_tasks.process.memory import ControlGroup

StartWorker = Callable[..., Worker]

TIMEOUT = 60
MIB = 1 << 20

#: What the whole worker may have.
LIMIT = 500 * MIB


def write(path: Path, text: object) -> None:
    # Not Path.write_text, which would make a file where the kernel has none.
    with path.open("r+") as file:
        file.write(str(text))


@pytest.fixture
def machine(redis_url: str) -> Iterator[ControlGroup]:
    """A control group with little memory, which whatever this process starts is in.

    But for Redis, which is for all tests and has been started by now.
    """
    groups = memory.control_groups()
    if not groups:
        pytest.skip("no control groups that know of memory are mounted")
    own = groups[0]
    group = ControlGroup(own.folder / f"test-{os.getpid()}", own.version)
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    try:
        group.folder.mkdir()
    except OSError as exc:
        pytest.skip(f"no control group can be made: {exc}")
    try:
        try:
            write(group.folder / names[own.version], LIMIT)
            write(group.folder / "cgroup.procs", os.getpid())
        except OSError as exc:
            pytest.skip(f"a control group cannot be given a limit, or be entered: {exc}")
        if group.oom_kills() is None:
            pytest.skip("this kernel does not count what it kills in a control group")
        yield group
    finally:
        write(own.folder / "cgroup.procs", os.getpid())
        group.folder.rmdir()


@pytest.mark.fault(47)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_kernel_takes_the_child_and_not_the_worker_and_the_error_says_so(
    machine: ControlGroup, worker: StartWorker, pool: str
) -> None:
    running = worker("greedy", pool=pool)
    slot = running.call("greedy.slot").get(timeout=TIMEOUT)
    assert machine.oom_kills() == 0

    with pytest.raises(ChildLostError) as caught:
        running.call("greedy.hold", 2 * LIMIT).get(timeout=TIMEOUT)

    error = caught.value
    assert (error.signal, error.oom_killed) == ("SIGKILL", True)
    assert error.oom_evidence == f"oom_kill of {machine.folder} rose from 0 to 1"
    assert f"was killed by the kernel's out-of-memory killer ({error.oom_evidence})" in str(error)
    assert "Give the task a memory_limit" in str(error)
    assert machine.oom_kills() == 1
    assert error.peak_rss_bytes is not None
    assert error.peak_rss_bytes > LIMIT // 2
    # The same slot, of the same worker, serves the next.
    assert running.call("greedy.slot").get(timeout=TIMEOUT) == slot
    assert running.call("greedy.hold", MIB).get(timeout=TIMEOUT)
