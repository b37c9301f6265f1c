"""Other processes that measure on request: ``python -m bench.programs KIND …``.

Each is asked by a line on its stdin, and answers with a line of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from bench import bodies
from bench.figures import Contender
from harness.processes import Slot


def bare_fork(*modules: str) -> Callable[[], Mapping[str, float]]:
    """A process that has loaded these modules, as a forkserver has, and does no more than fork."""
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    gc.disable()

    def measure() -> Mapping[str, float]:
        began = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return {"bare fork, exit and wait": time.perf_counter() - began}

    return measure


def requester(address: str, megabytes: str) -> Callable[[], Mapping[str, float]]:
    """A process that holds so much memory, and has a body run."""
    ballast = bytearray(os.urandom(1 << 20) * int(megabytes))
    slot = Slot(address)

    def measure() -> Mapping[str, float]:
        began = time.perf_counter()
        slot.run(bodies.nothing)
        assert ballast
        return {f"a call of a process with {megabytes} MB": time.perf_counter() - began}

    return measure


KINDS: dict[str, Callable[..., Callable[[], Mapping[str, float]]]] = {
    "bare_fork": bare_fork,
    "requester": requester,
}


@contextlib.contextmanager
def asked(kind: str, *arguments: str) -> Iterator[Contender]:
    """Start one, for as long as the block lasts."""
    command = [sys.executable, "-m", "bench.programs", kind, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask() -> Mapping[str, float]:
            stdin.write("\n")
            stdin.flush()
            answer: Mapping[str, float] = json.loads(stdout.readline())
            return answer

        try:
            yield ask
        finally:
            # The end of what it reads is its end.
            stdin.close()


def main(kind: str, *arguments: str) -> None:
    """Answer until nobody asks any more."""
    measure = KINDS[kind](*arguments)
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
