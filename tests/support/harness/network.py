"""Machines in a network of their own, as namespaces of the kernel make them.

    with Network({5672: ("127.0.0.1", 5672)}) as network:
        with network.machine("alpha", folder=tmp_path) as alpha:
            workplace.start("plain", machine=alpha, broker="amqp://192.0.2.1:5672//")

A machine has a host name, an address, processes, a temporary folder and shared memory of its own;
what is below its mount points, Python and the tests, it shares with this one. The switch stands in
a namespace of its own too: this machine's network is left as it is, and nothing has a name that two
runs could both want. Each namespace lives as long as a process in it whose input is a pipe of ours,
so all of it is gone with this process, in whatever way that goes.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from harness.leaks import SHARED_MEMORY

#: Of the switch, where the servers are. The block is for documentation (RFC 5737): nobody's own.
ADDRESS = "192.0.2.1"

DEFAULT_PORTS = {"amqp": 5672, "redis": 6379}

#: The temporary folder of each machine: one that any system has, and that no test uses here.
TEMPORARY = Path("/var/tmp")

#: All that a machine has for itself. ``--mount-proc`` shows it its own processes.
_OF_ITS_OWN = ("--net", "--uts", "--ipc", "--cgroup", "--mount", "--pid", "--fork", "--mount-proc")

#: The first process of a machine: sets it up, and stays until its input ends; then the kernel kills
#: all the others (pid_namespaces(7)). It has to reap orphans: ignoring SIGCHLD does so (wait(2)).
_INIT = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$2"
ip link set lo up
echo ready
exec env --ignore-signal=CHLD cat
"""

#: What all this needs, tried in a namespace that is gone at once.
_PROBE = """
set -e
hostname probe
mount -t tmpfs tmpfs /dev/shm
ip link add veth-a type veth peer name veth-b
ip link add switch type bridge
"""


