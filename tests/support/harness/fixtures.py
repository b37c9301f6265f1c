"""Fixtures for tests with real workers. All that a conftest.py needs for them:

from harness.fixtures import *  # noqa: F403
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.processes import Mailbox, Word
from harness.worker import POOLS, Worker, pool_arguments
from harness.workplace import OpenWorkplace, Workplace, opened

__all__ = ["apps", "broker", "mailbox", "open_workplace", "pool", "word", "worker", "workplace"]


@pytest.fixture(scope="module")
def apps(request: pytest.FixtureRequest) -> Path:
    """Where the workers' apps are: in apps/, beside the file of the test."""
    return request.path.parent / "apps"


@pytest.fixture(scope="module")
def open_workplace(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, apps: Path
) -> OpenWorkplace:
    """For workers that several tests of a module share: ``with open_workplace() as workplace:``."""
    return lambda: opened(request, tmp_path_factory.mktemp("workplace"), apps=apps)


@pytest.fixture
def workplace(request: pytest.FixtureRequest, tmp_path: Path, apps: Path) -> Iterator[Workplace]:
    """Where the workers of this test are; see `worker`."""
    with opened(request, tmp_path, apps=apps) as workplace:
        yield workplace


@pytest.fixture
def worker(workplace: Workplace) -> Callable[..., Worker]:
    """A function that starts a worker, stopped after the test; see `Workplace.start`.

    `worker("plain", pool="threads", concurrency=2, broker="amqp", backend="redis", conf={...})`
    starts a worker for the app in apps/plain.py and returns it when it is ready. All workers of
    one test share one queue. An app that is a script, and runs the worker itself, is started as
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
