"""What this kernel can, and what happens where it cannot: here, what one process can see alone."""

import fcntl
import mmap
import os
import select
import signal
import socket
import sys
import types
from collections.abc import Iterator

import pytest

from isolated_tasks.process import system

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for descriptor in (reader, writer):
        try:
            os.close(descriptor)
        except OSError:
            pass  # the test has closed it


# ── waiting ─────────────────────────────────────────────────────────────────────────────────────


def test_the_numbers_of_poll_are_the_system_s() -> None:
    assert system.POLL_READ == select.POLLIN
    assert system.POLL_WRITE == select.POLLOUT
    assert system.POLL_CLOSED == select.POLLERR | select.POLLHUP | select.POLLNVAL


def test_waiting_tells_what_can_be_done(pipe: tuple[int, int]) -> None:
    reader, writer = pipe

    assert system.wait_for(writer, system.POLL_WRITE) == [(writer, system.POLL_WRITE)]
    assert system.wait_for(reader, timeout=0.001) == []


def test_a_pipe_is_closed_by_its_peer_when_its_writing_end_is_closed(
    pipe: tuple[int, int],
) -> None:
    assert not system.is_closed_by_peer(pipe[0])

    os.close(pipe[1])

    assert system.is_closed_by_peer(pipe[0])


# ── the lifeline ────────────────────────────────────────────────────────────────────────────────


@ON_LINUX
def test_a_lifeline_for_a_group_that_is_not_there_is_not_armed(pipe: tuple[int, int]) -> None:
    flags = fcntl.fcntl(pipe[0], fcntl.F_GETFL)

    assert not system.arm_lifeline(pipe[0], group=2**22 - 1)
    assert fcntl.fcntl(pipe[0], fcntl.F_GETFL) == flags


def test_a_kernel_without_a_lifeline_says_so(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "_F_SETSIG", None)

    assert not system.arm_lifeline(pipe[0], group=os.getpgrp())
    assert system.features()["lifeline"] is False
    assert any(line.startswith("no lifeline: ") for line in system.lacking())


# ── processes ───────────────────────────────────────────────────────────────────────────────────


@ON_LINUX
def test_a_pidfd_of_a_living_process_is_not_readable() -> None:
    pidfd = system.open_pidfd(os.getpid())
    assert pidfd is not None
    try:
        assert system.wait_for(pidfd, timeout=0) == []
        assert system.pidfd_exit_code(pidfd) is None
        assert not os.get_inheritable(pidfd)
    finally:
        os.close(pidfd)


def test_there_is_no_pidfd_of_a_process_that_is_not_there() -> None:
    assert system.open_pidfd(2**22 - 1) is None


def test_there_is_no_pidfd_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.delattr(signal, "pidfd_send_signal", raising=False)

    assert system.open_pidfd(os.getpid()) is None
    assert not system.signal_pidfd(0, signal.SIGKILL, to_group=True)
    assert system.features()["pidfd"] is False
    assert system.features()["pidfd_group_signal"] is False


def test_the_exit_code_is_unknown_where_the_kernel_does_not_tell(pipe: tuple[int, int]) -> None:
    # A pipe is no pidfd: the request fails, as it does on an older kernel.
    assert system.pidfd_exit_code(pipe[0]) is None
    assert not system.signal_pidfd(pipe[0], signal.SIGKILL, to_group=True)


def test_signals_to_a_group_that_is_gone_are_dropped() -> None:
    system.signal_group(2**22 - 1, signal.SIGKILL)


@ON_LINUX
def test_native_threads_are_counted() -> None:
    assert system.thread_count() >= 1


@ON_LINUX
def test_the_features_are_those_of_a_current_kernel() -> None:
    features = system.features()

    assert set(features) == {
        *("lifeline", "pidfd", "pidfd_group_signal", "peer_credentials", "peak_reset"),
    }
    assert features["lifeline"]
    assert features["peer_credentials"]
    assert len(system.lacking()) == list(features.values()).count(False)


# ── memory ──────────────────────────────────────────────────────────────────────────────────────


@ON_LINUX
def test_resident_memory_is_counted_in_bytes() -> None:
    # A mapping of its own: malloc might give what it has kept of an earlier test.
    with mmap.mmap(-1, 64 << 20) as held:
        before = system.rss_bytes()
        held.write(b"x" * len(held))
        grown = system.rss_bytes() - before

    assert 60 << 20 < grown < 160 << 20


# ── descriptors ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["memfd", "temporary file"])
def crash_file(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    if request.param != "memfd":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    descriptor = system.crash_file()
    yield descriptor
    os.close(descriptor)


def test_a_crash_file_has_no_name_and_is_not_inherited(crash_file: int) -> None:
    assert os.fstat(crash_file).st_nlink == 0
    assert not os.get_inheritable(crash_file)


def test_a_crash_file_is_read_from_its_beginning(crash_file: int) -> None:
    os.write(crash_file, "Fatal: ü".encode())

    assert system.read_crash_file(crash_file) == "Fatal: ü"
    assert system.read_crash_file(crash_file) == "Fatal: ü"


def test_of_a_large_crash_file_the_end_is_read(crash_file: int) -> None:
    os.write(crash_file, b"a" * 100 + b"b" * 10)

    assert system.read_crash_file(crash_file, limit=10) == "b" * 10


def test_bytes_that_are_no_text_are_read_all_the_same(crash_file: int) -> None:
    os.write(crash_file, b"\xff\xfe")

    assert system.read_crash_file(crash_file) == "\ufffd\ufffd"


def test_the_peer_s_uid_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = socket.socketpair()
    with one, two:
        assert system.peer_uid(one) == os.getuid()
        monkeypatch.delattr(socket, "SO_PEERCRED")
        assert system.peer_uid(one) is None


# ── CUDA ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_initialized", [True, False])
def test_torch_is_asked_whether_cuda_is_initialised(
    is_initialized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(is_initialized=lambda: is_initialized)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)

    assert system.uses_cuda() is is_initialized


@pytest.mark.parametrize("torch", [types.ModuleType("torch"), None], ids=["without cuda", "none"])
def test_without_cuda_there_is_nothing_to_ask(
    torch: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)

    assert system.uses_cuda() is False


# ── sockets ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not system.IS_LINUX, reason="only Linux has names in no file system")
def test_a_socket_whose_name_is_in_no_file_system_is_told_without_its_nuls() -> None:
    # As CUDA's driver names one of its own.
    name = f"isolated-tasks-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(f"\0{name}\0")

        assert system.sockets()[os.fstat(one.fileno()).st_ino] == f"@{name}@"
