"""Values become bytes and buffers, and what will not is named with its path."""

import pickle
import threading
import tracemalloc
from dataclasses import dataclass, field
from typing import Any, NoReturn

import cloudpickle
import numpy as np
import pytest

from isolated_tasks.errors import UnpicklableError
from isolated_tasks.process import pickling
from isolated_tasks.process.pickling import OUT_OF_BAND_FROM, Pickled, dumps, loads
from isolated_tasks.process.protocol import CALL_LIMITS


def travel(value: object) -> Any:
    """A value at the other end, its buffers received into memory that can be written to."""
    pickled = dumps(value)
    return loads(Pickled(bytes(pickled.whole), [bytearray(part) for part in pickled.buffers]))


# ── values ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "value",
    [None, 7, "ü", b"x", [1, [2]], {"a": (1, {2})}, bytes(10**6), bytearray(10**6)],
    ids=lambda value: type(value).__name__,
)
def test_a_value_comes_back(value: object) -> None:
    assert travel(value) == value


def test_a_function_that_nobody_can_import_comes_back() -> None:
    offset = 3

    assert travel(lambda x: x + offset)(4) == 7


def test_what_is_there_twice_is_there_once_and_the_same() -> None:
    array = np.ones(OUT_OF_BAND_FROM)

    one, two = travel((array, array))

    assert one is two


@pytest.mark.parametrize(
    "array",
    [
        np.arange(10**5, dtype="f8"),
        np.arange(10**6, dtype="i1").reshape(1000, 1000),
        np.asfortranarray(np.arange(10**5).reshape(100, 1000)),
    ],
    ids=["floats", "matrix", "fortran order"],
)
def test_a_large_array_travels_out_of_band(array: np.ndarray[Any, Any]) -> None:
    pickled = dumps({"array": array})

    assert sum(memoryview(part).nbytes for part in pickled.buffers) == array.nbytes
    assert memoryview(pickled.whole).nbytes < 2000
    assert pickled.size == memoryview(pickled.whole).nbytes + array.nbytes
    np.testing.assert_array_equal(travel(array), array)


def test_a_large_array_is_not_copied_on_its_way_out() -> None:
    array = np.zeros(10**6)
    (buffer,) = dumps(array).buffers

    array[0] = 7

    assert memoryview(buffer).cast("B").cast("d")[0] == 7


@pytest.mark.parametrize(
    "data", [bytes(10**6), "x" * 10**6, bytearray(10**6)], ids=lambda data: type(data).__name__
)
def test_large_bytes_and_strings_are_not_copied_on_their_way_out(data: object) -> None:
    dumps(data)  # what is there once, such as the encoded string
    tracemalloc.start()
    try:
        pickled = dumps({"data": data, "more": [1, 2, 3]})
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    # A string is encoded once, and no more.
    assert held < (100_000 if not isinstance(data, str) else 1_100_000)
    assert loads(pickled) == {"data": data, "more": [1, 2, 3]}


def test_a_small_pickle_is_in_one_piece() -> None:
    assert isinstance(dumps([bytes(100)] * 3).body, bytes)


def test_an_array_keeps_the_memory_that_it_was_received_in_and_can_be_written_to() -> None:
    received = bytearray(dumps(np.zeros(10**6)).buffers[0])
    array = loads(Pickled(dumps(np.zeros(10**6)).body, [received]))

    array[0] = 7

    assert memoryview(received).cast("d")[0] == 7


@pytest.mark.parametrize(
    "array",
    [
        np.arange(10**6)[::2],
        np.arange(10**6).reshape(1000, 1000)[:, 10:20],
        np.broadcast_to(np.arange(1000), (1000, 1000)),
    ],
    ids=["stride", "columns", "broadcast"],
)
def test_an_array_that_is_not_contiguous_comes_back(array: np.ndarray[Any, Any]) -> None:
    np.testing.assert_array_equal(travel(array), array)


def test_a_buffer_that_is_not_contiguous_is_pickled_in_band() -> None:
    class Strided:
        def __init__(self, view: memoryview) -> None:
            self.view = view

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return bytes, (pickle.PickleBuffer(self.view),)

    view = memoryview(bytearray(range(256)) * 1024)[::2]

    with pytest.raises(pickle.PicklingError, match="non-contiguous"):
        # Pickle's own word: it is no error of ours, such as a BufferError would be.
        dumps(Strided(view))


def test_small_arrays_travel_in_band() -> None:
    assert dumps([np.zeros(10) for _ in range(100)]).buffers == []


def test_there_are_never_more_buffers_than_a_frame_may_have() -> None:
    arrays = [np.full(OUT_OF_BAND_FROM, number % 100, "i1") for number in range(5000)]

    pickled = dumps(arrays)

    # What the call used comes with an outcome.
    assert len(pickled.buffers) == CALL_LIMITS.buffers - 1
    assert [array[0] for array in travel(arrays)] == [number % 100 for number in range(5000)]


# ── the path to what will not ───────────────────────────────────────────────────────────────────


@dataclass
class Thing:
    inner: Any = None
    others: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class LockedKey:
    """Hashable, and not picklable."""

    lock: Any = field(default_factory=threading.Lock, hash=False, compare=False)

    def __repr__(self) -> str:
        return "LockedKey()"


