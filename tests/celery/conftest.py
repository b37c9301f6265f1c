"""Real workers on real brokers."""

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from harness.app import Settings, close_app, make_app
from harness.processes import Mailbox, Word
from harness.services import delete_amqp_entities, delete_redis_keys
from harness.worker import POOLS, Worker, pool_arguments, start_worker

APPS = Path(__file__).parent / "apps"
SUPPORT = Path(__file__).parent.parent / "support"

#: The workers of a test, for the report of its failure.
WORKERS: pytest.StashKey[list[Worker]] = pytest.StashKey()


class Workplace:
    """Starts the workers and client apps of one test, all under one unique name, and clears up.

    Args:
        request: of the test, or of the fixture that several tests share; the servers are started
            when they are first asked for.
        folder: the working directory of the workers.
    """

    def __init__(self, request: pytest.FixtureRequest, folder: Path) -> None:
        self.name = f"test-{os.urandom(6).hex()}"
        self._request = request
        self._folder = folder
        self._workers: list[Worker] = []
        request.node.stash[WORKERS] = self._workers
        self._apps: dict[str, Celery] = {}
        self._cleanup = ExitStack()
        self._used: set[str] = set()
        #: The workers' temporary folder. Not in `folder`, whose name is long: the path of a Unix
        #: socket may have 107 bytes.
        self.temporary = Path(tempfile.mkdtemp(prefix="it-"))

    def settings(self, *, broker: str, backend: str, conf: Mapping[str, Any]) -> Settings:
        """Settings for `broker` ("redis", "amqp") and `backend` ("redis", "rpc", or a URL)."""
        return Settings(
            broker_url=self._url(broker),
            result_backend="rpc://" if backend == "rpc" else self._url(backend),
            name=self.name,
            conf=conf,
        )

    def app(self, settings: Settings) -> Celery:
        """The client's app for these settings, closed after the test."""
        key = repr(settings)
        if key not in self._apps:
            self._apps[key] = app = make_app("client", settings)
            # Celery's own unsubscribes from Redis. Where the garbage collector calls it in the
            # middle of another command, that waits for ever for the lock of redis-py 5.
            app.AsyncResult.__del__ = lambda result: None
            self._cleanup.callback(close_app, app)
        return self._apps[key]

    def start(
        self,
        module: str,
        *,
        pool: str = "prefork",
        concurrency: int = 1,
        broker: str = "redis",
        backend: str = "redis",
        conf: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        loglevel: str = "INFO",
        ready: bool = True,
    ) -> Worker:
        """Start a worker; see the fixture `worker`."""
        _, pool_conf = pool_arguments(pool)
        settings = self.settings(broker=broker, backend=backend, conf={**pool_conf, **(conf or {})})
        worker = start_worker(
            str(APPS / module) if module.endswith(".py") else module,
            pool=pool,
            concurrency=concurrency,
            app=self.app(settings),
            env={**settings.environ(), "TMPDIR": str(self.temporary), **(env or {})},
            path=[APPS, SUPPORT],
            cwd=self._folder,
            loglevel=loglevel,
            args=args,
        )
        self._workers.append(worker)
        if ready:
            worker.wait_until_ready()
        return worker

    def close(self) -> list[str]:
        """Stop all; return a line for each process or temporary file that a worker left."""
        with self._cleanup:
            left = [line for worker in self._workers for line in worker.close()]
        # What billiard makes in the main process, and a killed one cannot remove.
        excused = "pymp-" if any(worker.was_killed for worker in self._workers) else "none"
        files = [path for path in sorted(self.temporary.rglob("*")) if excused not in path.name]
        left += [f"file {path}" for path in files]
        shutil.rmtree(self.temporary)
        return left

    def _url(self, service: str) -> str:
        if service == "redis":
            url: str = self._request.getfixturevalue("redis_url")
        elif service == "amqp":
            url = self._request.getfixturevalue("amqp_url")
        else:
            return service
        if service not in self._used:
            self._used.add(service)
            self._cleanup.callback(CLEARED_BY[service], url, self.name)
        return url


def _clear_amqp(url: str, name: str) -> None:
    exchanges = Settings(broker_url=url, result_backend="", name=name).exchanges
    delete_amqp_entities(url, queue=name, exchanges=exchanges)


CLEARED_BY = {"redis": delete_redis_keys, "amqp": _clear_amqp}


@contextmanager
def _opened(request: pytest.FixtureRequest, folder: Path) -> Iterator[Workplace]:
    workplace = Workplace(request, folder)
    try:
        yield workplace
    finally:
        left = workplace.close()
    if left:
        pytest.fail("a worker left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(scope="module")
def open_workplace(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], AbstractContextManager[Workplace]]:
    """For workers that several tests of a module share: ``with open_workplace() as workplace:``."""
    return lambda: _opened(request, tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def workplace(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workplace]:
    """Where the workers of this test are; see `worker`."""
    with _opened(request, tmp_path) as workplace:
        yield workplace


@pytest.fixture
def worker(workplace: Workplace) -> Callable[..., Worker]:
    """A function that starts a worker, stopped after the test; see `Workplace.start`.

    `worker("plain", pool="threads", concurrency=2, broker="amqp", backend="redis", conf={...})`
    starts a worker for the app in tests/celery/apps/plain.py and returns it when it is ready.
    `conf` are Celery settings, `env` variables and `args` options of `celery worker`. All workers
    of one test share one queue. An app that is a script, and runs the worker itself, is started as
    `worker("script.py")`.
    """
    return workplace.start


@pytest.fixture
def mailbox(tmp_path: Path) -> Iterator[Mailbox]:
    """Where bodies tell the test something."""
    mailbox = Mailbox(tmp_path)
    yield mailbox
    mailbox.close()


@pytest.fixture
def word(tmp_path: Path) -> Word:
    """What bodies wait for."""
    return Word(tmp_path)


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> str:
    """The name of a pool: a test that asks for it runs once in each."""
    name: str = request.param
    pool_arguments(name)  # skips before anything is started
    return name


@pytest.fixture(params=["redis", "amqp"])
def broker(request: pytest.FixtureRequest) -> str:
    """The name of a broker: a test that asks for it runs once over each."""
    name: str = request.param
    return name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of the workers with the failure of a test."""
    report = yield
    if report.failed:
        for node in item.listchain():
            for worker in node.stash.get(WORKERS, []):
                report.sections.append((f"log of worker {worker.pid}", worker.log()))
    return report
