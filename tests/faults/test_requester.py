"""Faults of those who call: their children go with them, and only with them.

Real workers are in test_slots.py.
"""

import errno
import importlib.util
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import bodies
from harness.faults import IN_FULL, fault
from harness.processes import (
    PATIENCE,
    Background,
    Slot,
    program,
    survivors,
)
from isolated_tasks.errors import ForkserverError
from isolated_tasks.process.launcher import Launcher

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]


def say(module: str, *arguments: str) -> dict[str, Any]:
    """Run a program to its end; what it says."""
    with program(module, *arguments) as process:
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    said: dict[str, Any] = json.loads(output)
    return said


# ── killed while a child is born ────────────────────────────────────────────────────────────────


@fault(30)
def test_requesters_that_are_killed_at_any_moment_of_a_birth_leave_no_child(
    *, new_launcher: NewLauncher, make_slot: MakeSlot, start_method: str, tmp_path: Path
) -> None:
    count = (1000 if IN_FULL else 100) if start_method == "forkserver" else (200 if IN_FULL else 20)
    traces = tmp_path / "traces"
    launcher = new_launcher(preload=["harness.faulty"])
    arguments = (launcher.address, start_method, str(count), str(traces))

    with program("harness.cut_short", *arguments) as process:
        assert process.wait(PATIENCE if not IN_FULL else 600) == 0

    begun = [int(pid) for pid in traces.read_text().split()]
    # Or this would prove little.
    assert 0 < len(begun) < count
    assert survivors(begun) == set()
    # Whoever asked before this one would have been served by now.
    assert make_slot(address=launcher.address).run(bodies.siblings) == 1


# ── callers that go ─────────────────────────────────────────────────────────────────────────────


@fault(35)
@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_a_greenlet_that_is_killed_in_its_call_ends_the_child_and_keeps_nothing(
    forkserver: Launcher, tmp_path: Path, library: str
) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"no {library}")
    seen = say("harness.greenlets", library, forkserver.address, str(tmp_path))

    assert survivors(seen["pids"]) == set()
    assert seen["ended"] == ["GreenletExit"]
    assert (seen["next"], seen["more"]) == (1, [])


@fault(35)
def test_a_thread_that_ends_with_its_process_ends_the_child(
    forkserver: Launcher, tmp_path: Path
) -> None:
    seen = say("harness.greenlets", "threads", forkserver.address, str(tmp_path))

    assert survivors(seen["pids"]) == set()


# ── somebody else minds the children of the main process ────────────────────────────────────────


@fault(37)
@pytest.mark.parametrize("how", ["ignored", "handled", "reaped", "asyncio", "gevent"])
def test_who_else_minds_children_neither_harms_nor_is_harmed(how: str) -> None:
    if how == "gevent" and importlib.util.find_spec("gevent") is None:
        pytest.skip("no gevent")
    seen = say("harness.foreign", how)

    assert seen["parents"] == seen["forkservers"]
    assert len(set(seen["forkservers"])) == 2
    assert seen["lost"] == 3
    assert set(seen.get("theirs", [])) <= {7}


# ── no processes any more ───────────────────────────────────────────────────────────────────────

#: A forkserver that gets no process while there is such a file.
SHORT_OF_PROCESSES = """
import os, resource
from isolated_tasks.process import system
def limited(start):
    def limit_and_start(*args, **kwargs):
        limit(os.path.exists({path!r}))
        return start(*args, **kwargs)
    return limit_and_start
system.fork, system.posix_spawn = limited(os.fork), limited(os.posix_spawn)
"""

#: Who may be refused processes, which root is not, and may start no interpreter of root's.
AS_NOBODY = """
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
def limit(is_short):
    resource.setrlimit(resource.RLIMIT_NPROC, (0 if is_short else 1000, 1000))
"""

#: fork(2): EAGAIN for want of numbers, ENOMEM for want of memory.
AS_IF = """
import errno
def limit(is_short):
    if is_short:
        raise OSError(errno.{name}, os.strerror(errno.{name}))
"""

LIMITS = [
    (start_method, AS_IF.format(name=name), os.strerror(number))
    for start_method in ("forkserver", "spawn")
    for name, number in (("EAGAIN", errno.EAGAIN), ("ENOMEM", errno.ENOMEM))
]
if os.getuid() == 0:
    LIMITS += [("forkserver", AS_NOBODY, os.strerror(errno.EAGAIN))]


@fault(38, 42)
@pytest.mark.parametrize(("start_method", "how", "reason"), LIMITS)
def test_where_no_process_can_be_had_calls_wait_until_one_can(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    start_method: str,
    how: str,
    reason: str,
) -> None:
    # Where anybody may look.
    folder = Path(tempfile.gettempdir())
    folder.chmod(0o755)
    no_more = folder / "no_more"
    (tmp_path / "short.py").write_text(SHORT_OF_PROCESSES.format(path=str(no_more)) + how)
    monkeypatch.syspath_prepend(tmp_path)
    launcher = new_launcher(preload=["harness.bodies", "short"])
    (loaded,) = launcher.loaded()
    assert [entry["error"] for entry in loaded.entries] == [None, None]
    slot = make_slot(address=launcher.address, start_method=start_method)
    hasty = make_slot(address=launcher.address, start_method=start_method, start_timeout=0.1)
    no_more.touch()

    with pytest.raises(ForkserverError, match=reason):
        hasty.run(abs, -1)
    with Background(slot.run, os.getppid) as call:
        # It is tried again and again, with pauses; of that there is a line in the log.
        tick = threading.Event()
        while len(re.findall(f"is tried in .* s: .*{reason}", caplog.text)) < 4:
            assert call.is_running
            tick.wait(0.01)
        no_more.unlink()

        assert call.result() == loaded.pid
