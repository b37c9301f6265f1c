"""``python -m harness.cut_short ADDRESS START_METHOD COUNT TRACES``: requesters killed too early.

Each asks for a child whose body leaves a line in TRACES and stays. They are killed at moments that
are spread from before the request to after the body has begun. At the end all are gone.
"""

import os
import signal
import sys
import time
from typing import get_args

from harness import faulty
from isolated_tasks.process import pickling
from isolated_tasks.process.options import ProcessOptions, StartMethod
from isolated_tasks.process.supervisor import Supervisor


def main(address: str, start_method: str, count: str, traces: str) -> None:
    (method,) = (one for one in get_args(StartMethod) if one == start_method)
    options = ProcessOptions("test", method)
    began = time.monotonic()
    supervisor = Supervisor(address, options)
    supervisor.call(pickling.dumps((os.getpid, (), {})))
    seconds = time.monotonic() - began
    supervisor.close()
    for number in range(int(count)):
        _kill_one(address, options, traces, after=2 * seconds * number / int(count))


def _kill_one(address: str, options: ProcessOptions, traces: str, *, after: float) -> None:
    pid = os.fork()
    if pid == 0:
        supervisor = Supervisor(address, options)
        supervisor.call(pickling.dumps((faulty.begin_and_stay, (traces,), {})))
        os._exit(1)
    # Not to wait for something: this is the moment.
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


if __name__ == "__main__":
    main(*sys.argv[1:])
