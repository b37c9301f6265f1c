"""How a call ended: its value or its failure, and how an exception crosses processes.

An exception does not travel well by itself. Pickling drops its traceback, its cause and its
context; a class whose ``__init__`` takes other arguments than ``args`` pickles and then fails to
unpickle; one that holds a lock does not even pickle. So a `Failure` carries what can be carried:

1. the exception's own pickle, where that was seen to load again, here in the child;
2. else its class, ``args`` and attributes, put together without ``__init__``; what does not pickle
   among them becomes a stand-in that shows its repr;
3. else a `RemoteError` with the name and the text.

The frames come back as a real traceback: for each, a one-statement code object with the name, the
file and the position of the original is compiled and run, so that ``traceback``, logging, Sentry
and debuggers show the lines of the body, with their source.
"""

from __future__ import annotations

import ast
import builtins
import collections
import contextlib
import json
import linecache
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from isolated_tasks.errors import RemoteError
from isolated_tasks.process import pickling

__all__ = ["MAX_CHAIN", "MAX_FRAMES", "Failure", "Frame", "Outcome", "Part"]

#: Exceptions in one chain of causes and contexts that are carried over.
MAX_CHAIN = 50
#: Files that are in this process's linecache alone, and kept there: a generated one may have a new
#: name in each call.
MAX_REMEMBERED = 100
_remembered: collections.deque[str] = collections.deque()

#: The arguments of an exception are carried as plain data up to so many characters of JSON.
MAX_PLAIN_ARGS = 64 * 1024

#: Frames of one traceback that are carried over; of a deep recursion, the two ends.
MAX_FRAMES = 200


@dataclass(frozen=True)
class Frame:
    """One line of a traceback."""

    filename: str
    function: str
    module: str
    lineno: int
    #: End line, first and last column, where the interpreter knows them (PEP 657, Python 3.11).
    position: tuple[int, int, int] | None
    #: The line itself where only this process has it: a notebook's cell, a generated function.
    source: str | None = None


@dataclass(frozen=True)
class Part:
    """One exception of a chain; the others by their position in `Failure.parts`."""

    type_name: str
    text: str
    #: Way 1 of the module's docstring.
    pickled: bytes | None
    #: Way 2: the class, the args and the attributes, each pickled.
    taken_apart: tuple[bytes, bytes, dict[str, bytes]] | None
    #: Attributes that way 1 loses in silence, those in ``__slots__`` among them, each pickled.
    lost: dict[str, bytes]
    frames: tuple[Frame, ...]
    suppress_context: bool
    cause: int | None = None
    context: int | None = None
    #: Of an exception group, in its order.
    members: tuple[int, ...] = ()
    #: Exceptions that it holds: attributes by their names, arguments by their numbers.
    held: dict[str | int, int] = field(default_factory=dict)
    #: Its arguments, where they are plain data, and the exception that was made of them: `plain`.
    plain_args: list[Any] | None = None
    made: BaseException | None = None


