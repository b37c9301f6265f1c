"""The servers that tests use, one of each for the whole run, and the report of a failure."""

import signal
from collections.abc import Generator, Iterator

import pytest

from harness.services import ServiceMissing, find_amqp, redis_service, require
from harness.workplace import show_logs

# A shell without job control starts what is followed by `&` with SIGINT ignored (POSIX, "Shell
# Command Language", 2.11), and then so do all the commands that tests press Ctrl-C for.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of the workers with the failure of a test."""
    report = yield
    show_logs(item, report)
    return report
