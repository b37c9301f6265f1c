"""A program: a network with two machines, and a process on each. For tests of `harness.network`.

    python -m harness.networked FOLDER

prints the pids of all that it has started, and stays until it is killed.
"""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from harness.network import Network


def main(folder: str) -> None:
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network({}))
        for name in ("alpha", "beta"):
            machine = stack.enter_context(network.machine(name, folder=Path(folder)))
            command = [*machine.enter, "sh", "-c", "sleep 1000 & exec sleep 1000"]
            stack.enter_context(subprocess.Popen(command, start_new_session=True))
            while len(machine.processes()) < 2:
                pass
        print(*(one.pid for one in psutil.Process().children(recursive=True)), flush=True)
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