@dataclass(frozen=True)
class Failure:
    """An exception, on its way, with all that hang on it."""

    #: The exception itself is the first. One may be the cause of several, and a chain may be a
    #: circle.
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, exc: BaseException, *, skip: types.FrameType | None = None) -> Failure:
        """Describe an exception.

        Args:
            exc: What the body raised.
            skip: The frame of ours that called the body: the traceback begins below it.
        """
        return cls(tuple(_Describer(skip).describe(exc)))

    def exception(self) -> BaseException:
        """The exception again, with its traceback and its chain."""
        bare: dict[int, BaseException] = {}
        copies: list[tuple[int, BaseException]] = []
        for position in range(len(self.parts)):
            self._build(position, bare, copies)
        for position, exc in [*bare.items(), *copies]:
            part = self.parts[position]
            # Not exc.__cause__ = …: a frozen dataclass refuses that.
            _set(exc, "__traceback__", _traceback(part.frames))
            if part.cause is not None:
                _set(exc, "__cause__", bare[part.cause])
            if part.context is not None:
                _set(exc, "__context__", bare[part.context])
            _set(exc, "__suppress_context__", part.suppress_context)
            if _type_name(exc) == part.type_name:
                _hand_over(exc, {name: bare[held] for name, held in part.held.items()})
        return bare[0]

    def _build(
        self,
        position: int,
        bare: dict[int, BaseException],
        copies: list[tuple[int, BaseException]],
    ) -> BaseException:
        if position in bare:
            return bare[position]
        part = self.parts[position]
        exc = part.made or _loaded(part)
        if exc is None and part.taken_apart is not None:
            members = [self._build(member, bare, copies) for member in part.members]
            with contextlib.suppress(Exception):
                exc = _put_together(*part.taken_apart, members)
        if exc is None:
            exc = RemoteError(
                f"{part.type_name}: {part.text}", {"type_name": part.type_name, "text": part.text}
            )
        else:
            # What goes by value comes with a shorter name.
            _restore_name(type(exc), part.type_name)
        for name, pickled in part.lost.items():
            with contextlib.suppress(Exception):
                object.__setattr__(exc, name, pickling.from_bytes(pickled))
        self._adopt(position, exc, bare, copies)
        return exc

    def _adopt(
        self,
        position: int,
        exc: BaseException,
        bare: dict[int, BaseException],
        copies: list[tuple[int, BaseException]],
    ) -> None:
        """Take the members of a group for what it has brought along, pickled as a whole.

        A member of two groups comes twice.
        """
        if bare.setdefault(position, exc) is not exc:
            copies.append((position, exc))
        members = self.parts[position].members
        for member, loaded in zip(members, getattr(exc, "exceptions", ()), strict=False):
            self._adopt(member, loaded, bare, copies)


_set = BaseException.__setattr__


@dataclass(frozen=True)
class Outcome:
    """A value, or a failure, and what the callable's own layer sends along."""

    value: Any = None
    failure: Failure | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    #: Stays in the child: what to send where the value cannot be pickled.
    stand_in: Callable[[], Any] | None = None

    def result(self) -> Any:
        """The value.

        Raises:
            BaseException: The failure's.
        """
        if self.failure is not None:
            raise self.failure.exception()
        return self.value


class _Describer:
    """Follows causes, contexts and members, and describes each exception once."""

    def __init__(self, skip: types.FrameType | None) -> None:
        self._skip = skip
        self._parts: list[Part | None] = []
        self._positions: dict[int, int] = {}

    def describe(self, exc: BaseException) -> list[Part]:
        self._visit(exc)
        return [part for part in self._parts if part is not None]

    def _visit(self, exc: BaseException | None) -> int | None:
        if exc is None:
            return None
        if id(exc) in self._positions:
            return self._positions[id(exc)]
        if len(self._parts) >= MAX_CHAIN:
            return None
        position = self._positions[id(exc)] = len(self._parts)
        self._parts.append(None)
        # A group before its members: what it brings along is what they are then.
        pickled, lost = _pickled(exc)
        members = getattr(exc, "exceptions", ()) if _is_group(exc) else ()
        positions = [self._visit(member) for member in members]
        self._parts[position] = Part(
            type_name=_type_name(exc),
            text=_text(exc),
            pickled=pickled,
            taken_apart=_taken_apart(exc) if pickled is None else None,
            lost=_lost(exc, lost),
            frames=_frames(exc.__traceback__, self._skip),
            suppress_context=exc.__suppress_context__,
            members=tuple(one for one in positions if one is not None),
            held=self._visit_held(exc),
            cause=self._visit(exc.__cause__),
            context=self._visit(exc.__context__),
            plain_args=_plain_args(exc),
        )
        return position

    def _visit_held(self, exc: BaseException) -> dict[str | int, int]:
        held: dict[str | int, int] = {}
        values: dict[str | int, object] = dict(enumerate(exc.args))
        values.update(vars(exc))
        for name, value in values.items():
            if isinstance(value, BaseException):
                position = self._visit(value)
                if position is not None:
                    held[name] = position
        return held


