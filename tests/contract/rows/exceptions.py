"""What a body raises, and results that no backend takes."""

import builtins
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import functools
import json
import linecache
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

from billiard.exceptions import (
    SoftTimeLimitExceeded,
    Terminated,
    TimeLimitExceeded,
    WorkerLostError,
)
from celery import Task
from celery.exceptions import Ignore, Reject

from contract.observation import count_names
from contract.table import Differs, Row, Seen, task

#: Python 3.11.
HAS_GROUPS = hasattr(builtins, "ExceptionGroup")
ExceptionGroup: Any = getattr(builtins, "ExceptionGroup", None)

#: What is under test of a body that fails, by the name by which a row asks for it.
_failures: dict[str, Callable[[], Any]] = {}
#: The same of one that returns.
_results: dict[str, Callable[[], Any]] = {}


def failure(function: Callable[[], Any]) -> Callable[[], Any]:
    _failures[function.__name__] = function
    return function


def result(function: Callable[[], Any]) -> Callable[[], Any]:
    _results[function.__name__] = function
    return function


@task()
def fail(case: str) -> Any:
    return _failures[case]()


@task()
def give(case: str) -> Any:
    return _results[case]()


@task(throws=(LookupError, OSError))
def fail_as_expected(case: str) -> Any:
    return _failures[case]()


@task(ignore_result=True)
def give_and_ignore(case: str) -> Any:
    return _results[case]()


@task(ignore_result=True, store_errors_even_if_ignored=True)
def fail_and_store(case: str) -> Any:
    return _failures[case]()


@task(bind=True, acks_late=True, reject_on_worker_lost=True)
def fail_once(self: Task, case: str) -> Any:
    if self.request.delivery_info["redelivered"]:
        return "the second time"
    return _failures[case]()


# ── what an exception carries ───────────────────────────────────────────────────────────────────


@failure
def attributes() -> NoReturn:
    error = ValueError("with attributes", 3)
    error.code = 7  # type: ignore[attr-defined]
    error.data = {"key": ["value"]}  # type: ignore[attr-defined]
    raise error


@failure
def no_arguments() -> NoReturn:
    raise ValueError


@failure
def many_arguments() -> NoReturn:
    raise ValueError(1, "two", None, 4.5, b"five", {"six": 6}, [7], (8,), {9})


@failure
def notes() -> NoReturn:
    error = ValueError("with notes")
    error.add_note("the first note")
    error.add_note("the second,\nof two lines")
    raise error


@failure
def a_note_is_added_on_the_way() -> None:
    try:
        no_arguments()
    except ValueError as exc:
        exc.add_note("on the way")
        raise


@failure
def a_cause() -> None:
    try:
        attributes()
    except ValueError as exc:
        raise LookupError("because of that") from exc


@failure
def a_cause_that_was_never_raised() -> NoReturn:
    raise LookupError("because of that") from ValueError("never raised")


@failure
def a_cause_and_another_context() -> None:
    try:
        raise ValueError("the context")
    except ValueError:
        raise LookupError("of both") from KeyError("the cause")


@failure
def a_context() -> None:
    try:
        attributes()
    except ValueError:
        raise LookupError("while handling that")  # noqa: B904


@failure
def a_context_in_finally() -> None:
    try:
        attributes()
    finally:
        a_key_error()


@failure
def from_none() -> None:
    try:
        attributes()
    except ValueError:
        raise LookupError("and no more of it") from None


@failure
def a_cause_of_a_cause() -> None:
    try:
        a_cause()
    except LookupError as exc:
        raise RuntimeError("in the end") from exc


@failure
def a_long_chain() -> None:
    error: Exception = ValueError("link 0")
    for number in range(1, 41):
        try:
            raise ValueError(f"link {number}") from error
        except ValueError as exc:
            error = exc
    raise error


@failure
def a_chain_that_bites_its_tail() -> NoReturn:
    first, second = ValueError("the first"), ValueError("the second")
    first.__cause__, second.__cause__ = second, first
    raise first


@failure
def raised_again() -> None:
    try:
        attributes()
    except ValueError as exc:
        raise exc


# ── groups ──────────────────────────────────────────────────────────────────────────────────────


def _caught(function: Callable[[], Any]) -> Exception:
    try:
        function()
    except Exception as exc:
        return exc
    raise AssertionError("nothing was raised")


@failure
def a_group() -> NoReturn:
    raise ExceptionGroup("of two", [_caught(attributes), _caught(a_cause)])


@failure
def a_nested_group() -> NoReturn:
    inner = ExceptionGroup("the inner", [_caught(a_key_error), _caught(no_arguments)])
    raise ExceptionGroup("the outer", [inner, _caught(attributes), OSError(2, "never raised")])


