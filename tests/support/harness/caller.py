"""``python -m harness.caller ADDRESS WHAT …``: a process that makes one call, whatever comes of it.

argument WHEN HOW      the argument is a `faulty.Trap`
result WHEN HOW        the result is one
large MAILBOX FIFO N   the result has so many bytes, once there is a word; the length is printed

With ``--spawn`` at the end the child is a fresh interpreter.
"""

import sys

from harness import bodies, faulty
from harness.processes import Slot


def main(address: str, what: str, *arguments: str) -> None:
    start_method = "forkserver"
    if arguments[-1].startswith("--"):
        *arguments, option = arguments  # type: ignore[assignment]
        start_method = option.removeprefix("--")
    slot = Slot(address, start_method=start_method)
    if what == "large":
        mailbox, fifo, size = arguments
        print(len(slot.run(faulty.return_much_later, mailbox, fifo, int(size))))
    else:
        when, how = arguments
        if what == "argument":
            slot.run(bodies.echo, faulty.Trap(when, how))
        else:
            slot.run(faulty.return_trap, when, how)
    slot.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
