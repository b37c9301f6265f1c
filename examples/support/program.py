"""The command: its options, its errors and its exit code, and where its files go."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from support.errors import ExampleError, UsageError
from support.interruption import Interrupted, note_signals


def run(name: str, function: Callable[[], None]) -> int:
    """Return the exit code of an example; an error is one line on stderr, never a traceback.

    That is 0, or 1 if a worker or a task failed, 2 for options that cannot be used, and 128 plus
    the signal's number if a signal such as Ctrl-C (130) ended it.
    """
    try:
        note_signals()
        function()
    except ExampleError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(
            f"{name}: {error}; from a checkout, \"pip install '.[examples]'\" installs what is "
            "needed",
            file=sys.stderr,
        )
        return UsageError.exit_code
    except Interrupted as interrupted:
        print(f"{name}: {interrupted}; every worker is stopped", file=sys.stderr)
        return interrupted.exit_code
    return 0


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line each."""

    def error(self, message: str) -> NoReturn:
        # argparse would print its usage first, eight lines that bury the one that matters.
        raise UsageError(f"{message} (--help lists the options)")


def parser(name: str, description: str) -> Parser:
    """The options that every example has that writes a plot."""
    made = Parser(
        prog=f"{name}.py",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--output", type=Path, default=Path(f"{name}_output"), metavar="DIR",
        help="folder for the plot and the figures")  # fmt: skip
    add("--broker", type=broker, metavar="URL", help="Redis or RabbitMQ instead of files")
    add("--backend", type=url, metavar="URL", help="results there, not in files; with --broker")
    add("--quiet", action="store_true", help="print only errors and the final tables")
    return made


def check_backend(given: argparse.Namespace) -> None:
    """Complain of a backend without a broker."""
    if given.backend and not given.broker:
        raise UsageError(
            "--backend needs --broker: without one, results are files, as messages are"
        )


def at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, not {text!r}"
            )
        return number

    return whole_number


def url(text: str) -> str:
    if "://" not in text:
        raise argparse.ArgumentTypeError(f"must be a URL such as redis://localhost/0, not {text!r}")
    return text


def broker(text: str) -> str:
    if url(text).startswith(("filesystem:", "files:", "memory:")):
        raise argparse.ArgumentTypeError("must be a server; without it, messages go through files")
    return text


@contextmanager
def writable(output: Path) -> Iterator[None]:
    """See now that results can be written, rather than two minutes later."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise UsageError(f"cannot write to --output {output}: {error.strerror}") from error
    try:
        yield
    finally:
        # Only an empty one goes: a run that failed leaves no folder behind.
        with suppress(OSError):
            output.rmdir()
