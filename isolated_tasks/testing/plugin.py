"""The fixtures, which pytest finds by the entry point ``pytest11``.

This module is imported in every run of pytest where the package is installed. So it imports pytest
alone, and has no hook that is called for each test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from celery import Celery
    from celery.worker import WorkController

__all__ = [
    "assert_no_growth",
    "isolated_app",
    "isolated_in_place",
    "isolated_worker",
    "isolated_worker_parameters",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tell pytest of the option ``isolated_app`` of its configuration."""
    parser.addini(
        "isolated_app",
        "the Celery app of the fixture isolated_worker, as `celery -A` takes it (isolated_tasks)",
        default="",
    )


@pytest.fixture
def isolated_app(request: pytest.FixtureRequest) -> Celery:
    """The app that `isolated_worker` serves.

    That of ``isolated_app`` in pytest's configuration, which is what ``celery -A`` takes; without
    it the ``celery_app`` of ``celery.contrib.pytest``, where that is used. Override it to have
    another.

    Raises:
        pytest.UsageError: There is neither.
    """
    name = str(request.config.getini("isolated_app"))
    if name:
        from celery.app.utils import find_app

        return find_app(name)
    try:
        return request.getfixturevalue("celery_app")
    except pytest.FixtureLookupError as exc:
        if exc.argname != "celery_app":
            raise
        raise pytest.UsageError(
            "isolated_worker: which app? Set isolated_app in pytest's configuration, as in"
            " `isolated_app = proj`, or override the fixture isolated_app"
        ) from None


@pytest.fixture(scope="session")
def isolated_worker_parameters() -> Mapping[str, Any]:
    """Arguments of `isolated_tasks.testing.start_worker`. Override it to have others.

    Default: none.
    """
    return {}


@pytest.fixture
def isolated_worker(
    isolated_app: Celery, isolated_worker_parameters: Mapping[str, Any]
) -> Iterator[WorkController]:
    """An embedded worker of `isolated_app`, whose isolated tasks run in a child, for one test.

    See `isolated_tasks.testing.start_worker`.
    """
    from isolated_tasks.testing.embedded import start_worker

    with start_worker(isolated_app, **isolated_worker_parameters) as worker:
        yield worker


@pytest.fixture
def isolated_in_place() -> Iterator[None]:
    """Isolated tasks run where they are called, for one test: `isolated_tasks.testing.in_place`."""
    from isolated_tasks.testing.embedded import in_place

    with in_place():
        yield


@pytest.fixture(scope="session")
def assert_no_growth() -> Callable[..., Any]:
    """`isolated_tasks.testing.assert_no_growth`."""
    from isolated_tasks.testing.growth import assert_no_growth

    return assert_no_growth
