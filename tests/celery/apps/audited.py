"""Tasks whose memory is of each kind, and some that the audit has to leave alone."""

import os

from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)

MIB = 1 << 20

#: What `leaks` never gives back.
leaked: list[bytes] = []

#: What `fragments` keeps from one call to the next, and no longer.
pins: list[bytes] = []


@app.task
def clean() -> int:
    return sum(range(1000))


@app.task
def peaks_and_frees() -> int:
    return len(b"x" * (60 * MIB))


@app.task
def leaks() -> int:
    leaked.append(b"x" * MIB)
    return len(leaked)


@app.task
def fragments() -> int:
    """Free all but a thousandth, in which no arena of Python's allocator can be given back."""
    pieces = [bytes(400) for _ in range(100_000)]
    pins[:] = pieces[::1000]
    return len(pins)


@app.task
def returns_much() -> str:
    return "x" * MIB


@app.task
def fails() -> None:
    raise ValueError("as it should")


@app.task
def where() -> int:
    return os.getpid()


@app.task
def calls_another_in_place() -> int:
    clean.apply()
    return len(b"x" * (20 * MIB))


@app.task(base=IsolatedTask)
def isolated() -> int:
    return os.getpid()
