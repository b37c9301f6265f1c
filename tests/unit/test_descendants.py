"""Who the descendants of a real process are, and their end."""

import os
import queue
import threading

import psutil
import pytest

from harness.families import FAMILY, HOLDER, MiB, running
from harness.processes import survivors
from isolated_tasks.process import descendants, memory, system


def test_a_tree_is_a_process_and_all_its_descendants() -> None:
    with running(FAMILY, MiB) as (pid, others):
        # The third child has exited, and nobody has reaped it: it is there, and holds nothing.
        (zombie,) = (p.pid for p in psutil.Process(pid).children() if p.pid not in others)

        assert descendants.tree(pid)[0] == pid
        assert sorted(descendants.tree(pid)) == sorted([pid, zombie, *others])
        assert pid in descendants.tree(os.getpid())
        (grandchild,) = {*others} - {*descendants.children(pid)}
        assert sorted(descendants.children(pid)) == sorted({zombie, *others} - {grandchild})
        assert descendants.children(grandchild) == []


def test_the_lists_of_the_kernel_and_a_pass_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/proc/thread-self/children"):
        pytest.skip("this kernel was built without CONFIG_PROC_CHILDREN")
    with running(FAMILY, MiB) as (pid, others):
        listed = descendants.tree(pid)
        monkeypatch.setattr(descendants, "_kernel_lists_children", lambda: False)

        assert sorted(listed) == sorted(descendants.tree(pid))
        assert set(others) < set(listed)


def test_the_child_of_a_thread_is_in_the_tree() -> None:
    started: queue.Queue[int] = queue.Queue()
    looked = threading.Event()

    def start() -> None:
        # The kernel lists it with this thread as long as there is one, then with another.
        with running(HOLDER, MiB) as (pid, _):
            started.put(pid)
            looked.wait()

    thread = threading.Thread(target=start)
    thread.start()
    try:
        assert started.get() in descendants.tree(os.getpid())
    finally:
        looked.set()
        thread.join()


def test_a_tree_is_found_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descendants, "_kernel_lists_children", lambda: False)
    monkeypatch.setattr(system, "IS_LINUX", False)
    with running(FAMILY, 32 * MiB) as (pid, others):
        assert set(others) < set(descendants.tree(pid))
        assert memory.tree_bytes(pid, above=1 << 50) > 32 * MiB


def test_a_process_that_is_gone_has_no_descendants() -> None:
    with running(HOLDER, MiB) as (pid, _):
        pass

    assert descendants.tree(pid) == [pid]
    assert descendants.children(pid) == []
    descendants.kill_below(pid)


@pytest.mark.parametrize("has_pidfds", [True, False])
def test_all_below_a_process_are_killed_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch, has_pidfds: bool
) -> None:
    if not has_pidfds:
        monkeypatch.setattr(system, "open_pidfd", lambda pid: None)
    with running(HOLDER, MiB) as (neighbour, _), running(FAMILY, MiB) as (pid, others):
        descendants.kill_below(pid)

        assert survivors(others) == set()
        assert survivors([pid, neighbour], timeout=0) == {pid, neighbour}
