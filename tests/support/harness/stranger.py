"""``python -m harness.stranger ADDRESS UID``: asks a forkserver for a child, as another user."""

import os
import socket
import sys

from isolated_tasks.process import protocol
from isolated_tasks.process.transport import Channel


def main(address: str, uid: int) -> None:
    """Print what the forkserver says: the name of a message, or how it closed the door."""
    os.setgid(uid)
    os.setuid(uid)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
        connection.setblocking(True)
        print(ask(connection))
    except OSError as exc:
        print(type(exc).__name__)


def ask(connection: socket.socket) -> str:
    """Send a request that is right in every way, and wait for the answer."""
    call, lifeline = socket.socketpair(), os.pipe()
    channel = Channel(connection, protocol.CONTROL_LIMITS)
    try:
        channel.send(request(), (call[1].fileno(), lifeline[0], lifeline[1], 2))
    except BrokenPipeError:
        return "closed"
    connection.setblocking(True)
    message = channel.receive()
    return type(message).__name__ if message is not None else "closed"


def request(**changes: object) -> protocol.Spawn:
    """A request for a child."""
    values = {
        "name": "test",
        "start_method": "forkserver",
        "batch_size": 1,
        "first_call_timeout": 60.0,
        "batch_idle_timeout": 5.0,
        "batch_memory_limit_bytes": None,
        "memory_limit_bytes": None,
        "soft_memory_limit_bytes": None,
        "cpu_time_limit": None,
        "nice": None,
        "max_open_files": None,
        "keep_children": False,
        "max_result_bytes": 1 << 30,
        "plain_outcomes": False,
        "call_id": None,
        "failures": 0,
        "exit_timeout": 5.0,
        "env": {},
    }
    return protocol.Spawn(**{**values, **changes})  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