@failure
def a_group_with_notes() -> NoReturn:
    group = ExceptionGroup("of one", [_caught(attributes)])
    group.exceptions[0].add_note("of the member")
    group.add_note("of the group")
    raise group


@failure
def a_group_with_a_member_that_is_not_pickled() -> NoReturn:
    raise ExceptionGroup("of two", [_caught(with_a_connection), _caught(attributes)])


@failure
def a_group_as_a_cause() -> NoReturn:
    raise LookupError("of a group") from _caught(a_group)


@failure
def a_group_of_own_class() -> NoReturn:
    raise OwnGroup("of own class", [_caught(attributes)])


@failure
def what_is_left_of_a_group() -> None:
    try:
        a_nested_group()
    except ExceptionGroup as group:
        raise group.subgroup(KeyError)  # noqa: B904


if HAS_GROUPS:

    class OwnGroup(ExceptionGroup):  # type: ignore[misc]
        code = 5

        def derive(self, excs: Any) -> "OwnGroup":
            return OwnGroup(self.message, excs)


# ── classes that make it hard ───────────────────────────────────────────────────────────────────


class OtherArguments(Exception):
    """Pickles, and is then loaded with one argument where it takes two."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


class KeywordsOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__()
        self.code = code


class Connection:
    """Cannot be pickled, as a lock, a socket or a file cannot be; gevent replaces all of these."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle a connection")

    def __repr__(self) -> str:
        return "<a connection>"


class WithConnection(LookupError):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.connection = Connection()
        self.code = 4


def _refuse_to_load(*_: Any) -> NoReturn:
    raise RuntimeError("this does not load")


class NotLoaded(Exception):
    def __reduce__(self) -> Any:
        return _refuse_to_load, (1,)


