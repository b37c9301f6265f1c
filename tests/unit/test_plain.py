"""Outcomes as plain data, and what a body may send that is none."""

import json
import linecache
import pickle
import sys
import traceback
from typing import Any, NoReturn

import pytest

from isolated_tasks.errors import (
    MemoryLimitExceeded,
    ProtocolError,
    RemoteError,
    UnpicklableError,
)
from isolated_tasks.process import plain
from isolated_tasks.process.outcome import Failure, Outcome
from isolated_tasks.process.pickling import Pickled
from isolated_tasks.process.plain import Encoded


def travel(outcome: Outcome) -> Outcome:
    return plain.decode(plain.encode(outcome, task="tasks.render"))


def failure_of(exc: BaseException) -> Failure:
    try:
        raise exc
    except BaseException as raised:
        return Failure.of(raised, skip=None)


class OurOwn(Exception):
    def __reduce__(self) -> NoReturn:
        raise AssertionError("somebody pickles it")


def test_a_value_that_was_encoded_arrives() -> None:
    assert travel(Outcome(Encoded(b"\x00\xff"))).value == Encoded(b"\x00\xff")


def test_nothing_arrives_as_nothing() -> None:
    assert travel(Outcome()) == Outcome()


def test_a_value_that_was_not_encoded_is_refused_with_its_type() -> None:
    with pytest.raises(UnpicklableError, match=r"result, of type builtins\.set, was not encoded"):
        travel(Outcome({1})).result()


def test_notes_that_are_plain_arrive_and_others_do_not() -> None:
    notes = {"list": [1, "two", None], "object": object(), "bytes": b""}

    assert travel(Outcome(notes=notes)).notes == {"list": [1, "two", None]}


def test_an_exception_is_told_by_its_name_its_text_and_its_lines() -> None:
    def body() -> NoReturn:
        raise OurOwn("what it says")

    try:
        body()
    except OurOwn as exc:
        outcome = travel(Outcome(failure=Failure.of(exc, skip=sys._getframe())))

    with pytest.raises(RemoteError, match="OurOwn: what it says") as caught:
        outcome.result()
    assert caught.value.type_name == f"{__name__}.OurOwn"
    assert caught.value.text == "what it says"
    shown = "".join(traceback.format_tb(caught.value.__traceback__))
    assert 'raise OurOwn("what it says")' in shown


def test_a_chain_of_exceptions_arrives() -> None:
    def body() -> NoReturn:
        try:
            raise KeyError("the cause")
        except KeyError as exc:
            raise ValueError("the effect") from exc

    try:
        body()
    except ValueError as exc:
        failure = travel(Outcome(failure=Failure.of(exc, skip=sys._getframe()))).failure

    assert failure is not None
    cause = failure.exception().__cause__
    assert isinstance(cause, RemoteError)
    assert cause.type_name == "builtins.KeyError"


@pytest.mark.parametrize(
    "exc",
    [
        MemoryError("none left"),
        OSError(24, "Too many open files"),
        MemoryLimitExceeded("too much", {"task": "t", "limit": 7}),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_some_are_made_again(exc: Exception) -> None:
    error = travel(Outcome(failure=failure_of(exc))).failure

    assert error is not None
    again = error.exception()
    assert type(again) is type(exc)
    assert again.args == exc.args
    assert again.__traceback__ is not None


# ── what is not to be trusted ───────────────────────────────────────────────────────────────────

FRAME = {
    "filename": "x.py",
    "function": "f",
    "module": "m",
    "lineno": 3,
    "position": None,
    "source": None,
}
PART = {
    "type_name": "builtins.KeyError",
    "text": "text",
    "args": None,
    "frames": [FRAME],
    "suppress_context": False,
    "cause": None,
    "context": None,
}
SENT = {"has_value": False, "failure": [PART], "notes": {}}


def received(**changes: Any) -> Outcome:
    return plain.decode(Pickled(json.dumps({**SENT, **changes}).encode()))


def test_what_is_changed_below_is_fine_as_it_is() -> None:
    with pytest.raises(RemoteError, match=r"builtins\.KeyError: text"):
        received().result()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b"\xff",
        b"[" * 100_000,
        pickle.dumps(Outcome(7)),
        json.dumps({"has_value": False}).encode(),
        json.dumps({**SENT, "has_value": True}).encode(),
        json.dumps({**SENT, "notes": []}).encode(),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_no_outcome_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="an outcome cannot be read"):
        plain.decode(Pickled(body))


@pytest.mark.parametrize(
    "change",
    [
        {"type_name": 7},
        {"text": None},
        {"frames": None},
        {"frames": [{}]},
        {"frames": [{**FRAME, "lineno": 10**9}]},
        {"frames": [{**FRAME, "lineno": -1}]},
        {"frames": [{**FRAME, "lineno": "3"}]},
        {"frames": [{**FRAME, "filename": ["x.py"]}]},
        {"cause": 50},
        {"cause": -1},
        {"cause": 1},
        {"context": "0"},
    ],
    ids=repr,
)
def test_what_is_no_exception_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        received(failure=[{**PART, **change}])


def test_no_exception_at_all_is_no_failure() -> None:
    with pytest.raises(ProtocolError):
        received(failure=[])


@pytest.mark.parametrize(
    "args", [["one", "too", "many", "of", "them"], {"a": 1}, "text", [[]]], ids=repr
)
def test_arguments_that_do_not_fit_leave_the_text(args: Any) -> None:
    name = f"{UnpicklableError.__module__}.UnpicklableError"
    outcome = received(failure=[{**PART, "type_name": name, "args": args}])

    with pytest.raises((RemoteError, UnpicklableError)):
        outcome.result()


def test_the_name_of_a_class_does_not_become_that_of_ours() -> None:
    name = f"{RemoteError.__module__}.<locals>.Other"

    with pytest.raises(RemoteError):
        received(failure=[{**PART, "type_name": name}]).result()

    assert RemoteError.__qualname__ == "RemoteError"


def test_lines_of_real_files_are_not_replaced() -> None:
    frame = {**FRAME, "filename": __file__, "lineno": 1, "source": "what somebody made up"}

    with pytest.raises(RemoteError):
        received(failure=[{**PART, "frames": [frame]}]).result()

    assert linecache.getline(__file__, 1).startswith('"""Outcomes as plain data')


def test_a_chain_without_end_has_one() -> None:
    first, second = {**PART, "cause": 1}, {**PART, "cause": 0}
    outcome = received(failure=[first, second, *[PART] * 500])
    assert outcome.failure is not None

    exc = outcome.failure.exception()

    assert exc.__cause__ is not None
    assert exc.__cause__.__cause__ is exc
    assert "KeyError" in "".join(traceback.format_exception(exc))
