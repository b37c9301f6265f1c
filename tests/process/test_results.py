"""How large an outcome may be, and one that nobody unpickles."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest

from harness import bodies
from harness.processes import Slot
from isolated_tasks.errors import (
    ChildLostError,
    IsolationError,
    ProtocolError,
    RemoteError,
    ResultTooLargeError,
)
from isolated_tasks.process.options import MIN_RESULT_BYTES
from isolated_tasks.process.plain import Encoded

MakeSlot = Callable[..., Slot]

both_ways = pytest.mark.parametrize("plain_outcomes", [False, True])


# ── how large ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(18)
@both_ways
def test_a_result_above_the_limit_fails_its_call(make_slot: MakeSlot, plain_outcomes: bool) -> None:
    slot = make_slot(max_result_bytes=MIN_RESULT_BYTES, plain_outcomes=plain_outcomes, batch_size=2)
    body = bodies.encoded if plain_outcomes else bytes

    with pytest.raises(ResultTooLargeError, match="return a path or a key instead") as caught:
        slot.run(body, MIN_RESULT_BYTES)

    assert caught.value.task == "test"
    assert caught.value.limit == MIN_RESULT_BYTES
    assert caught.value.size > MIN_RESULT_BYTES
    assert len(slot.outcome(slot.options, bytes, 100).value or b"") in (0, 100)


@pytest.mark.fault(18)
def test_buffers_count(make_slot: MakeSlot) -> None:
    slot = make_slot(max_result_bytes=1_000_000)

    assert len(slot.run(np.zeros, 100_000, np.uint8)) == 100_000
    with pytest.raises(ResultTooLargeError):
        slot.run(np.zeros, 1_000_000, np.uint8)


@pytest.mark.fault(18)
def test_an_exception_above_the_limit_is_told_as_one(make_slot: MakeSlot) -> None:
    slot = make_slot(max_result_bytes=MIN_RESULT_BYTES)

    with pytest.raises(ResultTooLargeError, match="its exception has"):
        slot.run(bodies.fail_at_length, MIN_RESULT_BYTES)


@pytest.mark.fault(18)
def test_what_a_body_sends_by_itself_is_not_even_allocated(make_slot: MakeSlot) -> None:
    # As if the child had not looked.
    slot = make_slot(max_result_bytes=MIN_RESULT_BYTES)

    with pytest.raises(ChildLostError, match="beyond the limit"):
        slot.run(bodies.announce, 1 << 39)

    assert slot.run(abs, -1) == 1


# ── as plain data ───────────────────────────────────────────────────────────────────────────────


def test_a_plain_result_arrives_and_an_exception_as_its_text(make_slot: MakeSlot) -> None:
    slot = make_slot(plain_outcomes=True, batch_size=5)

    assert slot.run(bodies.encoded, 3) == Encoded(b"xxx")
    with pytest.raises(RemoteError, match=r"builtins\.ZeroDivisionError: "):
        slot.run(divmod, 1, 0)
    with pytest.raises(IsolationError, match="was not encoded"):
        slot.run(abs, -1)


def test_a_pickle_that_a_body_sends_is_not_loaded(
    make_slot: MakeSlot, tmp_path_factory: pytest.TempPathFactory
) -> None:
    trace = tmp_path_factory.mktemp("trace") / "trace"
    hostile = pickle.dumps(bodies.Toucher(str(trace)))
    trusting = make_slot()
    with pytest.raises(IsolationError):
        trusting.run(bodies.send_outcome, hostile)
    assert trace.exists(), "or this would prove nothing"
    trace.rmdir()

    with pytest.raises(ProtocolError, match="is no outcome"):
        make_slot(plain_outcomes=True).run(bodies.send_outcome, hostile)

    assert not trace.exists()
