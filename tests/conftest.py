"""The servers that tests use, one of each for the whole run."""

from collections.abc import Iterator

import pytest

from harness.services import ServiceMissing, find_amqp, redis_service, require


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The URL of a Redis: $REDIS_URL, or a server of our own on a free port."""
    try:
        with redis_service() as url:
            yield url
    except ServiceMissing as missing:
        require(missing)


@pytest.fixture(scope="session")
def amqp_url() -> str:
    """The URL of a RabbitMQ: $AMQP_URL, or the one on this machine."""
    try:
        return find_amqp()
    except ServiceMissing as missing:
        require(missing)
