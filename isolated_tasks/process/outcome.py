"""How a call ended: its value or its failure, and how an exception crosses processes.

An exception does not travel well by itself. Pickling drops its traceback, its cause and its
context; a class whose ``__init__`` takes other arguments than ``args`` pickles and then fails to
unpickle; one that holds a lock does not even pickle. So a `Failure` carries what can be carried:

1. the exception's own pickle, where that was seen to load again, here in the child;
2. else its class, ``args`` and those attributes that pickle, put together without ``__init__``;
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
import linecache
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from isolated_tasks.errors import RemoteError
from isolated_tasks.process import pickling

__all__ = ["Failure", "Frame", "Outcome"]

#: Exceptions in one chain of causes and contexts that are carried over.
MAX_CHAIN = 50
#: Files that are in this process's linecache alone, and kept there: a generated one may have a new
#: name in each call.
MAX_REMEMBERED = 100
_remembered: collections.deque[str] = collections.deque()

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
class Failure:
    """An exception, on its way."""

    type_name: str
    text: str
    #: Way 1 of the module's docstring.
    pickled: bytes | None
    #: Way 2: the class, the args and the attributes, each pickled.
    taken_apart: tuple[bytes, bytes, dict[str, bytes]] | None
    frames: tuple[Frame, ...]
    cause: Failure | None = None
    context: Failure | None = None
    suppress_context: bool = False
    #: Of an exception group, in its order.
    members: tuple[Failure, ...] = ()

    @classmethod
    def of(cls, exc: BaseException, *, skip: types.FrameType | None = None) -> Failure:
        """Describe an exception.

        Args:
            exc: What the body raised.
            skip: The frame of ours that called the body: the traceback begins below it.
        """
        return _describe(exc, skip, seen=set())

    def exception(self) -> BaseException:
        """The exception again, with its traceback and its chain."""
        return self._dress(self._bare())

    def _dress(self, exc: BaseException) -> BaseException:
        exc.__traceback__ = _traceback(self.frames)
        if self.cause is not None:
            exc.__cause__ = self.cause.exception()
        if self.context is not None:
            exc.__context__ = self.context.exception()
        exc.__suppress_context__ = self.suppress_context
        for member, failure in zip(getattr(exc, "exceptions", ()), self.members, strict=False):
            failure._dress(member)
        return exc

    def _bare(self) -> BaseException:
        if self.pickled is not None:
            with contextlib.suppress(Exception):
                loaded = pickling.loads(pickling.Pickled(self.pickled))
                if isinstance(loaded, BaseException):
                    return loaded
        if self.taken_apart is not None:
            with contextlib.suppress(Exception):
                members = [member._bare() for member in self.members]
                return _put_together(*self.taken_apart, members)
        return RemoteError(
            f"{self.type_name}: {self.text}", {"type_name": self.type_name, "text": self.text}
        )


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


def _describe(exc: BaseException, skip: types.FrameType | None, seen: set[int]) -> Failure:
    seen.add(id(exc))

    def follow(other: BaseException | None) -> Failure | None:
        if other is None or id(other) in seen or len(seen) > MAX_CHAIN:
            return None
        return _describe(other, skip, seen)

    pickled = _pickled(exc)
    members = getattr(exc, "exceptions", ()) if _is_group(exc) else ()
    return Failure(
        type_name=f"{type(exc).__module__}.{type(exc).__qualname__}",
        text=_text(exc),
        pickled=pickled,
        taken_apart=_taken_apart(exc) if pickled is None else None,
        frames=_frames(exc.__traceback__, skip),
        cause=follow(exc.__cause__),
        context=follow(exc.__context__),
        suppress_context=exc.__suppress_context__,
        members=tuple(_describe(member, skip, seen) for member in members),
    )


def _is_group(exc: BaseException) -> bool:
    # Python 3.10 has none.
    group: type | None = getattr(builtins, "BaseExceptionGroup", None)
    return group is not None and isinstance(exc, group)


def _text(exc: BaseException) -> str:
    try:
        return str(exc)
    except BaseException as error:
        return f"<its __str__ raised {type(error).__name__}>"


def _pickled(exc: BaseException) -> bytes | None:
    """The exception's own pickle if it loads again as what it was."""
    try:
        pickled = bytes(pickling.dumps(exc).body)
        loaded = pickling.loads(pickling.Pickled(pickled))
        if type(loaded) is type(exc) and len(loaded.args) == len(exc.args):
            return pickled
    except Exception:
        # Whatever a class's __reduce__ or __init__ raises: the other ways are for that.
        return None
    return None


def _taken_apart(exc: BaseException) -> tuple[bytes, bytes, dict[str, bytes]] | None:
    # The members of a group come as failures of their own.
    values = exc.args[:1] if _is_group(exc) else exc.args
    try:
        cls = bytes(pickling.dumps(type(exc)).body)
        args = bytes(pickling.dumps(values).body)
    except Exception:
        return None
    attributes = {}
    for name, value in exc.__dict__.items():
        with contextlib.suppress(Exception):
            attributes[name] = bytes(pickling.dumps(value).body)
    return cls, args, attributes


def _put_together(
    cls: bytes, args: bytes, attributes: dict[str, bytes], members: list[BaseException]
) -> BaseException:
    def load(pickled: bytes) -> Any:
        return pickling.loads(pickling.Pickled(pickled))

    exc_class = load(cls)
    values = (*load(args), members) if members else load(args)
    # Not exc_class(*values): that is what cannot be done with such a class.
    exc: BaseException = exc_class.__new__(exc_class, *values)
    exc.args = values
    for name, value in attributes.items():
        exc.__dict__[name] = load(value)
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
