"""Exceptions cross processes: here they are taken apart, pickled, and put together again."""

import builtins
import linecache
import pickle
import re
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import cloudpickle
import numpy as np
import pytest

from isolated_tasks.errors import RemoteError
from isolated_tasks.process.outcome import MAX_CHAIN, MAX_FRAMES, Failure, Outcome

Body = Callable[[], object]

NOTHING: dict[str, Any] = {}


def run(body: Body) -> tuple[BaseException, Failure]:
    """What a body raises, as if it had been called by nobody; and how it is sent."""
    try:
        body()
    except BaseException as exc:
        failure = Failure.of(exc, skip=sys._getframe())
        # Without this frame, as at the other end.
        below = exc.__traceback__.tb_next if exc.__traceback__ else None
        return exc.with_traceback(below), failure
    raise AssertionError("the body raised nothing")


def arrive(failure: Failure) -> BaseException:
    """The exception at the other end."""
    sent: Failure = pickle.loads(cloudpickle.dumps(failure))
    return sent.exception()


def travel(body: Body) -> tuple[Any, Any]:
    """An exception before and after its journey."""
    original, failure = run(body)
    return original, arrive(failure)


def shown(exc: BaseException) -> str:
    return "".join(traceback.format_exception(exc))


def raising(exc: BaseException) -> Body:
    def body() -> NoReturn:
        raise exc

    return body


def test_large_arrays_travel_with_an_exception() -> None:
    large = np.arange(100_000)
    lock = threading.Lock()

    class Held(Exception):
        """Does not load by itself, so it is taken apart."""

        def __init__(self, array: Any, lock: Any) -> None:
            super().__init__(array)
            self.array = array
            self.lock = lock

    error = ValueError(large)
    error.array = large  # type: ignore[attr-defined]
    for exc in (error, Held(large, lock)):
        sent = arrive(run(raising(exc))[1])
        assert type(sent).__name__ == type(exc).__name__
        assert (sent.args[0] == large).all()
        assert (sent.array == large).all()  # type: ignore[attr-defined]


# ── awkward exceptions ──────────────────────────────────────────────────────────────────────────


class TwoArguments(Exception):
    """Pickles, and then cannot be unpickled."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(code)
        self.code = code


class HoldsLock(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text
        self.lock = threading.Lock()


class BadStr(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


class BadReduce(Exception):
    def __reduce__(self) -> NoReturn:
        raise ZeroDivisionError


class BadState(Exception):
    def __setstate__(self, state: object) -> NoReturn:
        raise ZeroDivisionError


class Impostor(Exception):
    """Comes out of a pickle as something else."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (ValueError, ("not it",))


class PickyNew(Exception):
    """Can be made with its two arguments only, and keeps one."""

    def __new__(cls, one: object, two: object) -> "PickyNew":
        return super().__new__(cls, one)

    def __init__(self, one: object, two: object) -> None:
        super().__init__(one)


class CrashesElsewhere(Exception):
    """Unpickles in the child, which is this thread here, and nowhere else."""

    home = threading.main_thread()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self)._rebuild, (self.args,))

    @classmethod
    def _rebuild(cls, args: tuple[Any, ...]) -> "CrashesElsewhere":
        if threading.current_thread() is not cls.home:
            raise ImportError("no module of that name here")
        return cls(*args)


