"""``python -m harness.greenlets LIBRARY ADDRESS FOLDER``: a caller that goes in its call's middle.

LIBRARY is gevent or eventlet, whose greenlet is killed; or it is threads, and the main thread ends
while a daemon calls. Prints what it has seen, as JSON.
"""

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(library: str, address: str, folder: str) -> None:
    if library == "gevent":
        import gevent.monkey

        gevent.monkey.patch_all()
        _lose_the_caller(address, folder, gevent.spawn)
    elif library == "eventlet":
        import warnings

        warnings.simplefilter("ignore", DeprecationWarning)
        import eventlet

        eventlet.monkey_patch()
        _lose_the_caller(address, folder, eventlet.spawn)
    else:
        _end_the_process(address, folder)


def _lose_the_caller(address: str, folder: str, spawn: Callable[..., Any]) -> None:
    from harness import bodies
    from harness.processes import Mailbox, Slot

    mailbox = Mailbox(Path(folder))
    slot = Slot(address, slots=2)
    assert slot.run(abs, -1) == 1
    slot.close()
    before = _settled()
    ended: list[str] = []

    def call() -> None:
        try:
            slot.run(bodies.hang, mailbox.path, "stuck in C")
        except BaseException as exc:
            ended.append(type(exc).__name__)

    caller = spawn(call)
    pids = mailbox.read()
    # Another one calls meanwhile, and is none the worse for it.
    assert slot.run(abs, -1) == 1
    caller.kill()
    following = slot.run(abs, -1)
    slot.close()
    more = sorted((_settled() - before).elements())
    seen = {"pids": pids, "ended": ended, "next": following, "more": more}
    print(json.dumps(seen), flush=True)


def _settled() -> "Counter[str]":
    """What is open, by kind. An event loop closes what it has watched a round later."""
    from harness import bodies

    for _ in range(10):
        time.sleep(0.001)
    return Counter(target.split(":")[0] for target in bodies.descriptors().values())


def _end_the_process(address: str, folder: str) -> None:
    from harness import bodies
    from harness.processes import Mailbox, Slot

    mailbox = Mailbox(Path(folder))
    arguments = (bodies.hang, mailbox.path, "stuck in C")
    threading.Thread(target=Slot(address).run, args=arguments, daemon=True).start()
    print(json.dumps({"pids": mailbox.read()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
