"""``python -m harness.doomed ADDRESS CASE START_METHOD TRACES``: a requester that may be killed.

A case is a kind of call: what its process is asked for, and what it runs. Of the second call of a
batch only that one counts.
"""

import os
import sys
from typing import Any, get_args

from harness import bodies, killing
from isolated_tasks.process import pickling
from isolated_tasks.process.children import Children
from isolated_tasks.process.options import ProcessOptions, StartMethod
from isolated_tasks.process.pickling import Pickled

#: What is asked for, by case.
CASES: dict[str, dict[str, Any]] = {
    "one call": {},
    "second of a batch": {"batch_size": 2, "batch_idle_timeout": 1000},
    "memory limit": {"memory_limit_bytes": 1 << 30},
    "grandchild": {},
}


def prepare(case: str) -> Pickled | None:
    """A call that comes before."""
    return pickling.dumps((os.getpid, (), {})) if case == "second of a batch" else None


def body(case: str, traces: str) -> Pickled:
    """The call that leaves a trace."""
    if case == "grandchild":
        return pickling.dumps((bodies.append_and_leave_a_process, (traces, "ran"), {}))
    return pickling.dumps((bodies.append, (traces, "ran"), {}))


def main(address: str, case: str, start_method: str, traces: str) -> None:
    (method,) = (one for one in get_args(StartMethod) if one == start_method)
    children = Children()
    options = ProcessOptions("test", method, **CASES[case])
    if (before := prepare(case)) is not None:
        children.call(before, options, lambda: address)
    pickled = body(case, traces)
    killing.arm_requester()
    children.call(pickled, options, lambda: address)
    children.close()
    sys.setprofile(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
