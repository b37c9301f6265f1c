"""The faults to survive: each has a number, and tests that bear it, ``@pytest.mark.fault(19)``.

`tests/faults` holds those tests that are about a fault and nothing else, in one file for each
heading of this table; others stand where they belong. `tests/faults/test_table.py` says that no
fault is without one, also in a spawned child, and from each kind of slot, where that could make a
difference.
"""

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

__all__ = ["FAULTS", "IN_FULL", "Fault", "Marked", "fault", "in_full", "read"]

#: ``@fault(19)``: the test is about this one.
fault = pytest.mark.fault

#: Whether to take the time and the memory that some faults take, as ``make faults`` does.
IN_FULL = "FULL_FAULTS" in os.environ
in_full = pytest.mark.skipif(not IN_FULL, reason="takes long, or much memory: make faults")

START_METHODS = frozenset({"forkserver", "spawn"})
#: A process, a thread and a greenlet of Celery's.
SLOTS = frozenset({"prefork", "threads", "gevent"})


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        number: what tests name it by.
        what: what goes wrong.
        must: what has to come of it.
        start_methods: those that it has to be tried with.
        slots: Celery's pools that it has to be tried in.
    """

    number: int
    what: str
    must: str
    start_methods: Collection[str] = START_METHODS
    slots: Collection[str] = ()


#: Of what happens before there is a child, or to a process that no child has to do with.
_ANY: Collection[str] = ()

FAULTS: dict[str, Sequence[Fault]] = {
    "Body": [
        Fault(
            1,
            "SIGSEGV, SIGABRT, SIGBUS, SIGFPE in C",
            "named, with faulthandler's frames",
            slots=SLOTS,
        ),
        Fault(
            2,
            "SIGKILL from outside",
            "named; of memory it says 'possibly' and no more",
            slots=SLOTS,
        ),
        Fault(3, "os._exit(0), exit(3) of C, execv", "a lost child, not a result", slots=SLOTS),
        Fault(4, "os._exit(3), exit code 255", "the exact code"),
        Fault(5, "SystemExit, KeyboardInterrupt, GeneratorExit", "an outcome", slots=SLOTS),
        Fault(6, "an endless loop in C with the GIL held", "killed at the hard limit", slots=SLOTS),
        Fault(7, "signals ignored and blocked, all exceptions swallowed", "killed all the same"),
        Fault(8, "stack overflow, endless recursion, also in __reduce__", "a typed error, in time"),
        Fault(9, "threads, exit hooks, __del__ that hang or crash", "the result is kept"),
        Fault(10, "SIGSTOP, and then a limit", "killed"),
        Fault(11, "a fork whose copy comes back into our code", "it ends; one result"),
        Fault(12, "descriptors closed, replaced, written to", "a typed error or the right result"),
        Fault(13, "directory, environment, umask, signals, limits, locale", "gone with the child"),
    ],
    "Data": [
        Fault(14, "an argument does not pickle", "an error of the caller, and no process", _ANY),
        Fault(15, "a result does not pickle", "a typed error with the reason", slots=SLOTS),
        Fault(
            16,
            "an exception that neither pickles, loads nor prints",
            "type and text kept",
            slots=SLOTS,
        ),
        Fault(
            17,
            "an error or an exit in pickling, in loading, on either side",
            "each its verdict",
            slots=SLOTS,
        ),
        Fault(18, "results of all sizes", "whole"),
        Fault(19, "SIGKILL half-way through a result", "so many of so many bytes, at once"),
        Fault(20, "the child dies before it has read its argument", "the verdict is the child's"),
        Fault(
            21,
            "no descriptors, no room; descriptors for a dead child",
            "typed, nothing kept",
            slots=SLOTS,
        ),
        Fault(
            22,
            "a child that sends faster than its requester reads",
            "it waits; nothing is lost",
            slots=SLOTS,
        ),
        Fault(23, "much output, no line ends, no UTF-8, nobody who reads it", "no corrupt result"),
    ],
    "Tree": [
        Fault(24, "a forked grandchild holds the sockets open", "the verdict at once"),
        Fault(25, "grandchildren at a limit, at a stop, at the end", "killed", slots=SLOTS),
        Fault(26, "setsid, daemons, nohup", "killed too"),
        Fault(27, "a grandchild holds the memory", "it counts", slots=SLOTS),
        Fault(28, "thousands of zombies and short-lived grandchildren", "reaped"),
    ],
    "Requester": [
        Fault(
            29,
            "the worker is killed, however the body hangs",
            "its whole group is gone",
            slots=SLOTS,
        ),
        Fault(30, "the worker is killed while a child is being born", "no survivor"),
        Fault(31, "the worker forks during a call, and is killed", "no survivor"),
        Fault(32, "a hard limit, a revocation with any signal", "the group is gone", slots=SLOTS),
        Fault(33, "a soft limit while the slot waits", "the body hears of it, once", slots=SLOTS),
        Fault(34, "shutdown: warm, cold, Ctrl-C, to one or to all", "as asked", slots=SLOTS),
        Fault(35, "a thread or a greenlet is gone during its call", "so is the child", slots=SLOTS),
        Fault(36, "a process is used after a fork", "its own children and forkserver", _ANY),
        Fault(37, "SIGCHLD ignored, foreign waitpid, asyncio, gevent", "nothing", _ANY),
        Fault(38, "no descriptors, no processes any more", "typed; then it recovers", slots=SLOTS),
    ],
    "Forkserver": [
        Fault(
            39, "killed: idle, with children, between fork and report", "calls go on", slots=SLOTS
        ),
        Fault(40, "half a request, a malformed one, none", "its own connection ends", _ANY),
        Fault(41, "a preload fails, hangs, crashes, exits, prints, leaves things", "told", _ANY),
        Fault(42, "a fork fails, a child never comes up", "an error in time"),
        Fault(43, "stopped", "an error in time"),
        Fault(44, "every child dies at birth", "an error that says so"),
        Fault(45, "replaced under load, with new code", "no call is lost", _ANY),
    ],
    "Limits and accounting": [
        Fault(46, "memory: slow, sudden, mapped, shared, stacks, a large template", "real growth"),
        Fault(47, "the kernel runs out of memory", "evidence, or 'possibly'", _ANY),
        Fault(48, "a limit, a stop and the end at the same time", "exactly one verdict"),
        Fault(49, "the clock jumps", "no false limit"),
        Fault(50, "a pid is used again", "no stranger gets a signal"),
        Fault(51, "many calls, and kills of everybody", "all verdicts; nothing piles up"),
        Fault(52, "a task that always loses its child", "it stops in the end", _ANY, SLOTS),
    ],
}


@dataclass(frozen=True)
class Marked:
    """A test as pytest collects it, and what it says it is about."""

    name: str
    numbers: Sequence[int]
    #: Whether it is run here, and has to pass.
    counts: bool
    start_methods: Collection[str]
    slots: Collection[str]


#: The parameters that name what a child is started with, and what calls it; a value such as "spawn"
#: or "gevent" may mean something else in another one.
_START_METHOD = ("start_method",)
_SLOT = ("pool", "combination", "running", "shared")


#: Where the plugin below writes.
OUTPUT = "isolated_tasks_faults"


def pytest_addoption(parser: pytest.Parser) -> None:
    """``pytest --collect-only -p harness.faults --faults-to=FILE``: write down what is marked."""
    parser.addoption("--faults-to", dest=OUTPUT)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [asdict(_look_at(item)) for item in items if item.get_closest_marker("fault")]
    Path(config.getoption(OUTPUT)).write_text(json.dumps(marked))


def _look_at(item: pytest.Item) -> Marked:
    return Marked(
        name=item.nodeid,
        numbers=[number for mark in item.iter_markers("fault") for number in mark.args],
        counts=not any(_is_in_force(item, name) for name in ("skip", "skipif", "xfail")),
        start_methods=sorted(START_METHODS & _values(item, _START_METHOD)),
        slots=sorted(SLOTS & _values(item, _SLOT)),
    )


def _is_in_force(item: pytest.Item, name: str) -> bool:
    """Whether the item bears a mark of this name whose condition, if it has any, is met."""
    marks = item.iter_markers(name)
    return any(name == "skip" or not mark.args or any(mark.args) for mark in marks)


def _values(item: pytest.Item, names: Collection[str]) -> set[str]:
    """What the parameters of these names are, one deep."""
    found: set[str] = set()
    for name, value in getattr(getattr(item, "callspec", None), "params", {}).items():
        if name in names:
            found |= {str(one) for one in (value if isinstance(value, tuple | list) else [value])}
    return found


def read(path: Path) -> list[Marked]:
    """What the plugin has written."""
    return [Marked(**one) for one in json.loads(path.read_text())]
