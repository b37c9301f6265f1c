"""What the calls of a task leave behind in a process, measured in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celery.app.task import Task
from celery.local import Proxy

from isolated_tasks import body, byvalue, requester, settings
from isolated_tasks.advice import Call, ProcessFigures, resident_growth_bytes, size
from isolated_tasks.errors import IsolationError, OptionError, RemoteError, UnpicklableError
from isolated_tasks.process import pickling, system
from isolated_tasks.task import IsolatedMixin
from isolated_tasks.testing import databases

__all__ = ["MIN_CALLS", "Growth", "assert_no_growth", "judge", "measure_growth"]

#: Fewer say nothing of what each call adds.
MIN_CALLS = 10
#: What the first half of the calls adds, as a share of all, if it is likely that a cache fills up.
FILLING_UP = 0.75


@dataclass(frozen=True)
class Growth:
    """What the calls of a task have left behind in a process."""

    #: The name of the task.
    task: str
    #: How many calls were measured.
    calls: int
    #: How many calls came before them.
    warm_up: int
    #: Which process, in words: ``"the process that runs the body"``, ``"the worker"``, ``"a process
    #: that serves them as one batch"``.
    process: str
    #: What it holds more after the calls than before them, after ``gc.collect()`` each time: memory
    #: in use, and what is resident beyond that, if that grows with the calls. In bytes.
    kept_bytes: int
    #: The same of the first half of the calls, where it is known.
    first_half_bytes: int | None
    #: How much its RSS has grown, in bytes: what is idle included.
    rss_bytes: int

    @property
    def kept_per_call_bytes(self) -> float:
        """`kept_bytes` for each of the calls."""
        return self.kept_bytes / self.calls

    def __str__(self) -> str:
        return (
            f"task {self.task!r}: {self.calls} calls, after {self.warm_up} to warm up, left"
            f" {size(self.kept_bytes)} behind in {self.process},"
            f" {size(self.kept_per_call_bytes)} a call"
        )


def assert_no_growth(
    task: Task,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    calls: int = 30,
    warm_up: int = 5,
    limit: int | str = "5MB",
    in_one_child: bool = False,
    timeout: float = 300.0,
) -> Growth:
    """Fail if the calls of a task leave more memory behind than they may.

    The task is called, one call after the other, in a process of its own, which loads the app as a
    worker does. So nothing that the tests hold counts. What is compared is what that process holds
    after ``warm_up`` calls, which import, connect and fill caches, and after ``calls`` further
    ones: memory in use, as ``celery isolated audit`` has it, after ``gc.collect()`` each time. A
    high peak that is given back is none of this check's business, nor is one that stays idle in the
    process. Memory that no allocator tells of counts where RSS grows with the calls, by the rules
    of the audit: from 4 MiB on.

    Which process that is:

    * of a plain task, the one that runs the body, as a pool process does;
    * of an isolated one, the one that has each body run in a child, as the worker does;
    * of an isolated one with ``in_one_child``, one that runs all bodies, as the child of a batch
      does.

    Args:
        task: Which; plain or isolated.
        args: Its positional arguments, the same for each call. Default: none.
        kwargs: Its keyword arguments. Default: none.
        calls: How many calls are measured, from 10 on. Default: 30.
        warm_up: How many come before them, 0 or more. Default: 5.
        limit: What all ``calls`` together may leave behind: bytes, or a string such as ``"5MB"``.
            Default: ``"5MB"``.
        in_one_child: Run the bodies of an isolated task in one process, and measure that. Makes no
            difference to a plain one. Default: False.
        timeout: All of it may take this long, in seconds. Default: 300.

    Returns:
        What was measured.

    Raises:
        AssertionError: They leave more than the limit behind.
        OptionError: An argument cannot be used.
        UnpicklableError: An argument of the task cannot be pickled.
        RemoteError: A call raised, or the app could not be loaded there.
        IsolationError: The process was lost.
        TimeoutError: It took too long.
    """
    __tracebackhide__ = True
    # Before anything is run.
    allowed = settings.size_bytes(_name_of(task), "limit", limit)
    growth = measure_growth(
        task,
        args=args,
        kwargs=kwargs,
        calls=calls,
        warm_up=warm_up,
        in_one_child=in_one_child,
        timeout=timeout,
    )
    if growth.kept_bytes > allowed:
        raise AssertionError(f"{growth}; limit={limit!r} allows {size(allowed)}. {_advice(growth)}")
    return growth


def measure_growth(
    task: Task,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    calls: int = 30,
    warm_up: int = 5,
    in_one_child: bool = False,
    timeout: float = 300.0,
) -> Growth:
    """Measure what `assert_no_growth` checks, which says what the arguments are and what it raises.

    Returns:
        What was measured.

    Raises:
        OptionError: An argument cannot be used.
        UnpicklableError: An argument of the task cannot be pickled.
        RemoteError: A call raised, or the app could not be loaded there.
        IsolationError: The process was lost.
        TimeoutError: It took too long.
    """
    name = _name_of(task)
    _check_count(name, "calls", calls, MIN_CALLS)
    _check_count(name, "warm_up", warm_up, 0)
    _check_seconds(name, "timeout", timeout)
    # What a decorator leaves in a module may be a proxy; the registry has the task itself.
    task = task.app.tasks.get(name, task)
    isolated = isinstance(task, IsolatedMixin) and settings.is_isolated(task)
    isolates = isolated and not in_one_child
    with databases.carried(task.app):
        said = _run(_description(task, args, kwargs or {}, calls, warm_up, isolates), timeout)
    if "error" in said:
        fields = {"type_name": said["type_name"], "text": said["text"]}
        raise RemoteError(f"task {name!r}: {said['error']}", fields)
    process = "the process that runs the body"
    if isolated:
        process = "the worker" if isolates else "a process that serves them as one batch"
    return judge(name, said["looks"], warm_up=warm_up, process=process)


def judge(
    task: str,
    looks: Sequence[tuple[int, int, int | None, int | None]],
    *,
    warm_up: int,
    process: str,
) -> Growth:
    """What a series of looks at a process comes to.

    Args:
        task: Whose calls were made between them.
        looks: The number of calls so far, RSS, memory in use, and idle memory at the least, in
            bytes; None where it is not known.
        warm_up: How many calls came before the first look.
        process: Which, in words.
    """
    figures = ProcessFigures()
    _, first_rss, first_used, first_idle = looks[0]
    for number, rss, used, idle in looks:
        known = used is not None and first_used is not None
        idle_bytes = None if idle is None or first_idle is None else idle - first_idle
        figures.add(
            Call(
                number=warm_up + number + 1,
                highest_peak_bytes=0,
                kept_bytes=rss - first_rss,
                run_seconds=0.0,
                used_calls=number if known else 0,
                used_bytes=used - first_used if known else None,  # type: ignore[operator]
                idle_bytes=idle_bytes,
                least_idle_bytes=idle_bytes,
                collected_bytes=rss - first_rss,
            )
        )
    calls, last_rss, last_used, _ = looks[-1]
    resident = resident_growth_bytes(figures)
    in_use = first_half = None
    if last_used is not None and first_used is not None:
        in_use = last_used - first_used
        middle = min(looks, key=lambda look: abs(look[0] - calls / 2))[2]
        if middle is not None and in_use >= resident:
            first_half = middle - first_used
    kept = max(in_use or 0, resident)
    return Growth(task, calls, warm_up, process, max(0, kept), first_half, last_rss - first_rss)


def _advice(growth: Growth) -> str:
    if (
        growth.first_half_bytes is not None
        and growth.first_half_bytes >= FILLING_UP * growth.kept_bytes
    ):
        return (
            f"Most of it, {size(growth.first_half_bytes)}, came with the first half of the calls:"
            " if that is a cache that fills up, give it a larger warm_up"
        )
    where = "in the body, or in what it calls"
    if growth.process == "the worker":
        where = "in hooks and signal receivers of the task, since its body runs in a child"
    return (
        f"Look for what is kept {where}; profile='tracemalloc' shows the lines that hold it."
        " Or give it back with the process: base=IsolatedTask, with a batch_size that it can bear"
    )


# ── the process ─────────────────────────────────────────────────────────────────────────────────


def _description(
    task: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    calls: int,
    warm_up: int,
    isolates: bool,
) -> bytes:
    """Two pickles, one after the other: what is needed to load the second, and the rest."""
    name = task.name
    _, app = body.describe_app(task.app, "")
    definitions: list[bytes] = []
    refusal: UnpicklableError | None = None
    try:
        definitions = byvalue.definitions([task])
    except UnpicklableError as exc:
        # It does no harm where the task can be imported.
        refusal = exc
    try:
        call = pickling.to_bytes((tuple(args), dict(kwargs)), pickler=byvalue.Pickler)
    except Exception as exc:
        parts = {"args": args, "kwargs": kwargs}
        raise pickling.refusal(
            parts, exc, task=name, what="argument", pickler=byvalue.Pickler
        ) from exc
    return pickle.dumps(
        {
            "sys_path": [os.path.abspath(path) for path in sys.path],
            "argv": list(sys.argv),
            "app": app,
            "task": name,
            "definitions": definitions,
            "refusal": None if refusal is None else str(refusal),
            "call": call,
            "calls": calls,
            "warm_up": warm_up,
            "isolates": isolates,
        }
    )


def _run(description: bytes, timeout: float) -> dict[str, Any]:
    """Have it measured, and return what that process says."""
    # An embedded worker of this process is none of that one's.
    environment = {k: v for k, v in os.environ.items() if k != requester.ADDRESS_VARIABLE}
    with contextlib.ExitStack() as stack:
        answer, writer = os.pipe()
        stack.callback(os.close, answer)
        # The kernel ends it with us; see `system.arm_lifeline`.
        lifeline, held = os.pipe()
        stack.callback(os.close, held)
        try:
            process = subprocess.Popen(
                [
                    *system.interpreter("isolated_tasks.testing.measured"),
                    str(writer),
                    str(lifeline),
                ],
                stdin=subprocess.PIPE,
                env=environment,
                pass_fds=(writer, lifeline),
                start_new_session=True,
            )
        finally:
            os.close(writer)
            os.close(lifeline)
        with process:
            try:
                process.communicate(description, timeout=timeout)
            except subprocess.TimeoutExpired:
                raise TimeoutError(
                    f"the calls were not done in timeout={timeout:g} s; make fewer"
                ) from None
            finally:
                # Whatever a body has left there.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        os.set_blocking(answer, False)
        said = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(answer, 65536):
                said += part
    if not said:
        raise IsolationError(
            f"the process that was to be measured {system.describe_exit(process.returncode)}"
            " before all calls were made"
        )
    answered: dict[str, Any] = json.loads(said)
    return answered


# ── what one may say ────────────────────────────────────────────────────────────────────────────


def _name_of(task: object) -> str:
    if not isinstance(task, Task | Proxy) or not isinstance(getattr(task, "name", None), str):
        raise OptionError(
            f"task={task!r}: must be a task of a Celery app",
            {"task": None, "option": "task", "value": repr(task)},
        )
    return str(task.name)


def _check_count(task: str, option: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _refusal(task, option, value, f"must be a whole number from {least} on")


def _check_seconds(task: str, option: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise _refusal(task, option, value, "must be a number of seconds above 0")


def _refusal(task: str, option: str, value: object, rule: str) -> OptionError:
    return OptionError(
        f"task {task!r}: {option}={value!r}: {rule}",
        {"task": task, "option": option, "value": repr(value)},
    )
