"""One process serves several calls: how long, for whom, and what happens when it goes."""

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import bodies
from harness.processes import (
    Background,
    Mailbox,
    Slot,
    Word,
    survivors,
    wait_gone,
    wait_status,
)
from isolated_tasks.errors import ChildLostError
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.protocol import Call
from isolated_tasks.process.supervisor import NotBegunError, Supervisor

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]

MIB = 1 << 20


# ── how long ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_batch_shares_a_process_and_the_next_one_gets_another(
    make_slot: MakeSlot, start_method: str
) -> None:
    slot = make_slot(batch_size=3, start_method=start_method)

    pids = [slot.run(os.getpid) for _ in range(7)]

    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]


def test_an_exception_does_not_end_a_batch(make_slot: MakeSlot) -> None:
    slot = make_slot(batch_size=3)
    pid = slot.run(os.getpid)

    with pytest.raises(SystemExit):
        slot.run(bodies.exit_with, 1)

    assert slot.run(os.getpid) == pid


def test_a_process_that_has_been_idle_for_too_long_ends_and_another_one_takes_over(
    make_slot: MakeSlot,
) -> None:
    slot = make_slot(batch_size=3, batch_idle_timeout=0.01)
    pid = slot.run(os.getpid)

    wait_gone([pid])

    assert slot.run(os.getpid) != pid


def test_a_process_that_is_waited_for_does_not_grow_idle(
    make_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    slot = make_slot(batch_size=3, batch_idle_timeout=0.05)
    with Background(slot.run, bodies.report_and_wait, mailbox.path, word.path) as call:
        (pid,) = mailbox.read()
        assert survivors([pid], timeout=0.2) == {pid}
        word.give("done")

        assert call.result() == (pid, "done")


def test_closing_a_slot_ends_its_idle_processes(make_slot: MakeSlot) -> None:
    slot = make_slot(batch_size=3, batch_idle_timeout=1000, slots=2)
    others = make_slot(batch_size=3, batch_idle_timeout=1000, slots=2)
    pids = [slot.run(os.getpid), others.run(os.getpid)]

    slot.close()

    assert survivors(pids, timeout=0) == {pids[1]}


# ── for whom ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options",
    [{"name": "other"}, {"env": {"A": "1"}}, {"batch_size": 4}, {"start_method": "spawn"}],
)
def test_calls_with_other_options_get_another_process(
    make_slot: MakeSlot, options: dict[str, Any]
) -> None:
    slot = make_slot(batch_size=3, slots=2)
    other = make_slot(**{"batch_size": 3, **options}).options
    pid = slot.run(os.getpid)

    assert slot.outcome(other, os.getpid).result() != pid
    assert slot.run(os.getpid) == pid