@pytest.mark.parametrize(
    "exc",
    [
        ValueError("no", 7),
        KeyError("x"),
        FileNotFoundError(2, "No such file", "/nonesuch"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        StopIteration(3),
        SystemExit(3),
        KeyboardInterrupt(),
        MemoryError(),
        TwoArguments(7, "seven"),
        KeywordOnly(code=7),
        BadStr("x"),
        BadReduce("x", 1),
        BadState("x"),
        Impostor("x"),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_an_exception_comes_back_as_what_it_was(exc: BaseException) -> None:
    original, rebuilt = travel(raising(exc))

    assert type(rebuilt) is type(original)
    assert rebuilt.args == original.args
    assert vars(rebuilt) == vars(original)


def test_what_an_exception_keeps_in_c_comes_along() -> None:
    _, rebuilt = travel(raising(FileNotFoundError(2, "No such file", "/nonesuch")))

    assert (rebuilt.errno, rebuilt.filename) == (2, "/nonesuch")


def test_an_exception_that_holds_a_lock_comes_without_it() -> None:
    _, rebuilt = travel(raising(HoldsLock("x")))

    assert type(rebuilt) is HoldsLock
    assert rebuilt.args == ("x",)
    assert rebuilt.text == "x"
    assert re.fullmatch(r"<unlocked _thread.lock object at 0x\w+>", repr(rebuilt.lock))


class WithSlots(Exception):
    __slots__ = ("code",)

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


def test_attributes_in_slots_come_along() -> None:
    _, rebuilt = travel(raising(WithSlots("x", code=5)))

    assert isinstance(rebuilt, WithSlots)
    assert (rebuilt.args, rebuilt.code) == (("x",), 5)


@dataclass(frozen=True)
class Frozen(Exception):
    code: int


def test_an_exception_that_cannot_be_changed_comes_with_its_traceback() -> None:
    _, rebuilt = travel(raising(Frozen(5)))

    assert isinstance(rebuilt, Frozen)
    assert rebuilt.code == 5
    assert rebuilt.__traceback__ is not None


class OwnWay(Exception):
    """As pydantic's ValidationError: it is rebuilt by a function, and then has other args."""

    def __reduce__(self) -> Any:
        return _make_own_way, ("rebuilt", self.text)

    def __str__(self) -> str:
        return self.text

    text = ""


def _make_own_way(how: str, text: str) -> OwnWay:
    exc = OwnWay(how, text)
    exc.text = text
    return exc


def test_what_a_class_rebuilds_in_its_own_way_has_its_own_args() -> None:
    exc = OwnWay()
    exc.text = "x"
    _, rebuilt = travel(raising(exc))

    assert type(rebuilt) is OwnWay
    assert (rebuilt.args, rebuilt.text) == ((), "x")


def test_an_exception_that_is_held_keeps_its_cause() -> None:
    held = ValueError("held")
    held.__cause__ = LookupError("its cause")
    exc = RuntimeError("x", held)
    exc.also = held  # type: ignore[attr-defined]

    _, rebuilt = travel(raising(exc))

    assert repr(rebuilt.args[1].__cause__) == "LookupError('its cause')"
    assert rebuilt.args[1] is vars(rebuilt)["also"]


def test_a_cause_that_is_the_context_too_stays_one() -> None:
    exc = ValueError("x")
    exc.__cause__ = exc.__context__ = LookupError("both")

    _, rebuilt = travel(raising(exc))

    assert repr(rebuilt.__cause__) == "LookupError('both')"
    assert rebuilt.__cause__ is rebuilt.__context__


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are new in Python 3.11")
def test_the_members_of_groups_keep_their_tracebacks() -> None:
    def caught(text: str) -> Exception:
        try:
            raise ValueError(text)
        except ValueError as exc:
            return exc

    shared = caught("shared")
    group = getattr(builtins, "ExceptionGroup")  # noqa: B009
    outer = group("outer", [group("one", [shared, caught("own")]), group("other", [shared])])

    _, rebuilt = travel(raising(outer))

    assert shown(rebuilt).count("raise ValueError(text)") == 3


def test_a_class_that_nobody_can_import_is_sent_along() -> None:
    class Local(Exception):
        pass

    _, rebuilt = travel(raising(Local("x")))

    assert type(rebuilt).__qualname__ == Local.__qualname__
    assert rebuilt.args == ("x",)


def test_an_argument_that_cannot_be_pickled_is_shown_as_it_was() -> None:
    exc = ValueError("x", threading.Lock())
    _, rebuilt = travel(raising(exc))

    assert type(rebuilt) is ValueError
    assert repr(rebuilt) == repr(exc)
    assert repr(pickle.loads(pickle.dumps(rebuilt))) == repr(exc)


def test_an_exception_that_cannot_be_rebuilt_is_stood_for_and_named() -> None:
    exc = PickyNew(1, 2)
    _, rebuilt = travel(raising(exc))

    assert type(rebuilt) is RemoteError
    assert rebuilt.type_name == f"{type(exc).__module__}.{type(exc).__qualname__}"
    assert rebuilt.text == str(exc)
    assert str(rebuilt) == f"{rebuilt.type_name}: {rebuilt.text}"


def test_an_exception_that_nobody_can_even_read_is_stood_for() -> None:
    class Silent(BadStr):
        def __new__(cls, one: object, two: object) -> "Silent":
            return super().__new__(cls, one)

        def __init__(self, one: object, two: object) -> None:
            super().__init__(one)

    _, rebuilt = travel(raising(Silent(1, 2)))

    assert type(rebuilt) is RemoteError
    assert rebuilt.text == "<its __str__ raised ZeroDivisionError>"


def test_an_exception_that_loads_in_the_child_alone_is_stood_for() -> None:
    _, failure = run(raising(CrashesElsewhere("x")))
    arrived: list[BaseException] = []
    thread = threading.Thread(target=lambda: arrived.append(arrive(failure)))

    thread.start()
    thread.join()

    assert type(arrived[0]) is RemoteError
    assert arrived[0].text == "x"
    assert shown(arrived[0]).count("raise exc") == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
@pytest.mark.parametrize("exc", [ValueError("x"), HoldsLock("x")], ids=repr)
def test_notes_come_along(exc: BaseException) -> None:
    if sys.version_info >= (3, 11):
        exc.add_note("while it ran")

    original, rebuilt = travel(raising(exc))

    assert shown(rebuilt) == shown(original)
    assert "while it ran" in shown(rebuilt)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="groups came with Python 3.11")
def test_a_group_comes_back_with_its_exceptions() -> None:
    group = builtins.ExceptionGroup("two", [ValueError("x"), HoldsLock("y")])  # type: ignore[attr-defined,unused-ignore]

    _, rebuilt = travel(raising(group))

    assert "two" in str(rebuilt)


# ── chains ──────────────────────────────────────────────────────────────────────────────────────


def with_cause() -> None:
    try:
        [][0]
    except IndexError as exc:
        raise TwoArguments(7, "seven") from exc


def with_context() -> None:
    try:
        NOTHING["x"]
    except KeyError:
        int("no number")


def from_none() -> None:
    try:
        NOTHING["x"]
    except KeyError:
        raise ValueError("alone") from None


def with_both() -> None:
    try:
        with_cause()
    except TwoArguments:
        try:
            int("x")
        except ValueError as exc:
            raise RuntimeError("three") from exc


@pytest.mark.parametrize("body", [with_cause, with_context, from_none, with_both])
def test_a_chain_is_shown_as_it_was(body: Body) -> None:
    original, rebuilt = travel(body)

    assert shown(rebuilt) == shown(original)
    assert rebuilt.__suppress_context__ == original.__suppress_context__


def test_a_cause_is_of_its_own_class() -> None:
    _, rebuilt = travel(with_cause)

    assert type(rebuilt.__cause__) is IndexError


def test_a_context_that_was_suppressed_is_there_and_not_shown() -> None:
    _, rebuilt = travel(from_none)

    assert type(rebuilt.__context__) is KeyError
    assert "KeyError" not in shown(rebuilt)


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_a_chain_that_bites_its_tail_ends(link: str) -> None:
    one, two, three = ValueError("one"), ValueError("two"), ValueError("three")
    for exc, other in ((one, two), (two, three), (three, one)):
        setattr(exc, link, other)

    _, rebuilt = travel(raising(one))

    assert rebuilt.args == ("one",)
    assert getattr(getattr(rebuilt, link), link).args == ("three",)


def test_an_exception_that_is_its_own_cause_comes_back() -> None:
    exc = ValueError("me")
    exc.__cause__ = exc

    _, rebuilt = travel(raising(exc))

    assert rebuilt.args == ("me",)


def test_an_endless_chain_is_cut() -> None:
    exc = ValueError(0)
    for number in range(1, 2000):
        new = ValueError(number)
        new.__context__ = exc
        exc = new

    _, rebuilt = travel(raising(exc))

    length = 0
    link: BaseException | None = rebuilt
    while link is not None:
        assert link.args == (1999 - length,)
        length += 1
        link = link.__context__
    assert MAX_CHAIN <= length <= MAX_CHAIN + 1


# ── tracebacks ──────────────────────────────────────────────────────────────────────────────────


class Renderer:
    def render(self, numbers: list[int]) -> list[float]:
        return [self._share(number, of=sum(numbers)) for number in numbers]

    def _share(self, number: int, *, of: int) -> float:
        ä = number
        return ä / (of)


def in_methods() -> None:
    Renderer().render([1, -1])


def in_a_lambda() -> None:
    (lambda x: x["missing"])(NOTHING)


def in_a_generator() -> None:
    def numbers() -> Any:
        yield 1
        raise ValueError("two")

    sum(numbers())


def in_nested_functions() -> None:
    def outer() -> None:
        def inner() -> None:
            NOTHING["x"]["y"]

        inner()

    outer()


def in_the_standard_library() -> None:
    import json

    json.loads("{")


def in_a_long_expression() -> None:
    numbers = {"a": [1, 2, {"b": None}]}
    print(numbers["a"][0] + numbers["a"][1] * (numbers["a"][2]["b"]["c"] - 1))  # type: ignore[index]


def in_a_call_over_lines() -> None:
    int(
        "1",
        base=sum(
            [1, 2, None]  # type: ignore[list-item]
        ),
    )


BODIES = [
    in_methods,
    in_a_lambda,
    in_a_generator,
    in_nested_functions,
    in_the_standard_library,
    in_a_long_expression,
    in_a_call_over_lines,
]


@pytest.mark.parametrize("body", BODIES)
def test_a_traceback_is_shown_as_it_was(body: Body) -> None:
    original, rebuilt = travel(body)

    assert shown(rebuilt) == shown(original)


@pytest.mark.parametrize("body", BODIES)
def test_a_traceback_has_the_frames_that_it_had(body: Body) -> None:
    original, rebuilt = travel(body)

    def frames(exc: BaseException) -> list[tuple[Any, ...]]:
        return [
            (f.f_code.co_filename, f.f_code.co_name, lineno, f.f_globals["__name__"])
            for f, lineno in traceback.walk_tb(exc.__traceback__)
        ]

    assert frames(rebuilt) == frames(original)


def test_no_frame_of_ours_and_no_variable_of_theirs_is_in_it() -> None:
    _, rebuilt = travel(in_methods)

    for frame, _ in traceback.walk_tb(rebuilt.__traceback__):
        assert frame.f_code.co_filename == __file__
        assert set(frame.f_globals) <= {"__name__", "__marker__", "__builtins__"}


def _generated(filename: str) -> Body:
    """A function whose source only this process has, as in a notebook."""
    source = "def body():\n    numbers = []\n    return numbers[0] + 1\n"
    namespace: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), namespace)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    return namespace["body"]  # type: ignore[no-any-return]


