"""Real workers with other people's libraries in them."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from harness.app import Settings, close_app, make_app
from harness.services import delete_redis_keys
from harness.worker import Worker, pool_arguments, start_worker

APPS = Path(__file__).parent / "apps"
SUPPORT = Path(__file__).parent.parent / "support"

WORKERS: pytest.StashKey[list[Worker]] = pytest.StashKey()


class Workplace:
    """The workers of a test or of a module, their folder and what they leave in it.

    Args:
        request: of the fixture; Redis is started when it is first asked for.
        folder: the working directory of the workers.
    """

    def __init__(self, request: pytest.FixtureRequest, folder: Path) -> None:
        self.folder = folder
        self.name = f"test-{os.urandom(6).hex()}"
        self._redis: str = request.getfixturevalue("redis_url")
        self._workers = request.node.stash.setdefault(WORKERS, [])
        self._cleanup = ExitStack()
        self._cleanup.callback(delete_redis_keys, self._redis, self.name)
        # Sockets are in it, whose paths may have 107 bytes.
        self.temporary = Path(tempfile.mkdtemp(prefix="it-"))
        self._cleanup.callback(shutil.rmtree, self.temporary)

    def start(
        self,
        module: str,
        *,
        pool: str = "prefork",
        concurrency: int = 1,
        backend: str | None = None,
        conf: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        ready: bool = True,
    ) -> Worker:
        """Start a worker for the app in apps/; $FOLDER is where it may write."""
        _, pool_conf = pool_arguments(pool)
        settings = self.settings({**pool_conf, **(conf or {})}, backend=backend)
        worker = start_worker(
            module,
            pool=pool,
            concurrency=concurrency,
            app=self.client(),
            env={
                **settings.environ(),
                "TMPDIR": str(self.temporary),
                "FOLDER": str(self.folder),
                **(env or {}),
            },
            path=[APPS, SUPPORT],
            cwd=self.folder,
        )
        self._workers.append(worker)
        self._cleanup.callback(self._close, worker)
        if ready:
            worker.wait_until_ready()
        return worker

    def settings(self, conf: Mapping[str, Any], *, backend: str | None = None) -> Settings:
        return Settings(self._redis, backend or self._redis, self.name, conf)

    def client(self) -> Celery:
        """The caller's app."""
        app = make_app("client", self.settings({}))
        # Celery's own may wait for ever, where the garbage collector calls it.
        app.AsyncResult.__del__ = lambda result: None
        self._cleanup.callback(close_app, app)
        return app

    def lines(self, name: str) -> list[Any]:
        """The JSON lines that processes have written to a file of `folder`."""
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def close(self) -> None:
        self._cleanup.close()

    def _close(self, worker: Worker) -> None:
        left = worker.close()
        if left:
            pytest.fail("a worker left behind:\n  " + "\n  ".join(left), pytrace=False)


@contextmanager
def _opened(request: pytest.FixtureRequest, folder: Path) -> Iterator[Workplace]:
    workplace = Workplace(request, folder)
    try:
        yield workplace
    finally:
        workplace.close()


@pytest.fixture(scope="module")
def open_workplace(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], AbstractContextManager[Workplace]]:
    """For workers that several tests share."""
    return lambda: _opened(request, tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def workplace(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workplace]:
    with _opened(request, tmp_path) as workplace:
        yield workplace


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
