"""``python -m harness.spares ADDRESS MAILBOX``: a requester that has a spare child, and waits."""

import os
import signal
import sys

from harness import bodies
from harness.processes import Slot


def main(address: str, mailbox: str) -> None:
    slot = Slot(address, spares=1)
    for _ in range(2):
        slot.run(os.getpid)
    bodies.report(mailbox, os.getpid())
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
