"""Limits, revocation and shutdown: the same in every pool."""

import pytest

from harness.fixtures import *  # noqa: F403  # pytest finds a fixture by its name in a conftest.py

#: Over RabbitMQ acknowledgements and results go other ways; one pool of processes and one of
#: threads will do there.
COMBINATIONS = [
    *((pool, "redis") for pool in ("prefork", "threads", "gevent", "eventlet", "solo")),
    *((pool, "amqp") for pool in ("prefork", "threads")),
]


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def combination(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A pool and a broker: all tests of this folder run in each."""
    combination: tuple[str, str] = request.param
    return combination