def skip_without_namespaces() -> None:
    """Skip the test where no machines can be made."""
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    for program in ("ip", "unshare", "nsenter", "setpriv"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no program {program!r} (packages iproute2, util-linux)")
    probe = subprocess.run(
        ["unshare", *_OF_ITS_OWN, "sh", "-c", _PROBE], capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"no namespaces, veth or bridge here: {probe.stderr.strip()}")


class _Holder:
    """A process that says ``ready``, and ends with its input."""

    def __init__(self, command: Sequence[str], *, cwd: Path | None = None) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.pid = self._process.pid
        if self._process.stdout.readline() != "ready\n":
            why = self._process.stderr.read()
            self.close()
            raise RuntimeError(f"{command} does not start: {why}")

    def close(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


class Network:
    """A switch, behind which are servers.

    Args:
        servers: host and port, as this machine knows it, by the port that machines reach it at.
    """

    def __init__(self, servers: Mapping[int, tuple[str, int]]) -> None:
        self._servers = servers
        self._machines = 0
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Network":
        with contextlib.ExitStack() as stack:
            self._switch = _Holder(["unshare", "--net", "sh", "-c", "echo ready; exec cat"])
            stack.callback(self._switch.close)
            self.ip("link", "add", "switch", "type", "bridge")
            self.ip("address", "add", f"{ADDRESS}/24", "dev", "switch")
            self.ip("link", "set", "switch", "up")
            services = [f"{port}={host}:{at}" for port, (host, at) in self._servers.items()]
            module = [sys.executable, "-m", "harness.forwarder"]
            stack.callback(_Holder([*module, str(self._switch.pid), ADDRESS, *services]).close)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def ip(self, *arguments: str) -> str:
        """Run ``ip`` at the switch."""
        command = ["nsenter", "--target", str(self._switch.pid), "--net", "ip", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout

    def machine(self, name: str, *, folder: Path) -> "Machine":
        """A machine with this host name; see `Machine`."""
        self._machines += 1
        return Machine(self, name, f"192.0.2.{10 + self._machines}", folder)


class Machine:
    """One machine, from its start to its end, which is that of the block or `cut_power`.

    Args:
        network: where it is plugged in.
        name: its host name.
        address: that of its one interface.
        folder: the working directory of its programs, shared with this machine.
    """

    def __init__(self, network: Network, name: str, address: str, folder: Path) -> None:
        self.name = name
        self.address = address
        self._network = network
        command = ["unshare", *_OF_ITS_OWN, "--kill-child"]
        command += ["sh", "-c", _INIT, "init", name, str(TEMPORARY)]
        self._holder = _Holder(command, cwd=folder)
        #: Its first process.
        self.init = psutil.Process(wait_for_child(self._holder.pid))
        self._processes = os.readlink(f"/proc/{self.init.pid}/ns/pid")
        peer = ("peer", "name", "eth0", "netns", str(self.init.pid))
        network.ip("link", "add", name, "type", "veth", *peer)
        network.ip("link", "set", name, "master", "switch", "up")
        self.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.close()

    @property
    def enter(self) -> list[str]:
        """What a command is to be preceded by. The program is then the one child of that process.

        The working directory is the folder.
        """
        return ["nsenter", "--target", str(self.init.pid), "--all", "--wd"]

    def run(self, *command: str) -> str:
        """Run a command there, and return what it has printed."""
        return subprocess.run(
            [*self.enter, *command], check=True, capture_output=True, text=True
        ).stdout

    def unplug(self) -> None:
        """Take it off the switch. Nobody is told: it is as if the other side were slow."""
        self._network.ip("link", "set", self.name, "down")

    def plug_in(self) -> None:
        """Connect it again."""
        self._network.ip("link", "set", self.name, "up")

    def cut_power(self) -> None:
        """Kill all of its processes at once. No other machine is told, by its kernel or by them."""
        self.unplug()
        self.init.kill()
        self._holder.close()
        # Its end of the cable goes too. Else the kernel keeps the namespace for minutes, until it
        # has given up telling the servers that connections are closed.
        self._network.ip("link", "delete", self.name)

    def processes(self) -> list[psutil.Process]:
        """All that run on it, zombies too, without the first one."""
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if os.readlink(f"/proc/{pid}/ns/pid") == self._processes and pid != self.init.pid:
                    found.append(psutil.Process(pid))
        return found

    def files(self) -> list[Path]:
        """All that lies in its temporary folder and in its /dev/shm."""
        root = Path(f"/proc/{self.init.pid}/root")
        folders = [root / str(folder)[1:] for folder in (TEMPORARY, SHARED_MEMORY)]
        return [path for folder in folders for path in sorted(folder.rglob("*"))]


def wait_for_child(pid: int) -> int:
    """The one child of ``unshare --fork`` or ``nsenter``, which forks when it has entered."""
    tick = threading.Event()
    process = psutil.Process(pid)
    while not (children := process.children()):
        tick.wait(0.002)
    child: int = children[0].pid
    return child


def in_network_of_its_own(
    *command: str, folder: Path, environ: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run a command as the first of a network that it may do with as it likes, as of /run.

    Whatever it leaves goes with it, and it goes with this process.
    """
    setup = 'mount -t tmpfs tmpfs /run && ip link set lo up && exec "$@"'
    unshare = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    return subprocess.run(
        ["setpriv", "--pdeathsig", "KILL", *unshare, "sh", "-c", setup, "sh", *command],
        cwd=folder,
        env={**os.environ, **environ, "NETWORK_OF_ITS_OWN": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def server_of(url: str) -> tuple[str, int]:
    """Host and port of a service, as `Network` wants them."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    return parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme]


def seen_from_machines(url: str) -> str:
    """The URL by which machines reach the same service, at the same port."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    _, port = server_of(url)
    return parts._replace(netloc=f"{user}{at}{ADDRESS}:{port}").geturl()
