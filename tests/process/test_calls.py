"""Values and exceptions go there and come back."""

import itertools
import json
import os
import resource
import threading
import traceback
from collections.abc import Callable

import numpy as np
import pytest

from harness import bodies
from harness.processes import Background, Slot, wait_gone
from isolated_tasks.errors import (
    ForkserverError,
    OptionError,
    RemoteError,
    UnpicklableError,
)
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.options import MAX_ENVIRONMENT_BYTES
from isolated_tasks.process.outcome import Outcome

MakeSlot = Callable[..., Slot]


# ── results ─────────────────────────────────────────────────────────────────────────────────────


def test_a_result_comes_back(either: Slot) -> None:
    assert either.run(bodies.echo, 1, "ü", key=[None]) == ((1, "ü"), {"key": [None]})


def test_a_call_runs_in_another_process(either: Slot) -> None:
    assert either.run(os.getpid) != os.getpid()


def test_each_call_has_a_process_of_its_own(slot: Slot) -> None:
    assert len({slot.run(os.getpid) for _ in range(5)}) == 5


def test_a_function_that_nobody_can_import_runs(either: Slot) -> None:
    offset = 3

    assert either.run(lambda number: number + offset, 4) == 7


def test_a_child_that_has_exited_holds_nothing_at_the_next_call(make_slot: MakeSlot) -> None:
    # Where there are more slots than calls no child has to make room for another one.
    slot = make_slot(slots=50)
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(20):
        (pid,) = {slot.run(os.getpid)}
        wait_gone([pid])

    # There may be those of the last ones, of whose ends word is under way.
    assert len(os.listdir("/proc/self/fd")) < before + 40


def test_an_outcome_is_handed_on_as_it_is(slot: Slot) -> None:
    outcome = slot.outcome(slot.options, Outcome, 7, notes={"a": 1})

    assert (outcome.value, outcome.notes) == (7, {"a": 1})


