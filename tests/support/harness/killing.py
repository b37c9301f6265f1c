"""Kills a process just before the n-th time that it asks the kernel for something.

CPython reaches the kernel through functions in C, and tells a profile function of each that it is
about to call (``sys.setprofile``, "c_call"). So the same step is hit each time, whatever the
machine is doing, and no debugger is needed. It does not tell of what is called through ctypes;
before those calls of ours a step is put in. An `Order` is a file that names who is to die and when;
it is gone when that has happened.

    python -m harness.killing MODULE ARGUMENTS…     runs a module of ours with this in force
"""

import contextlib
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

#: Where processes find the order.
VARIABLE = "ISOLATED_TASKS_TEST_ORDER"

#: The modules whose functions ask the kernel.
ASKING = frozenset(
    {
        *("posix", "_socket", "socket", "select", "fcntl", "_signal", "mmap", "_io"),
        *("faulthandler", "resource"),
    }
)
#: The functions of other modules that do: the rest of this one looks at clocks.
OTHERS = (time.sleep,)


class Order:
    """Who is to be killed, and before which step.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        os.environ[VARIABLE] = str(path)

    def give(self, role: str, step: int) -> None:
        """Have the next process in this role die before this step; the first is 1."""
        new = self._path.with_suffix(".new")
        new.write_text(f"{role} {step}")
        new.rename(self._path)

    def was_carried_out(self) -> bool:
        """Whether it has happened; if not, it is withdrawn."""
        try:
            self._path.unlink()
        except FileNotFoundError:
            return True
        return False


class _Killer:
    """The profile function of one process.

    It looks for an order at each step that it does not count for one already, so that one may also
    be given to a process that has been there for a while.

    Args:
        role: of the process.
        begins_with: the function before which it first looks; else at once.
    """

    def __init__(self, role: str, *, begins_with: str | None = None) -> None:
        self._role = role
        self._begins_with = begins_with
        self._left = 0

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if event != "c_call" or not _asks(function):
            return
        if self._begins_with not in (None, function.__name__):
            return
        self._begins_with = None
        self._left = self._left or _steps(self._role)
        if not self._left:
            return
        self._left -= 1
        if not self._left:
            # One that was withdrawn meanwhile is none.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.environ[VARIABLE])
                os.kill(os.getpid(), signal.SIGKILL)


def _asks(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or type(owner).__module__
    return module in ASKING or function in OTHERS


def _steps(role: str) -> int:
    """How many steps are left to a process in this role; 0 if it is to live."""
    try:
        with open(os.environ[VARIABLE]) as file:
            who, step = file.read().split()
    except FileNotFoundError:
        return 0
    return int(step) if who == role else 0


def arm_forkserver() -> None:
    """In a preload: this process counts from its next request on, its children from their birth."""
    from isolated_tasks.process import system

    _put_in_steps()
    sys.setprofile(_Killer("forkserver", begins_with="_accept"))
    os.register_at_fork(after_in_child=lambda: sys.setprofile(_Killer("child")))
    command = system.interpreter
    system.interpreter = lambda module: [*command("harness.killing"), module]


def _put_in_steps() -> None:
    """Have a step before each call that is made through ctypes."""
    from isolated_tasks.process import system

    prctl = system._prctl

    def step_and_call(*arguments: int) -> int:
        os.getppid()
        assert prctl is not None
        return int(prctl(*arguments))

    if prctl is not None:
        system._prctl = step_and_call


def arm_requester() -> None:
    """This process counts from now on."""
    sys.setprofile(_Killer("requester"))


def main(module: str, *arguments: str) -> None:
    sys.argv[:] = [module, *arguments]
    _put_in_steps()
    # What comes before is Python's own beginning.
    sys.setprofile(_Killer("child", begins_with="setpgid"))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
elif os.environ.get(VARIABLE) and "isolated_tasks.process.forkserver" in sys.modules:
    arm_forkserver()
