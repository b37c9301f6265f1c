"""Where the workers of a test are: their one unique name, their folders, and what they leave there.

``with opened(request, folder, apps=APPS) as workplace: workplace.start("plain")`` starts a worker
for the app in APPS/plain.py. The fixtures in `harness.fixtures` do so for most tests.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from harness.app import Settings, close_app, make_app
from harness.network import TEMPORARY, Machine
from harness.services import delete_amqp_entities, delete_redis_keys
from harness.worker import Worker, pool_arguments, start_worker

SUPPORT = Path(__file__).parents[1]

#: The workers of a test, for the report of its failure.
WORKERS: pytest.StashKey[list[Worker]] = pytest.StashKey()


class Workplace:
    """Starts the workers and client apps of one test, all under one unique name, and clears up.

    Args:
        request: of the test, or of the fixture that several tests share; the servers are started
            when they are first asked for.
        folder: the working directory of the workers.
        apps: where the modules of the workers' apps are.
    """

    def __init__(self, request: pytest.FixtureRequest, folder: Path, *, apps: Path) -> None:
        self.name = f"test-{os.urandom(6).hex()}"
        self.folder = folder
        #: All that were started, in this order.
        self.workers: list[Worker] = []
        #: Over AMQP these queues are deleted at the end, and an exchange of each one's name.
        self.queues = [self.name]
        self._request = request
        #: Where programs of the test find modules.
        self.path = [apps, SUPPORT]
        self._open: list[Worker] = []
        self._apps: dict[str, Celery] = {}
        self._used: set[str] = set()
        self._cleanup = ExitStack()
        #: The workers' temporary folder. Not in `folder`, whose name is long: the path of a Unix
        #: socket may have 107 bytes.
        self.temporary = Path(tempfile.mkdtemp(prefix="it-"))
        self._cleanup.callback(shutil.rmtree, self.temporary)

    def settings(
        self,
        *,
        pool: str = "prefork",
        broker: str = "redis",
        backend: str = "redis",
        conf: Mapping[str, Any] | None = None,
    ) -> Settings:
        """Settings for `broker` ("redis", "amqp") and `backend` ("redis", "rpc", or a URL)."""
        _, pool_conf = pool_arguments(pool)
        return Settings(
            broker_url=self._url(broker),
            result_backend="rpc://" if backend == "rpc" else self._url(backend),
            name=self.name,
            conf={**pool_conf, **(conf or {})},
        )

    def app(self, settings: Settings) -> Celery:
        """The client's app for these settings, closed after the test."""
        key = repr(settings)
        if key not in self._apps:
            self._apps[key] = app = make_app("client", settings)
            # Celery's own unsubscribes from Redis. Where the garbage collector calls it in the
            # middle of another command, that waits for ever for the lock of redis-py 5.
            app.AsyncResult.__del__ = lambda result: None
            self.adopt(app)
        return self._apps[key]

    def adopt(self, app: Celery) -> None:
        """Close this app, too, after the test: before the servers forget what it declared."""
        self._cleanup.callback(close_app, app)

    def start(
        self,
        module: str,
        *,
        pool: str = "prefork",
        concurrency: int = 1,
        broker: str = "redis",
        backend: str = "redis",
        conf: Mapping[str, Any] | None = None,
        app: Celery | None = None,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        loglevel: str = "INFO",
        ready: bool = True,
        machine: Machine | None = None,
    ) -> Worker:
        """Start a worker; $FOLDER is where it may write.

        Args:
            module: of the worker's app; the file name of a script that runs the worker itself.
            pool: one of POOLS.
            concurrency: how many tasks it runs at a time.
            broker: see `settings`.
            backend: see `settings`.
            conf: further Celery settings, in JSON's types.
            app: the client's end, where it is not an app with the same settings.
            env: further variables of its environment.
            args: further options of `celery worker`.
            loglevel: from which on it logs.
            ready: whether to wait until it is.
            machine: where it runs, if not on this one.
        """
        settings = self.settings(pool=pool, broker=broker, backend=backend, conf=conf)
        worker = start_worker(
            str(self.path[0] / module) if module.endswith(".py") else module,
            pool=pool,
            concurrency=concurrency,
            app=app or self.app(settings),
            env={
                **settings.environ(),
                "TMPDIR": str(TEMPORARY if machine else self.temporary),
                "FOLDER": str(self.folder),
                **(env or {}),
            },
            path=self.path,
            cwd=self.folder,
            loglevel=loglevel,
            args=args,
            machine=machine,
        )
        self.workers.append(worker)
        self._open.append(worker)
        if ready:
            worker.wait_until_ready()
        return worker

    def lines(self, name: str) -> list[Any]:
        """The JSON lines that processes have written to a file of `folder`."""
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def stop(self) -> list[str]:
        """Stop the workers; return a line for each process that one of them left."""
        left = []
        while self._open:
            left += self._open.pop(0).close()
        return left

    def close(self) -> list[str]:
        """Stop all; return a line for each process or temporary file that a worker left."""
        with self._cleanup:
            return self.stop() + [f"file {path}" for path in self._files()]

    def _files(self) -> list[Path]:
        # What billiard makes in the main process, and a killed one cannot remove.
        excused = "pymp-" if any(worker.was_killed for worker in self.workers) else "none"
        return [path for path in sorted(self.temporary.rglob("*")) if excused not in path.name]

    def _url(self, service: str) -> str:
        if service not in CLEARED_BY:
            return service
        url: str = self._request.getfixturevalue(f"{service}_url")
        if service not in self._used:
            self._used.add(service)
            self._cleanup.callback(CLEARED_BY[service], self, url)
        return url

    def _clear_redis(self, url: str) -> None:
        delete_redis_keys(url, self.name)

    def _clear_amqp(self, url: str) -> None:
        exchanges = Settings(broker_url=url, result_backend="", name=self.name).exchanges
        for queue in self.queues:
            delete_amqp_entities(url, queue=queue, exchanges=[queue, *exchanges])


CLEARED_BY: Mapping[str, Callable[[Workplace, str], None]] = {
    "redis": Workplace._clear_redis,
    "amqp": Workplace._clear_amqp,
}

#: What the fixture `open_workplace` is.
OpenWorkplace = Callable[[], AbstractContextManager[Workplace]]


@contextmanager
def opened(request: pytest.FixtureRequest, folder: Path, *, apps: Path) -> Iterator[Workplace]:
    """A workplace whose test fails if a worker leaves anything behind; see `Workplace`.

    The workers' logs are in the report of the failure of whatever `request` is of.
    """
    workplace = Workplace(request, folder, apps=apps)
    request.node.stash[WORKERS] = workplace.workers
    try:
        yield workplace
    finally:
        left = workplace.close()
    if left:
        pytest.fail("a worker left behind:\n  " + "\n  ".join(left), pytrace=False)


def show_logs(item: pytest.Item, report: pytest.TestReport) -> None:
    """Add the logs of the workers to the report of a test that failed."""
    if report.failed:
        for node in item.listchain():
            for worker in node.stash.get(WORKERS, []):
                report.sections.append((f"log of worker {worker.pid}", worker.log()))