def test_two_calls_at_a_time_get_two_processes(
    make_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    slot = make_slot(batch_size=3, slots=2)
    with Background(slot.run, bodies.report_and_wait, mailbox.path, word.path):
        (busy,) = mailbox.read()
        free = slot.run(os.getpid)
        word.give()

    assert free != busy


def test_an_idle_process_makes_room_for_a_call_with_other_options(make_slot: MakeSlot) -> None:
    slot = make_slot(batch_size=3, batch_idle_timeout=1000)
    other = make_slot(name="other").options
    pid = slot.run(os.getpid)

    assert slot.outcome(other, bodies.siblings).result() == 1

    assert survivors([pid], timeout=0) == set()


def test_there_are_never_more_processes_than_slots(
    new_launcher: NewLauncher, make_slot: MakeSlot
) -> None:
    slot = make_slot(address=new_launcher(preload=["harness.bodies"]).address, slots=2)
    options = [
        make_slot(name="one").options,
        make_slot(name="two", batch_size=2, batch_idle_timeout=0.001).options,
        make_slot(name="three", batch_size=3).options,
    ]

    def many(first: int) -> Counter[int]:
        turns = [options[(first + turn * turn) % 3] for turn in range(30)]
        return Counter(slot.outcome(one, bodies.siblings).result() for one in turns)

    with Background(many, 0) as other:
        mine = many(1)
    counts = mine + other.result()

    assert set(counts) <= {1, 2}
    assert counts.total() == 60
    assert counts[2] > 0  # or this would prove nothing


# ── memory ──────────────────────────────────────────────────────────────────────────────────────


def test_a_process_that_holds_too_much_after_a_call_is_not_used_again(
    new_launcher: NewLauncher, make_slot: MakeSlot, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = new_launcher(preload=["harness.bodies"])
    slot = make_slot(
        address=launcher.address, batch_size=5, batch_memory_limit_bytes=150 * MIB, name="large"
    )

    small = [slot.run(bodies.hold, 1 * MIB) for _ in range(2)]
    large = slot.run(bodies.hold, 150 * MIB)
    after = slot.run(bodies.hold, 1 * MIB)

    assert small == [large, large]
    assert after != large
    # The child says why, as the app has set up logging; without an app on its stderr.
    wait_gone([large])
    ((pid, task, held),) = re.findall(
        r"child pid=(\d+) task=(\S+) serves no further call of its batch: it was left with "
        r"(\d+) MiB of memory$",
        capfd.readouterr().err,
        re.MULTILINE,
    )
    assert (int(pid), task) == (large, "large")
    assert 150 <= int(held) < 400


@pytest.mark.parametrize("body", [bodies.touch, bodies.hold_in_a_circle])
def test_a_process_that_holds_no_more_than_it_may_is_used_again(
    make_slot: MakeSlot, body: Callable[[int], int]
) -> None:
    slot = make_slot(batch_size=5, batch_memory_limit_bytes=150 * MIB)

    assert len({slot.run(body, 150 * MIB) for _ in range(3)}) == 1


# ── what is left ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(13)
@pytest.mark.parametrize("what", bodies.CHANGES)
def test_a_process_that_is_left_other_than_it_was_is_not_used_again(
    new_launcher: NewLauncher, make_slot: MakeSlot, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    # The child says why, as the app has set up logging; without an app on its stderr.
    launcher = new_launcher(preload=["harness.bodies"])
    slot = make_slot(address=launcher.address, batch_size=5)
    fine = [slot.run(bodies.change_the_process, "nothing") for _ in range(2)]
    left = slot.run(bodies.change_the_process, what)
    after = slot.run(bodies.change_the_process, "nothing")

    assert fine == [left, left]
    assert after != left
    wait_gone([left])
    said = re.findall(r"child pid=(\d+) .* it was left with (.*)", capfd.readouterr().err)
    ((pid, why),) = said
    assert int(pid) == left
    assert re.search(bodies.CHANGES[what], why)


def test_the_thread_of_a_library_that_reports_may_stay(make_slot: MakeSlot) -> None:
    slot = make_slot(batch_size=3)

    (first, starts), (second, starts_again) = (slot.run(bodies.log_by_a_queue) for _ in range(2))

    assert (starts, starts_again) == (True, False)
    assert second == first


def test_a_limit_of_its_own_is_not_taken_for_what_a_body_has_left(make_slot: MakeSlot) -> None:
    slot = make_slot(
        batch_size=3, soft_memory_limit_bytes=1 << 40, cpu_time_limit=1000, max_open_files=100
    )

    assert len({slot.run(os.getpid) for _ in range(3)}) == 1


@pytest.mark.fault(13)
def test_what_raises_may_have_left_something_too(make_slot: MakeSlot, mailbox: Mailbox) -> None:
    slot = make_slot(batch_size=5)

    with pytest.raises(LookupError):
        slot.run(bodies.leave_behind, mailbox.path, "in the group", "raises")

    assert survivors(mailbox.read()) == set()
    assert slot.run(os.getpid)


# ── when it goes ────────────────────────────────────────────────────────────────────────────────


def test_a_call_that_kills_its_process_fails_alone(make_slot: MakeSlot) -> None:
    slot = make_slot(batch_size=5)
    pid = slot.run(os.getpid)

    with pytest.raises(ChildLostError) as caught:
        slot.run(bodies.leave, 3)

    assert (caught.value.pid, caught.value.exit_code) == (pid, 3)
    after = [slot.run(os.getpid) for _ in range(5)]
    assert len(set(after)) == 1
    assert after[0] != pid


def test_an_idle_process_that_is_killed_is_replaced(make_slot: MakeSlot) -> None:
    slot = make_slot(batch_size=5)
    pid = slot.run(os.getpid)

    os.kill(pid, signal.SIGKILL)
    wait_gone([pid])

    assert slot.run(os.getpid) != pid


def test_an_idle_process_that_talks_nonsense_is_replaced(
    make_slot: MakeSlot, mailbox: Mailbox, word: Word
) -> None:
    slot = make_slot(batch_size=5)
    pid = slot.run(bodies.talk_nonsense_later, mailbox.path, word.path)
    word.give()
    assert mailbox.read() == ["done"]

    # This call is as innocent as any.
    assert slot.run(os.getpid) != pid
    slot.close()
    assert survivors([pid], timeout=0) == set()


def test_a_call_sent_to_a_process_that_has_just_gone_is_run_once_by_another(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traces = tmp_path / "traces"
    launcher = new_launcher(preload=["harness.bodies"])
    (forkserver,) = launcher.pids()
    slot = make_slot(address=launcher.address, batch_size=5, batch_idle_timeout=0.01)
    first = slot.run(bodies.append, str(traces), 1)
    # The forkserver cannot reap it, so its end is known to nobody when the call is sent.
    os.kill(forkserver, signal.SIGSTOP)
    wait_status(first, "zombie")
    refused: list[int | None] = []

    def send(self: Supervisor, channel: Any, message: Any) -> None:
        original(self, channel, message)
        if isinstance(message, Call):
            os.kill(forkserver, signal.SIGCONT)

    def run(self: Supervisor, *args: Any, **kwargs: Any) -> Any:
        try:
            return original_call(self, *args, **kwargs)
        except NotBegunError:
            refused.append(self.pid)
            raise

    original, original_call = Supervisor._write, Supervisor.call
    monkeypatch.setattr(Supervisor, "_write", send)
    monkeypatch.setattr(Supervisor, "call", run)

    second = slot.run(bodies.append, str(traces), 2)

    assert refused == [first]
    assert second != first
    assert traces.read_text() == "1\n2\n"


def test_calls_that_race_with_the_idle_timeout_all_run_once(
    make_slot: MakeSlot, tmp_path: Path
) -> None:
    traces = tmp_path / "traces"
    timeout = 0.002
    slot = make_slot(batch_size=1000, batch_idle_timeout=timeout)
    pids = []

    for number in range(300):
        pids.append(slot.run(bodies.append, str(traces), number))
        # From at once to well after its end, in small steps.
        until = time.perf_counter() + (number % 50) / 50 * 2 * timeout
        while time.perf_counter() < until:
            pass

    assert traces.read_text().split() == [str(number) for number in range(300)]
    # Some calls found a process and some did not.
    assert 1 < len(set(pids)) < 300


@pytest.mark.fault(44)
def test_a_process_that_always_goes_before_it_accepts_fails_the_call_in_the_end(
    new_launcher: NewLauncher, make_slot: MakeSlot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Each is killed as it is born.
    module = (
        "from isolated_tasks.process import child\nchild._be_born = lambda *_: child.os._exit(9)\n"
    )
    (tmp_path / "stillborn.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    slot = make_slot(address=new_launcher(preload=["stillborn"], serves=False).address)

    with pytest.raises(ChildLostError, match="in a row went before they had begun") as caught:
        slot.run(abs, -1)

    assert caught.value.started is False
    assert caught.value.exit_code == 9
    assert caught.value.task == "test"
