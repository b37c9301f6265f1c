"""What becomes of a message when something dies that its body runs in or below.

What a lost child alone does is in test_after_failure.py and tests/limits; this is about the slot,
the worker, and time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from billiard.exceptions import WorkerLostError

from harness.processes import Mailbox, Word, survivors
from harness.worker import Worker

StartWorker = Callable[..., Worker]

TIMEOUT = 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "begun"


def begun(path: Path) -> list[str]:
    """As which delivery bodies have begun."""
    return path.read_text().split() if path.exists() else []


def test_a_message_that_was_acknowledged_early_goes_with_its_worker(
    worker: StartWorker, broker: str, path: Path, mailbox: Mailbox, word: Word
) -> None:
    first = worker("redelivery", broker=broker)
    first.call("redelivery.acknowledged_early", str(path), mailbox.path, word.path)
    pids = mailbox.read()

    first.kill()
    assert survivors(pids) == set()

    # Behind it, if it had come back.
    second = worker("redelivery", broker=broker)
    second.call("redelivery.slot_pid").get(timeout=TIMEOUT)
    assert begun(path) == ["False"]


def test_a_message_that_was_not_acknowledged_comes_again_when_its_worker_dies(
    worker: StartWorker, path: Path, mailbox: Mailbox, word: Word
) -> None:
    # RabbitMQ: it sees the connection end. Redis does not look, see the last test here.
    first = worker("redelivery", broker="amqp")
    result = first.call("redelivery.acknowledged_late", str(path), mailbox.path, word.path)
    pids = mailbox.read()

    first.kill()
    assert survivors(pids) == set()

    worker("redelivery", broker="amqp")
    assert result.get(timeout=TIMEOUT) == "the second time"
    assert begun(path) == ["False", "True"]


@pytest.mark.parametrize("task", ["acknowledged_late", "given_back"])
def test_what_a_killed_pool_process_does_to_a_message_is_celerys_own(
    worker: StartWorker, path: Path, mailbox: Mailbox, word: Word, task: str
) -> None:
    running = worker("redelivery")
    slot = running.call("redelivery.slot_pid").get(timeout=TIMEOUT)
    result = running.call(f"redelivery.{task}", str(path), mailbox.path, word.path)
    pids = mailbox.read()

    psutil.Process(slot).kill()

    assert survivors(pids) == set()
    if task == "given_back":
        assert result.get(timeout=TIMEOUT) == "the second time"
        assert begun(path) == ["False", "True"]
    else:
        with pytest.raises(WorkerLostError):
            result.get(timeout=TIMEOUT)
        running.call("redelivery.slot_pid").get(timeout=TIMEOUT)
        assert begun(path) == ["False"]


#: Kombu's keys in Redis: others use this server, and wait for longer.
KEYS = ("unacked_key", "unacked_index_key", "unacked_mutex_key")


def test_redis_gives_a_message_to_another_when_its_visibility_timeout_is_over(
    workplace: Any, path: Path, mailbox: Mailbox, word: Word
) -> None:
    options = {key: f"{workplace.name}-{key}" for key in KEYS}
    conf = {
        "broker_transport_options": {"visibility_timeout": 0.5, **options},
        # Or the first worker takes it again, and has it wait behind the first body.
        "worker_prefetch_multiplier": 1,
    }
    first = workplace.start("redelivery", conf=conf)
    result = first.call("redelivery.acknowledged_late", str(path), mailbox.path, word.path)
    (pid,) = mailbox.read()

    # Kombu looks for such messages when a worker connects, and then every hundred seconds.
    workplace.start("redelivery", conf=conf)

    # Another delivery of the message has its result, while the first body still runs.
    assert result.get(timeout=TIMEOUT) == "the second time"
    assert survivors([pid], timeout=0) == {pid}
    assert begun(path) == ["False", "True"]

    word.give("the first time")
    first.wait_for_log(rf"{result.id}\] succeeded in .*'the first time'", TIMEOUT)
