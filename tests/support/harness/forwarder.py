"""A program: lets the machines of a `harness.network` reach servers that only this machine reaches.

    python -m harness.forwarder PID ADDRESS PORT=HOST:PORT…

listens at ADDRESS in the network namespace of process PID, and connects from its own. It says
``ready`` when it listens, and ends when its input does.
"""

import asyncio
import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Iterator, Mapping

#: setns(2). Python has had it in `os` since 3.12.
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def network_of(pid: int) -> Iterator[None]:
    """Sockets that this thread makes meanwhile belong to the network of that process."""
    with open("/proc/self/ns/net") as own, open(f"/proc/{pid}/ns/net") as other:
        _enter(other.fileno())
        try:
            yield
        finally:
            _enter(own.fileno())


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass  # as good as its end
    finally:
        writer.close()


async def _serve(listeners: Mapping[socket.socket, tuple[str, int]]) -> None:
    for listener, server in listeners.items():

        async def connected(
            reader: asyncio.StreamReader,
            writer: asyncio.StreamWriter,
            server: tuple[str, int] = server,
        ) -> None:
            try:
                there, back = await asyncio.open_connection(*server)
            except OSError:
                writer.close()
                return
            await asyncio.gather(_copy(reader, back), _copy(there, writer))

        await asyncio.start_server(connected, sock=listener)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, ended.set)
    print("ready", flush=True)
    await ended.wait()
    # Connections that are open now need no farewell.
    os._exit(0)


def main(pid: str, address: str, *services: str) -> None:
    listeners = {}
    with network_of(int(pid)):
        for service in services:
            port, _, server = service.partition("=")
            host, _, server_port = server.rpartition(":")
            listener = socket.create_server((address, int(port)))
            listeners[listener] = (host, int(server_port))
    asyncio.run(_serve(listeners))


if __name__ == "__main__":
    main(*sys.argv[1:])
