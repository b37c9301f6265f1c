"""A real forkserver that is sent anything, by thousands, along with any descriptors."""

import collections
import contextlib
import os
import random
import socket
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from harness.frames import SAMPLES, Generator, as_bytes, find_frames
from harness.leaks import descriptors_of
from harness.processes import PATIENCE, Slot, survivors
from isolated_tasks.process.launcher import Launcher, Plan
from isolated_tasks.process.protocol import (
    CONTROL_LIMITS,
    SPAWN_DESCRIPTORS,
    Adopt,
    Kind,
    Signal,
    Spawn,
)

pytestmark = pytest.mark.usefixtures("nothing_leaks")

COUNT = 3000

#: Three children of the memory limit in the sample fit into it; the others wait.
BUDGET = 3 << 30

(LIMITED,) = (message for message in SAMPLES if isinstance(message, Spawn))
SPAWN = replace(LIMITED, memory_limit_bytes=None)

REQUESTS = [
    as_bytes(SPAWN),
    as_bytes(SPAWN) + as_bytes(Signal(15)),
    as_bytes(SPAWN) + as_bytes(Signal(1 << 40)),
    *[as_bytes(LIMITED)] * 3,
    as_bytes(replace(LIMITED, memory_limit_bytes=BUDGET + 1)),
    # One that cannot be: a fresh interpreter for each would take its time.
    as_bytes(replace(SPAWN, start_method="spawn", env={"": ""})),
    as_bytes(Adopt(12, 1 << 20, None)),
]


@pytest.fixture
def launcher(nothing_leaks: None) -> Iterator[Launcher]:
    launcher = Launcher(Plan(memory_budget_bytes=BUDGET))
    launcher.start()
    launcher.wait_loaded(PATIENCE)
    yield launcher
    launcher.stop()


@pytest.fixture
def descriptors(nothing_leaks: None) -> Iterator[list[int]]:
    """Of many sorts."""
    one, two = socket.socketpair()
    found = [one.detach(), two.detach(), *os.pipe(), os.memfd_create("any")]
    found += [os.open(path, os.O_RDONLY) for path in (os.devnull, "/", "/proc/self/status")]
    yield found
    for descriptor in found:
        os.close(descriptor)


class Crowd:
    """Requesters that say anything."""

    def __init__(self, address: str, descriptors: list[int], seed: int) -> None:
        self._address = address
        self._descriptors = descriptors
        self._random = random.Random(seed)
        self._generator = Generator(seed, CONTROL_LIMITS)
        self._open: collections.deque[socket.socket] = collections.deque()
        #: How often the forkserver has answered with what.
        self.answers: collections.Counter[Kind] = collections.Counter()

    def request(self) -> None:
        """One more; some of them stay while others come."""
        connection = socket.socket(socket.AF_UNIX)
        self._open.append(connection)
        connection.settimeout(PATIENCE)
        connection.connect(self._address)
        data = self._data()
        # The descriptors of a request come with its first byte; those of nonsense with any.
        at = self._random.choice([0, self._random.randrange(len(data) + 1)])
        # It may close the door before all is said.
        with contextlib.suppress(ConnectionError):
            connection.sendall(data[:at])
            if data[at:]:
                sent = socket.send_fds(connection, [data[at:]], self._some_descriptors())
                connection.sendall(data[at + sent :])
        if self._random.randrange(3) == 0:
            self._hear_out(self._open.pop())
        elif len(self._open) > 20:
            self._open.popleft().close()

    def _data(self) -> bytes:
        if self._random.randrange(10) == 0:
            return self._random.randbytes(self._random.randrange(1, 100))
        if self._random.randrange(3) == 0:
            return self._generator.input()
        data = self._random.choice(REQUESTS)
        for _ in range(self._random.randrange(3)):
            data = self._generator.changed(data)
        return data

    def _some_descriptors(self) -> list[int]:
        count = self._random.choice([0, 1, 2, *[SPAWN_DESCRIPTORS] * 12, 4, 50])
        return self._random.choices(self._descriptors, k=count)

    def _hear_out(self, connection: socket.socket) -> None:
        """Say no more, and wait until the other side has no more to say."""
        said = b""
        with connection, contextlib.suppress(ConnectionError):
            connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(65536):
                said += data
        found = find_frames(said, CONTROL_LIMITS)
        assert not found.is_broken
        self.answers.update(Kind(frame.kind) for frame in found.frames)

    def leave(self) -> None:
        while self._open:
            self._open.pop().close()

    def settle(self) -> None:
        """Wait until all that was sent before has been seen to."""
        # Twice: the first one may be served in the same round, before what was there earlier.
        for _ in range(2):
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(PATIENCE)
            connection.connect(self._address)
            self._hear_out(connection)


def test_whatever_thousands_say_the_forkserver_is_the_same_and_serves_the_next_call(
    launcher: Launcher, descriptors: list[int]
) -> None:
    (pid,) = launcher.pids()
    forkserver = psutil.Process(pid)
    crowd = Crowd(launcher.address, descriptors, seed=1)
    crowd.settle()
    before = sorted(descriptors_of(pid))
    held = forkserver.memory_info().rss

    for _ in range(COUNT):
        crowd.request()
    crowd.leave()

    # Those that it has started for them are killed; and reaped, and their memory given back.
    while children := forkserver.children():
        assert survivors(child.pid for child in children) == set()
        crowd.settle()
    crowd.settle()
    assert sorted(descriptors_of(pid)) == before
    # Nothing collects garbage there.
    assert forkserver.memory_info().rss - held < 8 << 20
    slot = Slot(launcher.address, memory_limit_bytes=BUDGET)
    assert slot.run(abs, -1) == 1
    slot.close()
    launcher.check()
    assert launcher.pids() == [pid]
    # And they have not all been turned away at the door.
    assert {Kind.STARTED, Kind.WAITING, Kind.REFUSED} <= set(crowd.answers)