def _plain_args(exc: BaseException) -> list[Any] | None:
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        text = json.dumps(exc.args)
        if len(text) <= MAX_PLAIN_ARGS:
            args: list[Any] = json.loads(text)
            return args
    return None


def _is_group(exc: BaseException) -> bool:
    # Python 3.10 has none.
    group: type | None = getattr(builtins, "BaseExceptionGroup", None)
    return group is not None and isinstance(exc, group)


def _type_name(exc: BaseException) -> str:
    return f"{type(exc).__module__}.{type(exc).__qualname__}"


def _text(exc: BaseException) -> str:
    try:
        return str(exc)
    except BaseException as error:
        return f"<its __str__ raised {type(error).__name__}>"


def _pickled(exc: BaseException) -> tuple[bytes | None, set[str]]:
    """The exception's own pickle if it loads again as what it was, and what it is then without."""
    try:
        pickled = pickling.to_bytes(exc)
        loaded = pickling.from_bytes(pickled)
        if type(loaded) is not type(exc):
            return None, set()
        # Where the class itself says how it is rebuilt, it may leave something else behind.
        is_own_way = type(exc).__reduce__ is not BaseException.__reduce__
        if len(loaded.args) == len(exc.args):
            return pickled, _changed_texts(exc, loaded) if is_own_way else set()
        if is_own_way and str(loaded) == str(exc):
            return pickled, {"args"}
    except Exception:
        # Whatever a class's __reduce__ or __init__ raises: the other ways are for that.
        return None, set()
    return None, set()


def _changed_texts(exc: BaseException, loaded: BaseException) -> set[str]:
    return {
        name
        for name, value in vars(exc).items()
        if isinstance(value, str) and vars(loaded).get(name) != value
    }


def _lost(exc: BaseException, names: set[str]) -> dict[str, bytes]:
    slots = {
        name
        for cls in type(exc).__mro__
        for name in _names(vars(cls).get("__slots__", ()))
        if not name.startswith("__")
    }
    pickled = {}
    for name in names | slots:
        with contextlib.suppress(Exception):
            pickled[name] = pickling.to_bytes(getattr(exc, name))
    return pickled


def _names(slots: object) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else tuple(slots)  # type: ignore[arg-type]


def _taken_apart(exc: BaseException) -> tuple[bytes, bytes, dict[str, bytes]] | None:
    # The members of a group come as failures of their own.
    values = exc.args[:1] if _is_group(exc) else exc.args
    try:
        cls = pickling.to_bytes(type(exc))
        args = pickling.to_bytes(tuple(map(_or_a_stand_in, values)))
    except Exception:
        return None
    attributes = {
        name: pickling.to_bytes(_or_a_stand_in(value)) for name, value in exc.__dict__.items()
    }
    return cls, args, attributes


def _or_a_stand_in(value: object) -> object:
    """A value, or what shows its repr where it cannot change process: the class is kept."""
    return value if pickling.error_of(value) is None else pickling.StandIn(repr(value))


def _loaded(part: Part) -> BaseException | None:
    if part.pickled is not None:
        with contextlib.suppress(Exception):
            loaded = pickling.from_bytes(part.pickled)
            if isinstance(loaded, BaseException):
                return loaded
    return None


def _hand_over(exc: BaseException, held: dict[str | int, BaseException]) -> None:
    if not held:
        return
    _set(exc, "args", tuple(held.get(number, value) for number, value in enumerate(exc.args)))
    for name, value in held.items():
        if isinstance(name, str):
            exc.__dict__[name] = value


def _restore_name(cls: type, type_name: str) -> None:
    """Give a class of a function its full name again, which cloudpickle shortens."""
    name = type_name.removeprefix(f"{cls.__module__}.")
    if "<locals>" in name and "<locals>" not in cls.__qualname__:
        cls.__qualname__ = name


