"""What a body finds around itself, and how its process ends."""

import atexit
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import bodies
from harness.processes import Background, Mailbox, Slot, Word, survivors
from isolated_tasks.process import child
from isolated_tasks.process.launcher import Launcher

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]

both_start_methods = pytest.mark.parametrize("start_method", ["forkserver", "spawn"])


# ── process ─────────────────────────────────────────────────────────────────────────────────────


@both_start_methods
def test_a_child_leads_a_group_of_its_own_in_the_forkserver_s_session(
    make_slot: MakeSlot, forkserver: Launcher, start_method: str
) -> None:
    ids = make_slot(start_method=start_method).run(bodies.ids)
    (pid,) = forkserver.pids()

    assert ids["parent"] == pid
    assert ids["group"] == ids["pid"]
    assert ids["session"] == pid
    assert ids["session"] != os.getsid(0)


@both_start_methods
def test_the_kernel_prefers_a_child_when_memory_runs_out(
    make_slot: MakeSlot, start_method: str
) -> None:
    ours = bodies.oom_score_adjustment()

    theirs = make_slot(start_method=start_method).run(bodies.oom_score_adjustment)

    assert theirs == min(1000, max(ours, 0) + 500)


@both_start_methods
def test_a_child_is_a_main_process_of_its_own_to_python(
    make_slot: MakeSlot, start_method: str
) -> None:
    state = make_slot(start_method=start_method).run(bodies.interpreter_state)

    path = [os.path.abspath(folder) for folder in sys.path]
    # With the current directory, from which Celery's commands load the app.
    assert state["path"] == (path if os.getcwd() in path else [*path, os.getcwd()])
    assert state["argv"] == sys.argv
    assert state["stdin"] == ""
    assert state["gc"] is True
    assert (state["daemon"], state["process"], state["is_mp_child"]) == (
        False,
        "MainProcess",
        False,
    )


def test_what_the_forkserver_has_loaded_is_out_of_the_collector_s_way(slot: Slot) -> None:
    assert slot.run(bodies.interpreter_state)["frozen"] > 10_000


@both_start_methods
def test_a_child_and_its_forks_know_what_they_are(make_slot: MakeSlot, start_method: str) -> None:
    slot = make_slot(start_method=start_method)

    assert slot.run(bodies.interpreter_state)["is_child"] is True
    assert slot.run(bodies.is_child_in_a_fork) is True
    assert child.is_child() is False


# ── signals ─────────────────────────────────────────────────────────────────────────────────────


@both_start_methods
def test_sigint_is_ignored_some_are_the_requester_s_and_others_are_as_python_starts(
    make_slot: MakeSlot, start_method: str
) -> None:
    dispositions = make_slot(start_method=start_method).run(bodies.dispositions)

    ignored = {name for name, disposition in dispositions.items() if disposition == "SIG_IGN"}
    assert ignored == {"SIGINT", "SIGPIPE", "SIGXFSZ"}
    handled = {name for name, value in dispositions.items() if value == "handler"}
    assert handled == {"SIGTERM", "SIGQUIT", "SIGHUP", "SIGUSR1"}
    assert {dispositions[name] for name in set(dispositions) - ignored - handled} == {"SIG_DFL"}


@both_start_methods
def test_the_kernel_agrees_about_the_signals(make_slot: MakeSlot, start_method: str) -> None:
    masks = make_slot(start_method=start_method).run(bodies.signal_masks)

    def bits(*numbers: int) -> int:
        return sum(1 << (number - 1) for number in numbers)

    crashes = (signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)
    # Without those that the C library keeps for itself, which nobody can set.
    named = bits(*signal.Signals)
    assert masks["SigBlk"] & named == 0
    assert masks["SigIgn"] & named == bits(signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)
    requesters = (signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1)
    assert masks["SigCgt"] & named == bits(*crashes, *requesters)