def test_generated_code_is_shown_where_its_source_is_not() -> None:
    filename = "<ipython-input-7-abcdef>"
    original, failure = run(_generated(filename))
    expected = shown(original)
    assert "return numbers[0] + 1" in expected
    # The other process has never seen it.
    del linecache.cache[filename]

    rebuilt = arrive(failure)
    linecache.checkcache()

    assert shown(rebuilt) == expected


def test_generated_code_without_source_is_shown_as_it_was() -> None:
    namespace: dict[str, Any] = {}
    exec("def body():\n    return missing", namespace)

    original, rebuilt = travel(namespace["body"])

    assert shown(rebuilt) == shown(original)


def test_lines_of_one_generated_source_do_not_push_each_other_out() -> None:
    source = "def one():\n    {}['x']\ndef two():\n    one()\n"
    filename = "<generated two>"
    namespace: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), namespace)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    original, failure = run(namespace["two"])
    expected = shown(original)
    del linecache.cache[filename]

    assert shown(arrive(failure)) == expected


def test_a_frame_without_a_line_number_is_carried_over() -> None:
    # As code generators leave them that do not care for positions.
    def body() -> None:
        raise ValueError("x")

    body.__code__ = body.__code__.replace(co_linetable=b"")

    original, rebuilt = travel(body)

    assert type(rebuilt) is ValueError
    assert rebuilt.args == original.args


def test_a_deep_recursion_comes_back_with_both_of_its_ends() -> None:
    def outermost() -> None:
        recurse(0)

    def recurse(depth: int) -> None:
        if depth > 400:
            raise RecursionError("too deep")
        recurse(depth + 1)

    _, rebuilt = travel(outermost)
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(rebuilt.__traceback__)]

    assert len(names) == MAX_FRAMES
    assert names[0] == "outermost"
    assert shown(rebuilt).rstrip().endswith("RecursionError: too deep")
    assert 'raise RecursionError("too deep")' in shown(rebuilt)


def test_python_s_own_recursion_error_comes_back() -> None:
    def recurse() -> None:
        recurse()

    _, rebuilt = travel(recurse)

    assert type(rebuilt) is RecursionError


# ── outcomes ────────────────────────────────────────────────────────────────────────────────────


def test_a_value_is_the_result() -> None:
    assert Outcome(value=7).result() == 7


def test_a_failure_is_raised() -> None:
    _, failure = run(raising(KeyError("x")))

    with pytest.raises(KeyError, match="x"):
        Outcome(failure=failure).result()
