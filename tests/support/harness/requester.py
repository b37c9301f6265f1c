"""``python -m harness.requester ADDRESS MAILBOX HOW``: waits for a child that hangs.

With ``--spawn`` at the end the child is a fresh interpreter. With ``--copy`` it forks before that;
the copy reports its pid and stays. With HOW ``told to end`` it calls, as the call ``x``, a body
that says that it was ended, and says so itself.
"""

import os
import signal
import sys

from harness import bodies
from isolated_tasks.process import pickling
from isolated_tasks.process.options import CallOptions, ProcessOptions, StartMethod
from isolated_tasks.process.supervisor import Supervisor


def main(address: str, mailbox: str, how: str, *options: str) -> None:
    start_method: StartMethod = "spawn" if "--spawn" in options else "forkserver"
    supervisor = Supervisor(address, ProcessOptions("test", start_method, term_grace=1000))
    if "--copy" in options and os.fork() == 0:
        bodies.report(mailbox, os.getpid())
        signal.pause()
    if how != "told to end":
        supervisor.call(pickling.dumps((bodies.hang, (mailbox, how), {})))
    try:
        call = pickling.dumps((bodies.wait_and_clean_up, (mailbox,), {}))
        supervisor.call(call, CallOptions("test", call_id="x"))
    except Exception as exc:
        bodies.report(mailbox, type(exc).__name__)


if __name__ == "__main__":
    main(*sys.argv[1:])