@pytest.mark.fault(18)
def test_a_large_array_goes_there_and_back_and_can_be_written_to(either: Slot) -> None:
    array = np.arange(50_000_000 // 8, dtype="f8")

    doubled = either.run(bodies.double, array)

    np.testing.assert_array_equal(doubled, np.arange(50_000_000 // 8) * 2.0)
    np.testing.assert_array_equal(array[:3], [0, 1, 2])
    doubled[0] = 7
    assert doubled[0] == 7


@pytest.mark.fault(18)
def test_a_very_large_result_comes_back(slot: Slot) -> None:
    result = slot.run(bodies.many_bytes, 300 << 20)

    assert (len(result), result[:1], result[-1:]) == (300 << 20, b"a", b"z")


@pytest.mark.fault(18)
def test_a_very_large_argument_arrives(slot: Slot) -> None:
    assert slot.run(len, bytes(300 << 20)) == 300 << 20


def test_many_calls_at_a_time_each_get_their_own_result(make_slot: MakeSlot) -> None:
    slot = make_slot(slots=4)

    def many(first: int) -> list[int]:
        return [slot.run(abs, -number) for number in range(first, first + 10)]

    with Background(many, 0) as one, Background(many, 100) as two, Background(many, 200) as three:
        assert many(300) == list(range(300, 310))
    assert one.result() == list(range(10))
    assert two.result() == list(range(100, 110))
    assert three.result() == list(range(200, 210))


# ── exceptions ──────────────────────────────────────────────────────────────────────────────────


def test_an_exception_of_the_body_is_raised(either: Slot) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        either.run(bodies.fail, FileNotFoundError(2, "gone", "/nonesuch"))

    assert caught.value.filename == "/nonesuch"


def test_the_traceback_shows_the_body_and_nothing_of_ours(either: Slot) -> None:
    with pytest.raises(KeyError) as caught:
        either.run(bodies.fail_below, 2)

    entries = traceback.extract_tb(caught.value.__traceback__)
    # From here down to where the failure is raised again, and then the child's own.
    there = [entry for entry in entries if entry.filename == bodies.__file__]
    assert entries[-len(there) :] == there
    assert [entry.name for entry in there] == ["fail_below"] * 3
    assert there[-1].line == 'print(numbers["b"])'
    assert not [entry for entry in entries if entry.filename.endswith("process/child.py")]


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    ("body", "argument", "error"),
    [
        (bodies.exit_with, 3, SystemExit),
        (bodies.exit_with, 0, SystemExit),
        (bodies.exit_with, "a message", SystemExit),
        (bodies.fail, KeyboardInterrupt(), KeyboardInterrupt),
        (bodies.fail, GeneratorExit(), GeneratorExit),
        (bodies.fail, StopIteration(7), StopIteration),
        (bodies.fail, MemoryError(), MemoryError),
        (bodies.fail, RecursionError(), RecursionError),
    ],
    # Not repr of a function: its address differs from process to process.
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_what_ends_other_processes_is_an_outcome_like_any_other(
    either: Slot, body: Callable[..., object], argument: object, error: type[BaseException]
) -> None:
    outcome = either.outcome(either.options, body, argument)

    assert outcome.failure is not None
    assert type(outcome.failure.exception()) is error


@pytest.mark.fault(16)
def test_an_exception_that_cannot_be_loaded_here_is_stood_for(either: Slot) -> None:
    with pytest.raises(RemoteError) as caught:
        either.run(bodies.fail_with_a_stranger)

    assert (caught.value.type_name, caught.value.text) == ("only_there.Stranger", "who?")


# ── what cannot be pickled ──────────────────────────────────────────────────────────────────────


@pytest.mark.fault(15)
def test_a_result_that_cannot_be_pickled_is_named_with_its_path(either: Slot) -> None:
    with pytest.raises(UnpicklableError) as caught:
        either.run(bodies.lock_inside)

    assert caught.value.path == 'result["conn"][0]'
    assert caught.value.type_name == "_thread.lock"
    assert "task 'test'" in str(caught.value)


@pytest.mark.fault(17)
def test_a_result_that_cannot_be_loaded_here_is_an_error_of_this_call(either: Slot) -> None:
    with pytest.raises(UnpicklableError, match="only_there"):
        either.run(bodies.return_a_stranger)

    assert either.run(abs, -1) == 1


@pytest.mark.fault(17)
def test_an_argument_that_cannot_be_loaded_there_is_an_error_of_this_call(either: Slot) -> None:
    stranger = bodies.return_a_stranger()

    with pytest.raises(ModuleNotFoundError, match="only_there"):
        either.run(bodies.echo, stranger)

    assert either.run(abs, -1) == 1


@pytest.mark.fault(14)
def test_an_argument_that_cannot_be_pickled_is_refused_here(slot: Slot) -> None:
    with pytest.raises(TypeError, match="lock"):
        slot.run(bodies.echo, threading.Lock())


# ── what the forkserver cannot do ───────────────────────────────────────────────────────────────


def test_where_no_forkserver_is_there_is_an_error_that_names_the_address(
    make_slot: MakeSlot,
) -> None:
    slot = make_slot(address="/nonesuch/forkserver.sock")

    with pytest.raises(ForkserverError) as caught:
        slot.run(abs, -1)

    assert caught.value.address == "/nonesuch/forkserver.sock"
    assert "/nonesuch/forkserver.sock" in str(caught.value)
    assert caught.value.errno == 2


def test_what_the_system_refuses_is_an_error_that_says_why(
    make_slot: MakeSlot, forkserver: Launcher
) -> None:
    # execve(2) takes no string of more than 128 KiB.
    slot = make_slot(start_method="spawn", env={"LONG": "x" * 200_000})

    with pytest.raises(ForkserverError, match="Argument list too long") as caught:
        slot.run(abs, -1)

    assert caught.value.errno == 7
    assert caught.value.address == forkserver.address
    assert make_slot().run(abs, -1) == 1


@pytest.mark.fault(21, 38)
def test_a_requester_without_descriptors_gets_an_error_and_keeps_none(
    slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None is tried again, since it is known that there will be no more.
    monkeypatch.setattr("isolated_tasks.process.children.TRANSIENT", frozenset())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    slot.run(abs, -1)
    slot.close()
    lowest = next(n for n in itertools.count() if not os.path.exists(f"/proc/self/fd/{n}"))
    used = max(map(int, os.listdir("/proc/self/fd")))
    worked = []
    # One more is there each time, so that each step on the way to a child fails once.
    for limit in range(lowest, used + 20):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            worked.append(slot.run(abs, -1) == 1)
        except (ForkserverError, OSError):
            worked.append(False)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        slot.close()

    assert worked[0] is False
    assert worked[-1] is True


def test_an_environment_larger_than_the_socket_takes_at_once_arrives(make_slot: MakeSlot) -> None:
    slot = make_slot(env={"LARGE": "x" * 3_000_000})

    assert len(slot.run(bodies.variables, "LARGE")["LARGE"] or "") == 3_000_000


def test_the_largest_environment_that_is_not_refused_arrives(make_slot: MakeSlot) -> None:
    frame = len(json.dumps({"LARGE": ""}))
    largest = MAX_ENVIRONMENT_BYTES - frame
    with pytest.raises(OptionError, match=r"task 'test': env=.*bytes"):
        make_slot(env={"LARGE": "x" * (largest + 1)})

    slot = make_slot(env={"LARGE": "x" * largest})

    assert len(slot.run(bodies.variables, "LARGE")["LARGE"] or "") == largest
