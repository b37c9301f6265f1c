"""``python -m harness.owner MAILBOX ENDING``: a main process with a forkserver.

It reports the pid of the forkserver and the directory of the socket; then it does what ENDING says:

call     wait for a body that hangs
daemon   wait for one that has left a daemon, with a child in another session
preload  wait for a preload that hangs
fork     have a copy stop what is not the copy's
exit     leave without a word
"""

import os
import sys
import threading

from harness import bodies
from harness.processes import PATIENCE, Slot
from isolated_tasks.process.launcher import Launcher, Plan


def main(mailbox: str, ending: str) -> None:
    if ending == "preload":
        os.environ["HANG_IN_PRELOAD"] = mailbox
    launcher = Launcher(Plan(preload=["harness.bodies", "harness.hanging"]))
    launcher.start()
    bodies.report(mailbox, *launcher.pids(), os.path.dirname(launcher.address))
    if ending == "preload":
        threading.Event().wait()
    launcher.wait_loaded(PATIENCE)
    if ending == "call":
        Slot(launcher.address).run(bodies.hang, mailbox, "asleep")
    if ending == "daemon":
        Slot(launcher.address).run(bodies.leave_behind, mailbox, "as a daemon", "waits")
    if ending == "fork":
        copy = os.fork()
        if copy == 0:
            launcher.check()
            launcher.stop()
            bodies.report(mailbox, "copy stopped")
            os._exit(0)
        os.waitpid(copy, 0)
        bodies.report(mailbox, "original calls", Slot(launcher.address).run(os.getppid))


if __name__ == "__main__":
    main(*sys.argv[1:])