class NotDumped(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("this is not dumped")


class LoadedAsAnother(Exception):
    def __reduce__(self) -> Any:
        return ValueError, self.args


class BadStr(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no str")


class BadRepr(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@dataclasses.dataclass
class OfDataclass(Exception):
    code: int
    reason: str = "none"


@dataclasses.dataclass(frozen=True)
class OfFrozenDataclass(Exception):
    code: int


class Place(NamedTuple):
    line: int
    column: int


class WithSlots(Exception):
    __slots__ = ("code",)

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code

    def __str__(self) -> str:
        return f"{self.args[0]} ({self.code})"


class Empty(Exception):
    """Is false, as a container without items is."""

    def __len__(self) -> int:
        return 0


class EqualToAll(Exception):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


@failure
def other_arguments() -> NoReturn:
    raise OtherArguments(5, "a reason")


@failure
def keywords_only() -> NoReturn:
    raise KeywordsOnly(code=6)


@failure
def with_a_connection() -> NoReturn:
    raise WithConnection("of a connection")


@failure
def a_connection_among_the_arguments() -> NoReturn:
    raise LookupError("of a connection", Connection())


@failure
def not_loaded() -> NoReturn:
    raise NotLoaded("an argument")


@failure
def not_dumped() -> NoReturn:
    raise NotDumped("an argument")


@failure
def loaded_as_another() -> NoReturn:
    raise LoadedAsAnother("an argument")


@failure
def bad_str() -> NoReturn:
    raise BadStr("an argument")


@failure
def bad_repr() -> NoReturn:
    raise BadRepr("an argument")


@failure
def of_a_local_class() -> NoReturn:
    class Local(LookupError):
        code = 5

    raise Local("an argument")


@failure
def of_a_made_class() -> NoReturn:
    raise type("Made", (ValueError,), {})("an argument")


@failure
def of_a_dataclass() -> NoReturn:
    raise OfDataclass(5, reason="a reason")


@failure
def of_a_frozen_dataclass() -> NoReturn:
    raise OfFrozenDataclass(5)


@failure
def with_a_namedtuple() -> NoReturn:
    raise ValueError(Place(1, column=2))


@failure
def with_slots() -> NoReturn:
    raise WithSlots("an argument", code=5)


@failure
def empty() -> NoReturn:
    raise Empty("an argument")


@failure
def equal_to_all() -> NoReturn:
    raise EqualToAll("an argument")


@failure
def a_cause_with_a_connection() -> NoReturn:
    raise ValueError("because of a connection") from _caught(with_a_connection)


@failure
def other_arguments_with_a_cause() -> None:
    try:
        attributes()
    except ValueError as exc:
        raise OtherArguments(5, "a reason") from exc


@failure
def huge_arguments() -> NoReturn:
    raise ValueError("x" * 20_000, ["y"] * 500)


# ── where they come from ────────────────────────────────────────────────────────────────────────


@failure
def a_key_error() -> Any:
    return {"a": 1}["a key"]


@failure
def stop_iteration() -> Any:
    return next(iter(()))


@failure
def stop_iteration_with_value() -> NoReturn:
    raise StopIteration(5)


@failure
def an_assertion() -> None:
    assert not _failures, "an assertion"


@failure
def a_missing_file() -> Any:
    return open("/does/not/exist")


@failure
def two_missing_files() -> None:
    os.rename("/does/not/exist", "/neither/does/this")


@failure
def a_syntax_error() -> None:
    compile("one = 1\ntwo = = 2\n", MADE, "exec")


@failure
def a_decode_error() -> str:
    return b"ab\xff\xfe".decode()


@failure
def an_encode_error() -> bytes:
    return "gr\udcffn".encode()


@failure
def a_surrogate() -> NoReturn:
    raise ValueError("not UTF-8: \udcff")


@failure
def not_ascii() -> NoReturn:
    raise ValueError("Grüße, 世界 \N{SNOWMAN}\x00\n\tand control characters")


@failure
def an_import_error() -> None:
    exec("import a_module_that_is_nowhere")


@failure
def an_attribute_error() -> Any:
    return _failures.atribute  # type: ignore[attr-defined]


@failure
def a_name_error() -> Any:
    return atributes  # type: ignore[name-defined]  # noqa: F821


@failure
def deep_recursion() -> Any:
    return 1 + deep_recursion()


def _numbers() -> Iterator[int]:
    yield 1
    raise ValueError("in a generator")


@failure
def in_a_generator() -> list[int]:
    return [number * 2 for number in _numbers()]


def _stops() -> Iterator[int]:
    yield 1
    raise StopIteration


@failure
def a_generator_that_stops() -> int:
    return sum(_stops())


@failure
def in_a_c_function() -> Any:
    return struct.unpack("<I", b"abc")


@failure
def in_a_callback_of_a_c_function() -> list[str]:
    return sorted(["a", "b"], key=lambda value: int(value))


@failure
def in_a_thread_pool() -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(attributes).result()


#: As files of the rows are, so that the frames are compared.
MADE = "</contract/rows/ made>"
MADE_WITH_SOURCE = "</contract/rows/ made, with source>"
SOURCE = "def made(number):\n    return number / 0\n\nmade(1)\n"


@failure
def in_made_code() -> None:
    exec(compile(SOURCE, MADE, "exec"), {"__name__": "made"})


@failure
def in_made_code_with_source() -> None:
    # As a notebook and a code generator (attrs, doctest) do.
    lines = SOURCE.splitlines(keepends=True)
    linecache.cache[MADE_WITH_SOURCE] = (len(SOURCE), None, lines, MADE_WITH_SOURCE)
    exec(compile(SOURCE, MADE_WITH_SOURCE, "exec"), {"__name__": "made"})


@failure
def in_a_lambda() -> Any:
    divide: Callable[[int], float] = lambda number: number / 0  # noqa: E731
    return divide(1)


def _through(function: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(function)
    def wrapper() -> Any:
        return function()

    return wrapper


@failure
@_through
def in_a_decorator() -> NoReturn:
    raise ValueError("through a decorator")


class Holder:
    @property
    def value(self) -> int:
        raise ValueError("in a property")

    def __enter__(self) -> "Holder":
        return self

    def __exit__(self, *exc_info: object) -> None:
        raise LookupError("in __exit__")

    def __repr__(self) -> str:
        return repr(self.value)


@failure
def in_a_property() -> int:
    return Holder().value


@failure
def in_exit() -> None:
    with Holder():
        attributes()


@failure
def in_repr() -> str:
    return f"{Holder()!r}"


@contextlib.contextmanager
def _managed() -> Iterator[None]:
    try:
        yield
    except ValueError as exc:
        raise LookupError("by a context manager") from exc


@failure
def in_a_context_manager() -> None:
    with _managed():
        attributes()


@failure
def in_several_lines() -> NoReturn:
    raise ValueError(
        "in several lines",
        sum(
            [1, 2],
        ),
    )


@failure
def in_the_middle_of_a_line() -> float:
    numbers = {"a": {"b": [1, 0]}}
    return numbers["a"]["b"][0] / numbers["a"]["b"][1] + numbers["a"]["b"][0]


@failure
def with_another_traceback() -> NoReturn:
    raise LookupError("elsewhere").with_traceback(_caught(attributes).__traceback__)


@failure
def json_error() -> Any:
    return json.loads('{"a": }')


@failure
def regular_expression_error() -> Any:
    return re.compile("(a")


# ── Celery's own ────────────────────────────────────────────────────────────────────────────────


@failure
def ignore() -> NoReturn:
    raise Ignore("a reason")


@failure
def ignore_while_handling() -> None:
    try:
        attributes()
    except ValueError as exc:
        raise Ignore("a reason") from exc


@failure
def reject() -> NoReturn:
    raise Reject("a reason", requeue=False)


@failure
def reject_with_an_exception() -> NoReturn:
    raise Reject(_caught(attributes), requeue=False)


@failure
def reject_with_a_connection() -> NoReturn:
    raise Reject(Connection(), requeue=False)


@failure
def ignore_with_a_connection() -> NoReturn:
    raise Ignore(Connection())


@failure
def soft_time_limit() -> NoReturn:
    raise SoftTimeLimitExceeded(5)


@failure
def time_limit() -> NoReturn:
    raise TimeLimitExceeded(5)


@failure
def worker_lost() -> NoReturn:
    raise WorkerLostError("by the body")


@failure
def terminated() -> NoReturn:
    raise Terminated(15)


# ── what ends a plain worker ────────────────────────────────────────────────────────────────────


class OwnBaseException(BaseException):
    pass


@failure
def memory_error() -> NoReturn:
    raise MemoryError("of the body")


@failure
def system_exit() -> NoReturn:
    raise SystemExit(3)


@failure
def keyboard_interrupt() -> NoReturn:
    raise KeyboardInterrupt


@failure
def generator_exit() -> NoReturn:
    raise GeneratorExit("of the body")


@failure
def own_base_exception() -> NoReturn:
    raise OwnBaseException("of the body")


# ── results ─────────────────────────────────────────────────────────────────────────────────────


class ByJson:
    def __json__(self) -> Any:
        return {"by": "__json__"}


class ByJsonWithConnection(ByJson):
    def __init__(self) -> None:
        self.connection = Connection()


class ByJsonNotLoaded(ByJson):
    def __reduce__(self) -> Any:
        return _refuse_to_load, (1,)


class NotAtHome:
    def __repr__(self) -> str:
        return "<not at home>"


class Colour(enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


@dataclasses.dataclass
class Point:
    x: int
    y: int


@result
def no_json() -> object:
    return NotAtHome()


@result
def no_json_inside() -> object:
    return {"deep": [1, {"down": NotAtHome()}]}


@result
def no_pickle() -> object:
    return Connection()


@result
def a_generator() -> object:
    return (number for number in range(3))


@result
def a_function() -> object:
    return lambda: 1


@result
def an_exception() -> object:
    return ValueError("returned")


@result
def an_exception_that_does_not_load() -> object:
    # As asyncio.gather(return_exceptions=True) gives.
    return [OtherArguments(5, "a reason")]


@result
def by_json() -> object:
    return ByJson()


@result
def by_json_with_a_connection() -> object:
    return ByJsonWithConnection()


@result
def by_json_not_loaded() -> object:
    return ByJsonNotLoaded()


@result
def a_set() -> object:
    return {5}


@result
def a_dataclass() -> object:
    return Point(1, 2)


@result
def an_enum() -> object:
    return Colour.RED


@result
def a_circle() -> object:
    circle: list[Any] = []
    circle.append(circle)
    return circle


@result
def other_values() -> object:
    return {
        "nan": float("nan"),
        "inf": float("-inf"),
        "bytes": b"abc",
        "not UTF-8": b"\xff\xfe",
        "tuple": (1, (2, 3)),
        "namedtuple": Place(1, 2),
        "number": Number.ONE,
        "large": 2**70,
        "decimal": decimal.Decimal("1.50"),
        "date": datetime.date(2020, 2, 3),
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
        "ordered": collections.OrderedDict(b=1, a=2),
        "true": True,
        "none": None,
        "text": "Grüße, 世界 \x00 \U0001f600",
        5: "an integer for a key",
    }


@result
def a_long_string() -> object:
    return "long " * 5_000


@result
def a_surrogate_in_a_string() -> object:
    return "not UTF-8: \udcff"


# ── rows ────────────────────────────────────────────────────────────────────────────────────────


def _failing(
    name: str,
    case: Callable[[], Any],
    error: str,
    *,
    of: Any = fail,
    seen: str | None = None,
    unseen: str | None = None,
    has_trace: bool = True,
    differs: Differs | None = None,
    scrub: tuple[tuple[str, str], ...] = (),
    **expects: Any,
) -> Row:
    """A row of a body that fails.

    Args:
        seen: a pattern that is found in what the task's hooks are told of the exception.
        unseen: one that is found nowhere.
        has_trace: whether the stored traceback shows the body.
        of: the task.
    """

    def is_right(observed: Seen) -> bool:
        told = json.dumps(observed["tasks"], ensure_ascii=False)
        hook = next(
            (
                data["value"]
                for lines in observed["tasks"][observed["first"]]["signals"].values()
                for name, data in lines
                if name == "on_failure"
            ),
            "",
        )
        return (seen is None or re.search(seen, hook) is not None) and (
            unseen is None or re.search(unseen, told) is None
        )

    own = {"trace": f"in {case.__name__}\n"} if has_trace else {}
    return Row(
        name,
        lambda app: of.on(app).delay(case.__name__),
        expects={
            "state": "FAILURE",
            "error": error,
            "runs": 1,
            "check": is_right,
            **own,
            **expects,
        },
        differs=differs,
        scrub=scrub,
    )


def _giving(
    name: str,
    case: Callable[[], Any],
    *,
    of: Any = give,
    trap: int | None = None,
    differs: Differs | None = None,
    **expects: Any,
) -> Row:
    return Row(
        name,
        lambda app: of.on(app).delay(case.__name__),
        expects={"runs": 1, **expects},
        trap=trap,
        differs=differs,
    )


def _ends_plain(name: str, case: Callable[[], Any], trap: int, **isolated: Any) -> Row:
    """A row of what ends a plain worker, or leaves its caller waiting for ever."""
    return Row(
        name,
        lambda app: fail.on(app).delay(case.__name__),
        expects={"state": None},
        trap=trap,
        plain=False,
        differs=Differs(
            reason="In a plain worker it ends the worker or its slot, or the task has no state.",
            isolated={
                "state": "FAILURE",
                "runs": 1,
                "trace": f"in {case.__name__}\n",
                "left": 0,
                **isolated,
            },
        ),
    )


#: What Celery puts in the place of an exception that cannot be pickled.
WRAPPER = "UnpickleableExceptionWrapper"

NO_JSON: Mapping[str, Any] = {"state": "FAILURE", "error": "EncodeError"}

KEEPS_CLASS = Differs(
    reason="Celery takes the nearest base class that pickles; what has crossed processes has kept "
    "its own, with the attributes that pickle.",
    isolated={
        "state": "FAILURE",
        "error": "WithConnection",
        "message": "of a connection",
        "trace": "in with_a_connection\n",
        "log": r"WithConnection\('of a connection'\)",
    },
)
NO_PICKLE = Differs(
    reason="What cannot be pickled stays where it is.",
    isolated={
        "state": "FAILURE",
        "error": "UnpicklableError",
        "runs": 1,
        "log": "cannot be pickled",
    },
)
STAND_IN = Differs(
    reason="Hooks and receivers get what the backend will hold; the object cannot leave.",
    isolated={"state": "SUCCESS", "result": {"by": "__json__"}, "log": "succeeded in"},
)

CARRIED = [
    _failing(
        "an exception has attributes",
        attributes,
        "ValueError",
        seen=r"'code': '7'",
        log=r"ValueError\('with attributes', 3\)",
    ),
    _failing("an exception has no arguments", no_arguments, "ValueError", seen=r"args=\(\)"),
    _failing("arguments of many types", many_arguments, "ValueError", seen=r"b'five'.*\{9\}"),
    _failing(
        "a cause",
        a_cause,
        "LookupError",
        seen=r"cause=\(<builtins.ValueError>",
        log=r"(?s)in attributes\n.*direct cause.*in a_cause\n",
    ),
    _failing(
        "a cause that was never raised",
        a_cause_that_was_never_raised,
        "LookupError",
        seen=r"cause=\(<builtins.ValueError>",
        log="(?s)never raised.*direct cause",
    ),
    _failing(
        "a cause and another context",
        a_cause_and_another_context,
        "LookupError",
        seen=r"cause=\(<builtins.KeyError>.*context=\(<builtins.ValueError>",
    ),
    _failing(
        "an exception while another is handled",
        a_context,
        "LookupError",
        seen=r"context=\(<builtins.ValueError>",
        log=r"(?s)in attributes\n.*During handling.*in a_context\n",
    ),
    _failing("an exception in finally", a_context_in_finally, "KeyError", log="During handling"),
    _failing(
        "from None",
        from_none,
        "LookupError",
        seen=r"context suppressed",
        unseen="During handling",
    ),
    _failing(
        "a cause of a cause",
        a_cause_of_a_cause,
        "RuntimeError",
        seen=r"cause=\(<builtins.LookupError>.*cause=\(<builtins.ValueError>",
    ),
    _failing(
        "a long chain",
        a_long_chain,
        "ValueError",
        message="link 40",
        log=r"(?s)link 0\n.*link 1\n.*link 20\n.*link 39\n",
    ),
    _failing(
        "a chain that bites its tail",
        a_chain_that_bites_its_tail,
        "ValueError",
        seen=r"the first.*cause=\(.*the second",
    ),
    _failing("an exception is raised again", raised_again, "ValueError", log="in attributes"),
]

GROUPS = [
    _failing(
        "an exception has notes",
        notes,
        "ValueError",
        seen=r"__notes__.*the first note",
        log="the first note\nthe second,\nof two lines",
    ),
    _failing(
        "a note is added on the way", a_note_is_added_on_the_way, "ValueError", log="\non the way"
    ),
    _failing(
        "a group",
        a_group,
        "ExceptionGroup",
        seen=r"part 0=\(<builtins.ValueError>.*part 1=\(<builtins.LookupError>",
        log=r"(?s)in attributes\n.*in a_cause\n",
    ),
    _failing(
        "a nested group",
        a_nested_group,
        "ExceptionGroup",
        seen=r"part 0=\(.*the inner.*part 0=\(<builtins.KeyError>.*part 2=\(<.*FileNotFound",
        log=r"(?s)in a_key_error\n.*in no_arguments\n.*in attributes\n",
    ),
    _failing(
        "a group with notes",
        a_group_with_notes,
        "ExceptionGroup",
        log=r"(?s)of the group\n.*of the member\n",
    ),
    _failing(
        "a group with a member that cannot be pickled",
        a_group_with_a_member_that_is_not_pickled,
        WRAPPER,
        log="raised unexpected: UnpickleableExceptionWrapper",
        differs=Differs(
            reason=KEEPS_CLASS.reason,
            isolated={
                "state": "FAILURE",
                "error": "ExceptionGroup",
                "trace": r"(?s)in with_a_connection\n.*in attributes\n",
            },
        ),
    ),
    _failing(
        "a group is the cause",
        a_group_as_a_cause,
        "LookupError",
        log=r"(?s)in attributes\n.*direct cause",
    ),
    _failing(
        "a group of a class of its own", a_group_of_own_class, "OwnGroup", log="in attributes\n"
    ),
    _failing(
        "what is left of a group",
        what_is_left_of_a_group,
        "ExceptionGroup",
        log=r"in a_key_error\n",
        unseen="never raised\\n",
    ),
]

HARD = [
    _failing(
        "a class whose __init__ takes other arguments",
        other_arguments,
        WRAPPER,
        message="5: a reason",
    ),
    _failing("a class whose __init__ takes keywords only", keywords_only, WRAPPER),
    _failing(
        "an exception holds a connection",
        with_a_connection,
        "LookupError",
        message="of a connection",
        differs=KEEPS_CLASS,
    ),
    _failing(
        "an exception has a connection among its arguments",
        a_connection_among_the_arguments,
        WRAPPER,
        message="LookupError.*of a connection",
        differs=Differs(
            reason="Celery puts a wrapper in the exception's place; what has crossed processes has "
            "kept its class, with the repr of what does not pickle.",
            isolated={
                "state": "FAILURE",
                "error": "LookupError",
                "message": "of a connection",
                "trace": "in a_connection_among_the_arguments\n",
            },
        ),
    ),
    _failing("an exception that does not load", not_loaded, WRAPPER, message="an argument"),
    _failing("an exception that is not dumped", not_dumped, WRAPPER, message="an argument"),
    _failing("an exception that loads as another", loaded_as_another, "LoadedAsAnother"),
    _failing("an exception whose __str__ fails", bad_str, "BadStr", message="an argument"),
    _failing("an exception whose __repr__ fails", bad_repr, "BadRepr", message="an argument"),
    _failing("an exception of a class in a function", of_a_local_class, "LookupError"),
    _failing("an exception of a class that is made", of_a_made_class, "ValueError"),
    _failing("an exception of a dataclass", of_a_dataclass, "OfDataclass", seen="5"),
    _failing("an exception of a frozen dataclass", of_a_frozen_dataclass, WRAPPER),
    _failing("a namedtuple among the arguments", with_a_namedtuple, "ValueError", seen="Place"),
    _failing("an exception with slots", with_slots, "WithSlots", message="an argument"),
    _failing("an exception that is false", empty, "Empty", message="an argument"),
    _failing("an exception that equals all", equal_to_all, "EqualToAll", message="an argument"),
    _failing(
        "a cause holds a connection",
        a_cause_with_a_connection,
        "ValueError",
        log="in with_a_connection\n",
        # It does not come over.
        scrub=((", 'connection': '<a connection>'", ""),),
    ),
    _failing(
        "a class whose __init__ takes other arguments, and a cause",
        other_arguments_with_a_cause,
        WRAPPER,
        message="5: a reason",
    ),
    _failing("huge arguments", huge_arguments, "ValueError", message="x{20000}"),
]

PLACES = [
    _failing("KeyError", a_key_error, "KeyError", message="a key"),
    _failing("StopIteration", stop_iteration, "StopIteration"),
    _failing("StopIteration with a value", stop_iteration_with_value, "StopIteration"),
    _failing("AssertionError", an_assertion, "AssertionError", message="an assertion"),
    _failing(
        "an error with a file's name",
        a_missing_file,
        "FileNotFoundError",
        seen="str=.*'/does/not/exist'",
    ),
    _failing(
        "an error with the names of two files",
        two_missing_files,
        "FileNotFoundError",
        seen="str=.*'/does/not/exist' -> '/neither/does/this'",
    ),
    _failing(
        "SyntaxError", a_syntax_error, "SyntaxError", log=f'File "{MADE}", line 2\n.*\n *\\^\n'
    ),
    _failing("UnicodeDecodeError", a_decode_error, "UnicodeDecodeError", seen=r"0xff in position"),
    _failing("UnicodeEncodeError", an_encode_error, "UnicodeEncodeError", seen=r"position 2"),
    _failing("a message that is not UTF-8", a_surrogate, "ValueError"),
    _failing("a message that is not ASCII", not_ascii, "ValueError", message="Grüße, 世界"),
    _failing("ImportError", an_import_error, "ModuleNotFoundError", seen="a_module_that"),
    _failing("AttributeError", an_attribute_error, "AttributeError", seen="atribute"),
    _failing(
        "NameError",
        a_name_error,
        "NameError",
        seen="atributes",
        # Python's guess needs the variables of the frames, and they stay behind.
        scrub=((r"\. Did you mean: '\w+'\?", ""),),
    ),
    _failing(
        "a deep recursion",
        deep_recursion,
        "RecursionError",
        log=r"Previous line repeated <number> more times",
        # How deep the worker's own frames are.
        scrub=((r"repeated \d+ more times", "repeated <number> more times"),),
    ),
    _failing("in a generator", in_a_generator, "ValueError", log="in _numbers\n"),
    _failing("a generator that stops", a_generator_that_stops, "RuntimeError", log="in _stops\n"),
    _failing("in a C function", in_a_c_function, "error", message="requires a buffer"),
    _failing(
        "in a callback of a C function",
        in_a_callback_of_a_c_function,
        "ValueError",
        log="in <lambda>\n",
    ),
    _failing("in a thread pool", in_a_thread_pool, "ValueError", log="in attributes\n"),
    _failing("in made code", in_made_code, "ZeroDivisionError", log=f"{MADE}.*in made\n"),
    _failing(
        "in made code that has a source",
        in_made_code_with_source,
        "ZeroDivisionError",
        log=f"{MADE_WITH_SOURCE}.*in made\n    return number / 0\n",
    ),
    _failing("in a lambda", in_a_lambda, "ZeroDivisionError", log="in <lambda>\n"),
    _failing("in a decorator", in_a_decorator, "ValueError", log=r"in wrapper\n    return func"),
    _failing("in a property", in_a_property, "ValueError", log="in value\n"),
    _failing("in __exit__", in_exit, "LookupError", log="(?s)in attributes.*in __exit__\n"),
    _failing("in __repr__", in_repr, "ValueError", log="in __repr__\n"),
    _failing(
        "in a context manager",
        in_a_context_manager,
        "LookupError",
        log="(?s)in attributes.*direct cause.*in _managed\n",
    ),
    _failing("in several lines", in_several_lines, "ValueError", log="raise ValueError\\("),
    _failing("in the middle of a line", in_the_middle_of_a_line, "ZeroDivisionError"),
    _failing("another traceback", with_another_traceback, "LookupError", log="in attributes\n"),
    _failing("an error of json", json_error, "JSONDecodeError", message="Expecting value"),
    _failing("an error of re", regular_expression_error, re.error.__name__, message="unterminated"),
    _failing(
        "an exception that is expected",
        a_key_error,
        "KeyError",
        of=fail_as_expected,
        log=r"INFO/\w+: Task .* raised expected: KeyError",
        unseen="raised unexpected",
    ),
    _failing(
        "an exception that is expected, and holds a connection",
        with_a_connection,
        "LookupError",
        of=fail_as_expected,
        log=r"INFO/\w+: Task .* raised expected",
        differs=KEEPS_CLASS,
    ),
    _failing(
        "an exception that is not the expected one",
        attributes,
        "ValueError",
        of=fail_as_expected,
        log=r"ERROR/\w+: Task .* raised unexpected",
    ),
    _failing(
        "an error is stored where results are ignored", attributes, "ValueError", of=fail_and_store
    ),
]

#: In prefork such a Reject or Ignore does not reach the main process, and the call has failed.
ONE_PROCESS = ("threads", "gevent", "eventlet", "solo")

CELERYS = [
    Row(
        "Ignore with a reason",
        lambda app: fail.on(app).delay("ignore"),
        expects={"state": "STARTED", "runs": 1, "log": "ignored"},
    ),
    Row(
        "Ignore while handling",
        lambda app: fail.on(app).delay("ignore_while_handling"),
        expects={"state": "STARTED", "runs": 1, "log": "ignored"},
    ),
    Row(
        "Reject with a reason",
        lambda app: fail.on(app).delay("reject"),
        expects={"runs": 1, "log": "Reject", "left": 0},
    ),
    Row(
        "Reject with an exception",
        lambda app: fail.on(app).delay("reject_with_an_exception"),
        expects={"runs": 1, "log": "with attributes", "left": 0},
    ),
    Row(
        "Reject with a reason that cannot be pickled",
        lambda app: fail.on(app).delay("reject_with_a_connection"),
        expects={"runs": 1, "log": "reject requeue=False", "left": 0},
        pools=ONE_PROCESS,
    ),
    Row(
        "Ignore with a reason that cannot be pickled",
        lambda app: fail.on(app).delay("ignore_with_a_connection"),
        expects={"runs": 1, "log": "ignored"},
        pools=ONE_PROCESS,
    ),
    _failing("SoftTimeLimitExceeded by a body", soft_time_limit, "SoftTimeLimitExceeded"),
    _failing("TimeLimitExceeded by a body", time_limit, "TimeLimitExceeded"),
    _failing(
        # Reported by the slot, and again, without a traceback, by the main process.
        "WorkerLostError by a body",
        worker_lost,
        "WorkerLostError",
        has_trace=False,
        check=lambda seen: count_names(seen)["task_failure"] == 2,
    ),
    Row(
        "Terminated by a body",
        lambda app: fail.on(app).delay("terminated"),
        expects={"runs": 1, "state": "REVOKED"},
    ),
    Row(
        "WorkerLostError by a body that is acknowledged late",
        lambda app: fail_once.on(app).delay("worker_lost"),
        expects={"state": "SUCCESS", "runs": 2},
    ),
]

ENDS_PLAIN = [
    _ends_plain(
        "MemoryError",
        memory_error,
        1,
        error="OutOfMemoryError",
        message="of the body",
        log="in memory_error\n",
    ),
    _ends_plain("SystemExit", system_exit, 25, error="RemoteError", message="builtins.SystemExit"),
    _ends_plain(
        "KeyboardInterrupt",
        keyboard_interrupt,
        25,
        error="RemoteError",
        message="builtins.KeyboardInterrupt",
    ),
    _ends_plain(
        "GeneratorExit", generator_exit, 25, error="RemoteError", message="builtins.GeneratorExit"
    ),
    _ends_plain(
        "a BaseException of one's own",
        own_base_exception,
        25,
        error="RemoteError",
        message="OwnBaseException.*of the body",
    ),
]

RESULTS = [
    _giving("a result that is no JSON", no_json, **NO_JSON),
    _giving("a result that is no JSON inside", no_json_inside, **NO_JSON),
    _giving("a result that cannot be pickled", no_pickle, differs=NO_PICKLE, **NO_JSON),
    _giving("a generator as a result", a_generator, differs=NO_PICKLE, **NO_JSON),
    _giving("a function as a result", a_function, **NO_JSON),
    _giving("an exception as a result", an_exception, **NO_JSON),
    _giving("a set as a result", a_set, **NO_JSON),
    _giving("a dataclass as a result", a_dataclass, **NO_JSON),
    _giving("an enum as a result", an_enum),
    _giving("a result that holds itself", a_circle, state="FAILURE"),
    _giving("a result with __json__", by_json, state="SUCCESS", result={"by": "__json__"}),
    _giving(
        "a result with __json__ that cannot be pickled",
        by_json_with_a_connection,
        state="SUCCESS",
        result={"by": "__json__"},
        differs=STAND_IN,
    ),
    _giving(
        "a result with __json__ that does not load",
        by_json_not_loaded,
        state="SUCCESS",
        result={"by": "__json__"},
        differs=STAND_IN,
    ),
    _giving("results of other types", other_values, state="SUCCESS"),
    _giving("a long string as a result", a_long_string, state="SUCCESS", result="long " * 5_000),
    _giving("a result that is not UTF-8", a_surrogate_in_a_string, state="SUCCESS"),
    _giving(
        "an ignored result that cannot be pickled",
        no_pickle,
        of=give_and_ignore,
        trap=25,
        state=None,
        log="succeeded in",
    ),
    _giving(
        "an ignored result that does not load",
        an_exception_that_does_not_load,
        of=give_and_ignore,
        state=None,
        log="succeeded in",
    ),
    _giving(
        "an ignored generator", a_generator, of=give_and_ignore, state=None, log="succeeded in"
    ),
]

ROWS = [*CARRIED, *(GROUPS if HAS_GROUPS else []), *HARD, *PLACES, *CELERYS, *ENDS_PLAIN, *RESULTS]