def _put_together(
    cls: bytes, args: bytes, attributes: dict[str, bytes], members: list[BaseException]
) -> BaseException:
    exc_class, values = pickling.from_bytes(cls), pickling.from_bytes(args)
    if members:
        values = (*values, members)
    # Not exc_class(*values): that is what cannot be done with such a class.
    exc: BaseException = exc_class.__new__(exc_class, *values)
    _set(exc, "args", values)
    for name, value in attributes.items():
        exc.__dict__[name] = pickling.from_bytes(value)
    return exc


def _frames(
    traceback: types.TracebackType | None, skip: types.FrameType | None
) -> tuple[Frame, ...]:
    entries: list[types.TracebackType] = []
    while traceback is not None:
        if traceback.tb_frame is skip:
            entries.clear()
        else:
            entries.append(traceback)
        traceback = traceback.tb_next
    if len(entries) > MAX_FRAMES:
        entries = entries[: MAX_FRAMES // 2] + entries[-MAX_FRAMES // 2 :]
    return tuple(_frame(entry) for entry in entries)


def _frame(entry: types.TracebackType) -> Frame:
    code = entry.tb_frame.f_code
    filename = code.co_filename
    # A file in <brackets> is in no other process's linecache.
    # None where a code generator has left no positions.
    lineno = entry.tb_lineno or code.co_firstlineno
    source = linecache.getline(filename, lineno) if filename.startswith("<") else ""
    return Frame(
        filename=filename,
        function=code.co_name,
        module=entry.tb_frame.f_globals.get("__name__", "?"),
        lineno=lineno,
        position=_position(code, entry.tb_lasti),
        source=source or None,
    )


def _position(code: types.CodeType, instruction: int) -> tuple[int, int, int] | None:
    if instruction < 0 or not hasattr(code, "co_positions"):
        return None
    for index, (_, end_lineno, column, end_column) in enumerate(code.co_positions()):
        if index == instruction // 2:
            if end_lineno is None or column is None or end_column is None:
                return None
            return end_lineno, column, end_column
    return None


class _Marker(Exception):
    """What the compiled statements raise."""


def _traceback(frames: tuple[Frame, ...]) -> types.TracebackType | None:
    traceback = None
    for frame in reversed(frames):
        entry = _raised(frame)
        traceback = types.TracebackType(traceback, entry.tb_frame, entry.tb_lasti, frame.lineno)
    return traceback


def _raised(frame: Frame) -> types.TracebackType:
    """The traceback of one statement that stands where the frame's line stands."""
    end_lineno, column, end_column = frame.position or (frame.lineno, 0, 0)
    where = {
        "lineno": frame.lineno,
        "end_lineno": max(end_lineno, frame.lineno),
        "col_offset": column,
        "end_col_offset": end_column,
    }
    name = ast.Name(id="__marker__", ctx=ast.Load(), **where)
    tree = ast.Module(body=[ast.Raise(exc=name, cause=None, **where)], type_ignores=[])
    code = compile(tree, frame.filename, "exec").replace(co_name=frame.function)
    if hasattr(code, "co_qualname"):
        code = code.replace(co_qualname=frame.function)
    if frame.source is not None:
        _remember_source(frame)
    try:
        exec(code, {"__name__": frame.module, "__marker__": _Marker})
    except _Marker as marker:
        entry = marker.__traceback__
        assert entry is not None
        assert entry.tb_next is not None
        return entry.tb_next
    raise AssertionError("a raise statement raised nothing")


def _remember_source(frame: Frame) -> None:
    """Let linecache show a line that is in no file of this process."""
    known = linecache.cache.get(frame.filename)
    lines = list(known[2]) if known is not None and len(known) == 4 else []
    lines.extend("\n" for _ in range(frame.lineno - len(lines)))
    lines[frame.lineno - 1] = frame.source or "\n"
    text_size = sum(len(line) for line in lines)
    if frame.filename not in linecache.cache:
        _remembered.append(frame.filename)
        if len(_remembered) > MAX_REMEMBERED:
            linecache.cache.pop(_remembered.popleft(), None)
    # A modification time of None tells linecache.checkcache to leave the entry alone.
    linecache.cache[frame.filename] = (text_size, None, lines, frame.filename)
