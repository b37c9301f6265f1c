"""``python -m harness.requester ADDRESS MAILBOX HOW``: waits for a child that hangs.

With ``--copy`` at the end it forks before that; the copy reports its pid and stays.
"""

import os
import signal
import sys

from harness import bodies
from isolated_tasks.process import pickling
from isolated_tasks.process.options import ProcessOptions
from isolated_tasks.process.supervisor import Supervisor


def main(address: str, mailbox: str, how: str, *options: str) -> None:
    supervisor = Supervisor(address, ProcessOptions("test"))
    if "--copy" in options and os.fork() == 0:
        bodies.report(mailbox, os.getpid())
        signal.pause()
    supervisor.call(pickling.dumps((bodies.hang, (mailbox, how), {})))


if __name__ == "__main__":
    main(*sys.argv[1:])
