"""Many inputs for the frame reader: ``make fuzz``.

An input is what a peer may send: frames of real messages, changed here and there. Each is checked
in four ways:

* the frames that come out are those that another reader finds, a simple one that has all at once;
* each becomes a message whose values are of the declared types, and which comes back the same when
  it is sent again; or a `ProtocolError`, and nothing else;
* after an error nothing comes;
* the reader asks for no more memory than its limits admit, and what it takes besides is little more
  than the input is long.

Where atheris is installed it makes the inputs, guided by which of them reach new code; elsewhere
they are made at random. One that fails goes to ``build/fuzz``; ``frames.py FILE`` repeats it.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import inspect
import resource
import sys
import tempfile
import time
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.frames import SAMPLES, Allocations, Generator, Target, as_bytes
from isolated_tasks.process import protocol
from isolated_tasks.process.protocol import FrameReader, Limits

LIMITS = {
    "control": protocol.CONTROL_LIMITS,
    "status": protocol.STATUS_LIMITS,
    "call": protocol.CALL_LIMITS,
}

#: Where inputs go that fail.
FAILED = Path("build/fuzz")

#: Of an input that atheris makes: longer ones take their time. What they would reach besides, the
#: end of the reader's scratch, is what test_frames.py sees to.
MAX_LENGTH = 4096

#: Nothing takes this long, in seconds, unless it hangs.
HANG = 60


def run_random(target: Callable[[bytes], None], inputs: int, seed: int, limits: Limits) -> None:
    """Make inputs at random."""
    generator = Generator(seed, limits)
    for number in range(inputs):
        if number % 1000 == 0:
            faulthandler.dump_traceback_later(HANG, exit=True)
        target(generator.input())
    faulthandler.cancel_dump_traceback_later()


def run_guided(target: Callable[[bytes], None], inputs: int, seed: int, limits: Limits) -> None:
    """Have atheris (libFuzzer) make inputs, and keep those that reach new code to change them."""
    import atheris

    for function in _functions(protocol):
        atheris.instrument_func(function)
    # Two halves: changes that keep frames whole, and libFuzzer's own, which know what the code
    # compares with what.
    generator = Generator(seed, limits)

    def change(data: bytes, longest: int, seed: int) -> bytes:
        if seed % 2:
            return bytes(atheris.Mutate(data, longest))
        return (generator.changed(data) if data else generator.input())[:longest]

    with tempfile.TemporaryDirectory() as corpus:
        for number, message in enumerate(SAMPLES):
            Path(corpus, str(number)).write_bytes(as_bytes(message))
        arguments = [
            *(sys.argv[0], corpus, f"-atheris_runs={inputs}", f"-seed={seed or 1}"),
            *(f"-max_len={MAX_LENGTH}", f"-timeout={HANG}", "-verbosity=0", "-rss_limit_mb=0"),
            f"-artifact_prefix={FAILED}/",
        ]
        atheris.Setup(arguments, target, custom_mutator=change)
        atheris.Fuzz()


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    for thing in vars(module).values():
        if inspect.isfunction(thing) and thing.__module__ == module.__name__:
            yield thing
    for value in vars(FrameReader).values():
        function = value.fget if isinstance(value, property) else value
        if inspect.isfunction(function):
            yield function


class Report:
    """Passes inputs on; prints how far it is, now and then, and what came of it."""

    SECONDS = 10.0

    def __init__(self, target: Target, allocations: Allocations) -> None:
        self._target = target
        self._allocations = allocations
        self._began = self._printed = time.monotonic()
        self._rss_before = _peak_rss()
        names = ("inputs", "seconds", "frames", "messages", "errors", "largest allocation")
        print(*(f"{name:>10}" for name in names), flush=True)

    def __call__(self, data: bytes) -> None:
        try:
            self._target(data)
        except BaseException:
            path = FAILED / f"input-{zlib.crc32(data):08x}"
            path.write_bytes(data)
            print(f"This input fails: {path}", file=sys.stderr)
            raise
        if self._target.inputs % 1000 == 0 and time.monotonic() - self._printed > self.SECONDS:
            self._printed = time.monotonic()
            self.line()

    def line(self) -> None:
        target = self._target
        seconds = round(time.monotonic() - self._began, 1)
        numbers = (target.inputs, seconds, target.frames, target.messages, target.errors)
        print(*(f"{n:10}" for n in numbers), self._allocations.largest, "bytes", flush=True)

    def end(self) -> None:
        self.line()
        grown = (_peak_rss() - self._rss_before) / 2**20
        print(f"This process held up to {grown:.1f} MiB more than at the start.", flush=True)


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Many inputs for the frame reader.")
    parser.add_argument("files", nargs="*", type=Path, help="repeat these inputs and no others")
    parser.add_argument("--inputs", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limits", choices=LIMITS, default="control", help="those of which socket")
    parser.add_argument("--random", action="store_true", help="without atheris")
    options = parser.parse_args()
    limits = LIMITS[options.limits]
    allocations = Allocations()
    with allocations.watch():
        if options.files:
            for path in options.files:
                Target(limits, allocations)(path.read_bytes())
            return
        target = Target(limits, allocations)
        is_guided = not options.random and importlib.util.find_spec("atheris") is not None
        how = "guided by atheris" if is_guided else "at random"
        print(f"{options.inputs} inputs, {how}, seed {options.seed}, {options.limits} limits")
        FAILED.mkdir(parents=True, exist_ok=True)
        report = Report(target, allocations)
        run = run_guided if is_guided else run_random
        try:
            run(report, options.inputs, options.seed, limits)
        finally:
            report.end()


if __name__ == "__main__":
    main()
