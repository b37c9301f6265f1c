"""What an example works with: a folder, a connection, and workers that it measures."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import celery
import psutil

from support.connection import Client, Connection
from support.errors import UsageError
from support.memory import MEGABYTE, has_pss
from support.worker import Worker, command


class Lab:
    """Starts workers of the apps in one module, which is a file in this folder.

    Args:
        module: Its name.
        broker: Where messages go; files if None.
        backend: Where results go; files if None.
        quiet: Say nothing.

    Attributes:
        client: Sends tasks, and knows their outcomes.
        folder: An empty one; all that is in it goes at the end.
    """

    def __init__(
        self, module: str, *, broker: str | None, backend: str | None, quiet: bool
    ) -> None:
        self._module = module
        self._broker = broker
        self._backend = backend
        self._quiet = quiet

    def __enter__(self) -> Lab:
        self._temporary = tempfile.TemporaryDirectory(prefix=f"{self._module}-")
        self.folder = Path(self._temporary.name)
        try:
            self._connection = Connection.create(
                self._module, self.folder, broker=self._broker, backend=self._backend
            )
            self.client = Client(self._connection)
            self.client.open()
        except BaseException:
            self._temporary.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.client.close()
        finally:
            self._temporary.cleanup()

    def say(self, line: str) -> None:
        """Tell what has happened."""
        if not self._quiet:
            print(line, flush=True)

    def new_folder(self) -> Path:
        """A folder of its own for something."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    @contextmanager
    def worker(
        self, app: str, label: str, *, slots: int, environment: Mapping[str, str] | None = None
    ) -> Iterator[Worker]:
        """A prefork worker of an app, which has to have a task `ping`; there once it answers."""
        line = command(f"{self._module}:{app}", "--concurrency", str(slots))
        line += ["--hostname", f"{app}@{self._module}"]
        variables = {**self._connection.environment(), **(environment or {})}
        folder = self.new_folder()
        with Worker(label, line=line, environment=variables, folder=folder) as worker:
            worker.outcomes(self.client, [self.client.send("ping")])
            yield worker
        self.client.forget()

    def setup(self) -> dict[str, str]:
        """What the figures depend on."""
        return setup(self._broker)


def setup(broker: str | None, **more: str) -> dict[str, str]:
    """What figures depend on, in the order in which it is told."""
    scheme = (broker or "files").partition(":")[0]
    return {
        "python": f"Python {platform.python_version()}",
        "celery": f"Celery {celery.__version__}",
        **more,
        "broker": f"messages through {scheme}",
        "machine": f"{platform.system()}, {os.cpu_count() or 1} cores",
    }


def check_memory(needed: int) -> None:
    """Better to say it now than to have the kernel kill something.

    Raises:
        UsageError: So much is not free, or this system does not tell what a process takes.
    """
    if not has_pss():
        raise UsageError("this system does not tell the PSS of a process; Linux does")
    free = psutil.virtual_memory().available
    if needed > free:
        raise UsageError(
            f"this needs about {needed // MEGABYTE} MB of memory, and {free // MEGABYTE} MB are "
            "free"
        )


def as_megabytes(size: int, *, signed: bool = False) -> str:
    """A size in words."""
    megabytes = round(size / MEGABYTE)
    return f"{megabytes:+,d}" if signed else f"{megabytes:,d}"