def test_a_file_beyond_its_limit_is_an_error_and_not_the_end(slot: Slot, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large"):
        slot.run(bodies.write_beyond_the_limit, str(tmp_path / "file"))


# ── random numbers ──────────────────────────────────────────────────────────────────────────────


def test_two_children_draw_different_random_numbers(slot: Slot) -> None:
    one, two = slot.run(bodies.random_numbers), slot.run(bodies.random_numbers)

    assert [a != b for a, b in zip(one, two, strict=True)] == [True] * 3


# ── descriptors ─────────────────────────────────────────────────────────────────────────────────


def kinds(descriptors: dict[int, str]) -> list[str]:
    """What descriptors beyond stderr are."""
    return sorted(target.split(":")[0] for number, target in descriptors.items() if number > 2)


@both_start_methods
def test_a_child_has_the_descriptors_that_are_its_own_and_no_other(
    make_slot: MakeSlot, word: Word, mailbox: Mailbox, start_method: str
) -> None:
    # Beside a child that runs and one that idles, whose descriptors are none of its business.
    idle, busy = make_slot(batch_size=2), make_slot()
    idle.run(abs, -1)
    with Background(busy.run, bodies.report_and_wait, mailbox.path, word.path):
        mailbox.read()
        descriptors = make_slot(start_method=start_method).run(bodies.descriptors)
        word.give()

    assert descriptors[0] == os.devnull
    assert {1, 2} <= set(descriptors)
    # Its call socket, its lifeline, its crash file; the stderr of bodies, and its own.
    own = os.readlink("/proc/self/fd/2").split(":")[0]
    assert kinds(descriptors) == sorted(["/memfd", "pipe", "pipe", "socket", own])


# ── environment ─────────────────────────────────────────────────────────────────────────────────


@both_start_methods
def test_variables_are_set_for_the_body_and_for_programs_that_it_starts(
    make_slot: MakeSlot, start_method: str
) -> None:
    slot = make_slot(
        start_method=start_method, env={"COLOUR": "grün=1", "HOME": "/h"}, batch_size=2
    )

    assert slot.run(bodies.variables, "COLOUR", "HOME") == {"COLOUR": "grün=1", "HOME": "/h"}
    assert slot.run(bodies.variable_of_a_program, "COLOUR") == "grün=1"


def test_variables_of_one_child_are_not_another_s(make_slot: MakeSlot) -> None:
    make_slot(env={"COLOUR": "red"}).run(abs, -1)

    assert make_slot().run(bodies.variables, "COLOUR") == {"COLOUR": None}


@both_start_methods
def test_the_import_path_of_programs_is_what_it_was_here(
    make_slot: MakeSlot, start_method: str
) -> None:
    slot = make_slot(start_method=start_method)

    assert slot.run(bodies.variables, "PYTHONPATH")["PYTHONPATH"] == os.environ.get("PYTHONPATH")


# ── output ──────────────────────────────────────────────────────────────────────────────────────


def test_output_is_flushed_before_the_result_is_sent(
    capfd: pytest.CaptureFixture[str], new_launcher: NewLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    # Its forkserver writes to where this test looks. And its child lives on after the call, so
    # that no end of a process has flushed anything.
    slot = Slot(new_launcher().address, batch_size=2)
    with contextlib.closing(slot):
        slot.run(bodies.say, "to stdout", "to stderr")

        captured = capfd.readouterr()
    assert captured.out == "to stdout"
    assert "to stderr" in captured.err


# ── exit hooks ──────────────────────────────────────────────────────────────────────────────────


@both_start_methods
def test_exit_hooks_of_the_body_run(make_slot: MakeSlot, tmp_path: Path, start_method: str) -> None:
    path = tmp_path / "traces"
    slot = make_slot(start_method=start_method)

    slot.run(bodies.register, bodies.append, str(path), "hook")
    slot.close()

    assert path.read_text() == "hook\n"


def test_exit_hooks_of_a_batch_run_once_at_its_end(make_slot: MakeSlot, tmp_path: Path) -> None:
    path = tmp_path / "traces"
    slot = make_slot(batch_size=3)

    slot.run(bodies.register, bodies.append, str(path), "hook")
    slot.run(abs, -1)
    assert not path.exists()
    slot.run(abs, -1)
    slot.close()

    assert path.read_text() == "hook\n"


def test_exit_hooks_of_the_forkserver_do_not_run_in_a_child(
    new_launcher: NewLauncher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = "import atexit, pathlib\natexit.register(pathlib.Path(__file__ + '.ran').touch)\n"
    (tmp_path / "hooked.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    slot = Slot(new_launcher(preload=["hooked"]).address)

    slot.run(abs, -1)
    slot.close()

    assert list(tmp_path.glob("*.ran")) == []


def test_threads_of_the_body_are_waited_for(slot: Slot, word: Word, tmp_path: Path) -> None:
    path = tmp_path / "traces"

    slot.run(bodies.leave_a_thread, str(path), word.path)
    word.give("thread")
    slot.close()

    assert path.read_text() == "thread\n"


@pytest.mark.fault(9)
@pytest.mark.parametrize("hook", [bodies.sleep_in_python, bodies.sleep_in_c])
def test_a_hook_that_does_not_end_is_cut_while_the_result_stands(
    make_slot: MakeSlot,
    caplog: pytest.LogCaptureFixture,
    hook: Callable[[], Any],
    start_method: str,
) -> None:
    slot = make_slot(exit_timeout=0.2, name="tasks.render", start_method=start_method)

    with caplog.at_level(logging.WARNING):
        assert slot.run(bodies.register, hook) == "registered"
        slot.close()

    (record,) = caplog.records
    assert "task=tasks.render was killed by SIGALRM after its last outcome" in record.getMessage()


@pytest.mark.fault(9)
def test_a_hook_that_crashes_does_not_take_the_result_back(
    either: Slot, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert either.run(bodies.register, bodies.crash_in_c) == "registered"
        either.close()

    assert "was killed by SIGSEGV after its last outcome" in caplog.text


@pytest.mark.fault(9)
def test_closing_a_slot_waits_for_hooks_and_kills_what_does_not_end(
    make_slot: MakeSlot, mailbox: Mailbox
) -> None:
    slot = make_slot(exit_timeout=1000)
    slot.run(bodies.register, bodies.hang, mailbox.path, "asleep")
    pids = mailbox.read()
    assert all(psutil.pid_exists(pid) for pid in pids)

    slot.children.close(timeout=0.1)

    assert survivors(pids) == set()


def test_a_hook_of_this_process_is_not_run_by_its_children(
    make_slot: MakeSlot, tmp_path: Path
) -> None:
    def hook() -> None:
        (tmp_path / "ran").touch()

    atexit.register(hook)
    try:
        slot = make_slot()
        slot.run(abs, -1)
        slot.close()
    finally:
        atexit.unregister(hook)

    assert not (tmp_path / "ran").exists()