class Refuses:
    """Has nothing bad in it, and will not be pickled."""

    def __init__(self) -> None:
        self.fine = 1

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("I stay here")


class WithState:
    """Hides its attributes behind a state."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __getstate__(self) -> dict[str, Any]:
        return {"_value": self._value, "more": 1}


LOCK = threading.Lock()


def refusal(parts: dict[str, Any], what: str = "argument") -> UnpicklableError:
    try:
        dumps(parts)
    except Exception as exc:
        return pickling.refusal(parts, exc, task="tasks.render", what=what)
    raise AssertionError("it can be pickled")


@pytest.mark.parametrize(
    ("parts", "path", "type_name"),
    [
        ({"args": (LOCK,)}, "args[0]", "_thread.lock"),
        ({"args": (1, {"conn": LOCK})}, 'args[1]["conn"]', "_thread.lock"),
        ({"args": (), "kwargs": {"conn": LOCK}}, 'kwargs["conn"]', "_thread.lock"),
        ({"args": ({'a"b': LOCK},)}, 'args[0]["a\\"b"]', "_thread.lock"),
        ({"args": ({7: LOCK},)}, "args[0][7]", "_thread.lock"),
        ({"args": ({(1, "x"): LOCK},)}, "args[0][(1, 'x')]", "_thread.lock"),
        ({"args": (Thing(LOCK),)}, "args[0].inner", "_thread.lock"),
        (
            {"args": (Thing([0, Thing({"x": LOCK})]),)},
            'args[0].inner[1].inner["x"]',
            "_thread.lock",
        ),
        ({"args": (Thing(others=[LOCK]),)}, "args[0].others[0]", "_thread.lock"),
        ({"args": (WithState(LOCK),)}, "args[0]._value", "_thread.lock"),
        ({"args": ({LockedKey(): 1},)}, "args[0] key LockedKey().lock", "_thread.lock"),
        ({"args": ({LockedKey()},)}, "args[0]{…}.lock", "_thread.lock"),
        ({"args": (frozenset({LockedKey()}),)}, "args[0]{…}.lock", "_thread.lock"),
        ({"args": (Refuses(),)}, "args[0]", f"{__name__}.Refuses"),
        ({"args": (ValueError("x", LOCK),)}, "args[0].args[1]", "_thread.lock"),
        ({"args": ((i for i in "x"),)}, "args[0]", "generator"),
        ({"args": (1,), "request": {"x": LOCK}}, 'request["x"]', "_thread.lock"),
        ({"args": (1, 2, LOCK, LOCK)}, "args[2]", "_thread.lock"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_innermost_object_is_named_with_its_path(
    parts: dict[str, Any], path: str, type_name: str
) -> None:
    error = refusal(parts)

    assert (error.path, error.type_name) == (path, type_name)
    for part in ("tasks.render", f"argument {path}", type_name, error.reason):
        assert part in str(error)


def test_what_pickle_said_is_the_reason() -> None:
    assert refusal({"args": (Refuses(),)}).reason == "RuntimeError: I stay here"


def test_a_result_is_named_without_saying_it_twice() -> None:
    error = refusal({"result": Thing(LOCK)}, what="result")

    assert error.path == "result.inner"
    assert "result.inner of type _thread.lock cannot be pickled" in str(error)
    assert "result result" not in str(error)


def test_a_function_is_named_by_what_it_is_and_not_taken_apart() -> None:
    error = refusal({"args": (lambda: LOCK,)})

    assert (error.path, error.type_name) == ("args[0]", "function")


def test_a_long_key_is_cut() -> None:
    error = refusal({"args": ({tuple(range(1000)): LOCK},)})

    assert len(error.path) < 60


def test_something_nested_too_deeply_is_refused() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]

    error = refusal({"args": (nested,)})

    assert error.path.startswith("args[0]")
    assert "deep" in error.reason
    while nested:
        # Freeing it at once would recurse as deep.
        nested = nested.pop()


def test_something_that_contains_itself_and_a_lock_is_named() -> None:
    value: list[Any] = []
    value.extend([value, LOCK])

    error = refusal({"args": (value,)})

    assert error.type_name == "_thread.lock"
    assert error.path == "args[0][1]"


def test_parts_that_cannot_be_pickled_together_are_named_together() -> None:
    class OnlyOnce(cloudpickle.Pickler):  # type: ignore[misc,unused-ignore]
        """Refuses what has two parts."""

        def dump(self, obj: Any) -> None:
            if isinstance(obj, dict) and len(obj) > 1:
                raise RuntimeError("too much")
            super().dump(obj)

    error = pickling.refusal(
        {"args": 1, "kwargs": 2},
        RuntimeError("too much"),
        task="x",
        what="argument",
        pickler=OnlyOnce,
    )

    assert error.path == "argument"
    assert error.reason == "RuntimeError: too much"


@pytest.mark.parametrize("text", ["args[0]", 'kwargs["x"]'])
def test_the_error_survives_pickling(text: str) -> None:
    error = UnpicklableError("no", {"path": text, "type_name": "x", "reason": "y"})

    assert pickle.loads(pickle.dumps(error)).path == text
