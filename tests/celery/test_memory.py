"""What a worker holds after many heavy calls."""

import re
from collections.abc import Callable, Mapping

import psutil
import pytest

from harness import marks
from harness.processes import PATIENCE
from harness.worker import Worker

StartWorker = Callable[..., Worker]

MB = 1_000_000

CALLS = 200
SIZE = 300 * MB

WARM_UP_CALLS = 20
WARM_UP_SIZE = 30 * MB


def send(worker: Worker, task: str, *, calls: int, size: int) -> None:
    results = [worker.call(f"heavy.{task}", size) for _ in range(calls)]
    for result in results:
        assert result.get(timeout=100) == size


def memory(worker: Worker) -> Mapping[str, tuple[int, int]]:
    """USS and RSS of each process, by its role."""
    forkserver = int(re.findall(r"forkserver pid=(\d+) loaded", worker.log())[-1])
    # The child of the last call has sent its outcome, and may be on its way out.
    assert marks.wait(psutil.Process(forkserver).children(), timeout=PATIENCE) == []
    sizes = {}
    processes = worker.tree()
    # The child of the last call may still be in its exit hooks.
    psutil.wait_procs([process for process in processes if is_child(process, forkserver)], 30)
    for process in processes:
        if process.is_running():
            with process.oneshot():
                sizes[role(process, worker, forkserver)] = own(process)
    return sizes


def is_child(process: psutil.Process, forkserver: int) -> bool:
    try:
        return process.ppid() == forkserver
    except psutil.NoSuchProcess:
        return True


def role(process: psutil.Process, worker: Worker, forkserver: int) -> str:
    if process.pid == worker.pid:
        return "main process"
    if process.pid == forkserver:
        return "forkserver"
    assert process.ppid() == worker.pid
    return "pool process"


def own(process: psutil.Process) -> tuple[int, int]:
    info = process.memory_full_info()
    return info.uss, info.rss


@pytest.mark.timeout(300)
def test_a_worker_stays_flat_where_a_plain_task_makes_it_grow(
    worker: StartWorker, record_property: Callable[[str, object], None]
) -> None:
    running = worker("heavy", concurrency=1)

    send(running, "isolated", calls=WARM_UP_CALLS, size=WARM_UP_SIZE)
    before = memory(running)
    send(running, "isolated", calls=CALLS, size=SIZE)
    after = memory(running)

    # The very same body, in the worker.
    send(running, "plain", calls=1, size=SIZE)
    plain = memory(running)

    assert set(before) == set(after) == {"main process", "pool process", "forkserver"}
    for who in before:
        for what, was, became in zip(("USS", "RSS"), before[who], after[who], strict=True):
            record_property(f"{who}, growth of {what} in MB", (became - was) / MB)
            print(f"{who}: {what} {was / MB:.1f} → {became / MB:.1f} MB")
            assert became - was < 2 * MB, f"{what} of the {who}"
    retained = plain["pool process"][1] - after["pool process"][1]
    record_property("retained by the plain task in MB", retained / MB)
    print(f"retained by the plain task: {retained / MB:.1f} MB")
    assert retained > SIZE / 2, "the body keeps nothing, so that nothing stays proves nothing"
