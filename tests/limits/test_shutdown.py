"""The same table where a row ends the worker: each has a worker of its own.

That no process and no temporary file is left is checked by the fixtures, after each test.
"""

import os
import signal
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from harness.processes import Mailbox, Word, survivors, wait_status
from harness.worker import Worker

StartWorker = Callable[..., Worker]

TIMEOUT = 30
BACKENDS = {"redis": "redis", "amqp": "rpc"}

#: What a plain worker exits with, too.
EXIT_CODES = {"SIGTERM": 0, "SIGINT": 1}


@pytest.fixture
def running(worker: StartWorker, combination: tuple[str, str]) -> Worker:
    pool, broker = combination
    return worker(
        "limited",
        pool=pool,
        concurrency=1 if pool == "solo" else 2,
        broker=broker,
        backend=BACKENDS[broker],
    )


def everything(running: Worker) -> set[int]:
    return {process.pid for process in running.tree()}


def pool_processes(running: Worker) -> set[int]:
    """Of prefork; other pools have none."""
    forkserver = int(running.wait_for_log(r"forkserver pid=(\d+) loaded")[1])
    main, *others = running.tree()
    return {one.pid for one in others if one.ppid() == main.pid and one.pid != forkserver}


def left_in_queue(running: Worker) -> int:
    """How many messages the broker would deliver."""
    app = running.app
    with app.connection_for_read() as connection, connection.channel() as channel:
        try:
            queue = channel.queue_declare(app.conf.task_default_queue, passive=True)
        except connection.channel_errors:
            return 0  # an empty list does not exist in Redis
        return int(queue.message_count)


def wake(running: Worker) -> None:
    """Have the main process read what the handler of a signal has noted: see `Worker.stop`."""
    running.app.control.broadcast("ping")


def send_to_main(running: Worker, name: str) -> None:
    running.signal(signal.Signals[name])


def send_to_all(running: Worker, name: str) -> None:
    """As systemd does, by default, and whatever else signals a whole control group.

    Not to Celery's own pool processes: they end on SIGTERM, there and then, whatever they do, and a
    plain task is lost with them as well as an isolated one. (They ignore SIGINT.)
    """
    spared = pool_processes(running)
    # The main process last: with it all others might go.
    for pid in reversed([process.pid for process in running.tree()]):
        if pid not in spared:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[name])


def send_to_group(running: Worker, name: str) -> None:
    """As a terminal does, to the group in its foreground."""
    os.killpg(running.pid, signal.Signals[name])


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    ("send", "name"),
    [
        (send_to_main, "SIGTERM"),
        (send_to_all, "SIGTERM"),
        (send_to_group, "SIGINT"),
    ],
    ids=["SIGTERM", "SIGTERM-all", "SIGINT-group"],
)
def test_a_warm_shutdown_lets_a_body_end_well(
    running: Worker,
    mailbox: Mailbox,
    word: Word,
    send: Callable[[Worker, str], None],
    name: str,
) -> None:
    result = running.call("limited.run", "report_and_wait", mailbox.path, word.path)
    (pid,) = mailbox.read()
    pids = everything(running)
    assert pid in pids

    send(running, name)
    wake(running)
    running.wait_for_log("Warm shutdown")
    assert survivors(pids, timeout=0) == pids
    word.give("well")

    assert result.get(timeout=TIMEOUT) == [pid, "well"]
    assert running.process.wait(timeout=TIMEOUT) == EXIT_CODES[name]
    assert survivors(pids) == set()
    assert "Traceback" not in running.log()


@pytest.mark.fault(34)
@pytest.mark.parametrize("acks", ["early", "late"])
def test_a_cold_shutdown_ends_a_body(
    running: Worker, combination: tuple[str, str], mailbox: Mailbox, acks: str
) -> None:
    pool, _ = combination
    task = {"early": "stay_and_clean_up", "late": "stay_and_clean_up_late"}[acks]
    result = running.call(f"limited.{task}", mailbox.path)
    mailbox.read()
    pids = everything(running)

    running.signal(signal.SIGQUIT)
    wake(running)

    assert mailbox.read() == ["cleaned up"]
    running.process.wait(timeout=TIMEOUT)
    assert survivors(pids) == set()
    assert left_in_queue(running) == (acks == "late")
    # Celery stores RETRY in its signal handler. Where that runs in the hub it cannot wait for the
    # result backend, and neither it nor a message is left of the call, be it plain or isolated.
    cannot_store = pool in ("gevent", "eventlet")
    assert result.state == ("PENDING" if acks == "late" or cannot_store else "RETRY")


@pytest.mark.fault(34)
# Greenlets are not among them: there Celery's own handler for the second one waits in the hub,
# which nobody may, and the worker ends of that.
@pytest.mark.parametrize(
    "combination", [("prefork", "redis"), ("threads", "amqp")], indirect=True, ids="-".join
)
@pytest.mark.parametrize("acks", ["early", "late"])
def test_a_second_interrupt_from_the_terminal_ends_a_body(
    worker: StartWorker, combination: tuple[str, str], mailbox: Mailbox, acks: str
) -> None:
    pool, broker = combination
    running = worker(
        "limited", pool=pool, broker=broker, backend=BACKENDS[broker], loglevel="DEBUG"
    )
    task = {"early": "stay_and_clean_up", "late": "stay_and_clean_up_late"}[acks]
    result = running.call(f"limited.{task}", mailbox.path)
    mailbox.read()
    pids = everything(running)

    send_to_group(running, "SIGINT")
    wake(running)
    # Until it waits for its bodies, and for nothing else: Celery's handler does all it has to do
    # where it is, be that between a question to the broker and its answer, or in a line of the log.
    running.wait_for_log(r"Worker: Stopping Pool\.\.\.")
    wait_status(running.pid, psutil.STATUS_SLEEPING)
    assert survivors(pids, timeout=0) == pids
    assert mailbox.is_empty
    send_to_group(running, "SIGINT")

    assert mailbox.read() == ["cleaned up"]
    assert running.process.wait(timeout=TIMEOUT) == EXIT_CODES["SIGINT"]
    assert survivors(pids) == set()
    assert left_in_queue(running) == (acks == "late")
    assert result.state == ("PENDING" if acks == "late" else "RETRY")
    assert "KeyboardInterrupt" not in running.log()
