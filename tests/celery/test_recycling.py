"""Pool processes come and go, pools grow and shrink, and batch processes are there meanwhile.

That no process and no temporary file is left is checked by the fixtures, after each test.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.processes import Mailbox, Word, survivors
from harness.worker import Worker
from harness.workplace import Workplace

StartWorker = Callable[..., Worker]

TIMEOUT = 30


def ids(running: Worker, task: str = "run_in_batch") -> dict[str, int]:
    value: dict[str, int] = running.call(f"isolated.{task}", "ids").get(timeout=TIMEOUT)
    return value


def three_at_a_time(running: Worker, mailbox: Mailbox, folder: Path) -> list[int]:
    """The processes of three bodies that wait for each other."""
    words = [Word(folder) for _ in range(3)]
    results = [
        running.call("isolated.run_in_batch", "report_and_wait", mailbox.path, word.path)
        for word in words
    ]
    pids = [mailbox.read()[0] for _ in results]
    assert survivors(pids, timeout=0) == set(pids)
    for word in words:
        word.give("well")
    assert [result.get(timeout=TIMEOUT)[1] for result in results] == ["well"] * 3
    return pids


def slot(running: Worker) -> int:
    return ids(running, "plain_run")["pid"]


@pytest.mark.parametrize(
    "conf",
    [{"worker_max_tasks_per_child": 2}, {"worker_max_memory_per_child": 1}],
    ids=lambda conf: next(iter(conf)),
)
def test_a_pool_process_is_replaced_while_its_batch_process_waits(
    worker: StartWorker, conf: dict[str, Any]
) -> None:
    running = worker("isolated", conf={**conf, "isolated_batch_idle_timeout": 1000})

    children = [ids(running)["pid"] for _ in range(6)]

    # Each pool process has had one of its own, and has taken it along.
    assert len(set(children)) == (3 if "worker_max_tasks_per_child" in conf else 6)
    assert survivors(children[:-1]) == set()


def test_a_pool_restart_takes_batch_processes_along(worker: StartWorker) -> None:
    running = worker(
        "isolated", conf={"worker_pool_restarts": True, "isolated_batch_idle_timeout": 1000}
    )
    before, old_slot = ids(running)["pid"], slot(running)

    (reply,) = running.app.control.broadcast("pool_restart", reply=True, limit=1, timeout=TIMEOUT)

    assert list(reply.values()) == [{"ok": "reload started"}]
    assert survivors([before, old_slot]) == set()
    after = ids(running)["pid"]
    assert after != before
    assert survivors([after], timeout=0) == {after}


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_a_pool_restart_brings_changed_code_in(
    worker: StartWorker, workplace: Workplace, pool: str
) -> None:
    rules = workplace.folder / "rules.py"
    rules.write_text("ANSWER = 'old'")
    running = worker("changing", pool=pool, conf={"worker_pool_restarts": True})

    def ask() -> tuple[str, int, int]:
        answer, pid, forkserver = running.call("changing.ask").get(timeout=TIMEOUT)
        return answer, pid, forkserver

    before = ask()
    assert before[0] == "old"
    # Of another length: a cached bytecode file is told by time, in seconds, and size.
    rules.write_text("ANSWER = 'the new one'")
    assert ask() == before

    running.app.control.broadcast("pool_restart", reply=True, limit=1, timeout=TIMEOUT)

    after = ask()
    assert after[0] == "the new one"
    assert survivors(before[1:]) == set()
    running.wait_for_log(rf"forkserver pid={before[2]} is replaced: pool_restart")


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_forkserver_that_is_worn_is_replaced(worker: StartWorker, pool: str) -> None:
    running = worker("isolated", pool=pool, conf={"isolated_forkserver_max_calls": 2})
    first = int(running.wait_for_log(r"forkserver pid=(\d+) loaded")[1])

    for _ in range(2):
        running.call("isolated.run", "ids").get(timeout=TIMEOUT)
    running.wait_for_log(rf"forkserver pid={first}, which was replaced, has ended")

    running.wait_for_log(rf"forkserver pid={first} is to be replaced: it has started 2 children")
    assert running.call("isolated.run", "ids").get(timeout=TIMEOUT)["pid"]
    assert survivors([first]) == set()


@pytest.mark.parametrize("pool", ["prefork", "gevent", "eventlet"])
def test_a_pool_grows_and_shrinks(
    worker: StartWorker, mailbox: Mailbox, tmp_path: Path, pool: str
) -> None:
    running = worker("isolated", pool=pool, conf={"isolated_batch_idle_timeout": 1000})
    ids(running)

    running.app.control.pool_grow(2, reply=True, limit=1, timeout=TIMEOUT)
    three_at_a_time(running, mailbox, tmp_path)

    running.app.control.pool_shrink(2, reply=True, limit=1, timeout=TIMEOUT)
    assert ids(running)["pid"]


def test_autoscaling_leaves_no_batch_process_behind(
    worker: StartWorker, mailbox: Mailbox, tmp_path: Path
) -> None:
    running = worker(
        "isolated",
        args=["--autoscale=3,1"],
        conf={"isolated_batch_idle_timeout": 1000},
        env={"AUTOSCALE_KEEPALIVE": "1"},
    )
    pids = three_at_a_time(running, mailbox, tmp_path)

    running.wait_for_log(r"Scaling down \d processes")

    assert len(survivors(pids, timeout=10)) <= 1
    assert ids(running)["pid"]


def test_celery_multi_has_a_forkserver_for_each_worker(workplace: Workplace) -> None:
    settings = workplace.settings(broker="redis", backend="redis", conf={})
    folder = workplace.temporary
    app = workplace.app(settings)
    environment = {
        **os.environ,
        **settings.environ(),
        "TMPDIR": str(folder),
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent / "apps"), str(Path(__file__).parents[1] / "support")]
        ),
    }
    names = ["one@localhost", "two@localhost"]
    files = [f"--pidfile={folder}/%n.pid", f"--logfile={folder}/%n.log"]

    def multi(command: str) -> None:
        subprocess.run(
            [
                *(sys.executable, "-m", "celery", "-A", "isolated", "multi", command, *names),
                *("-P", "prefork", "-c", "1", "-l", "INFO", *files),
            ],
            env=environment,
            check=True,
            capture_output=True,
            timeout=60,
        )

    multi("start")
    try:
        results = [app.send_task("isolated.run_in_batch", ("ids",)) for _ in range(20)]
        values = [result.get(timeout=TIMEOUT) for result in results]
    finally:
        multi("stopwait")

    logs = "".join(path.read_text() for path in folder.glob("*.log"))
    parents = {value["parent"] for value in values}
    assert 1 <= len(parents) <= 2
    assert logs.count(" loaded ") == 2
    assert survivors({*parents, *(value["pid"] for value in values)}) == set()
    for path in folder.glob("*.log"):
        path.unlink()
