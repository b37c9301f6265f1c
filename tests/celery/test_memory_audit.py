"""Plain tasks are measured as they run, and `celery isolated audit` says which to isolate."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harness.worker import Worker
from harness.workplace import SUPPORT, Workplace

StartWorker = Callable[..., Worker]

MIB = 1 << 20
TIMEOUT = 60

#: More than enough for a verdict.
CALLS = 14

KINDS = {
    "audited.clean": "fine",
    "audited.peaks_and_frees": "fine",
    "audited.leaks": "grows",
    "audited.fragments": "keeps its peak",
}


@dataclass
class Command:
    """`celery isolated audit`, as it runs."""

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)
    listens: threading.Event = field(default_factory=threading.Event)

    def follow(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if line.startswith("listening"):
                self.listens.set()
        self.listens.set()

    def wait_until_it_listens(self) -> None:
        assert self.listens.wait(TIMEOUT)
        assert self.process.poll() is None, "".join(self.said)

    def finish(self) -> tuple[int, str]:
        """Its exit code, and what it has printed."""
        assert self.process.stdout is not None
        code = self.process.wait(TIMEOUT)
        return code, self.process.stdout.read()

    def tasks(self) -> dict[str, Any]:
        """What its JSON says of each task."""
        _, printed = self.finish()
        return {task["task"]: task for task in json.loads(printed)["tasks"]}


Audit = Callable[..., Command]


@pytest.fixture
def audit(workplace: Workplace, apps: Path) -> Iterator[Audit]:
    """A function that runs the command, and waits until it listens."""
    running: list[tuple[Command, threading.Thread]] = []

    def start(
        *arguments: str,
        module: str = "audited",
        broker: str = "redis",
        listening: bool = True,
        stdout: int = subprocess.PIPE,
    ) -> Command:
        settings = workplace.settings(broker=broker)
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", module, "isolated", "audit", *arguments],
            env={
                **os.environ,
                **settings.environ(),
                "PYTHONPATH": os.pathsep.join(map(str, [apps, SUPPORT])),
                "COLUMNS": "120",
            },
            cwd=workplace.folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        command = Command(process)
        follower = threading.Thread(target=command.follow)
        follower.start()
        running.append((command, follower))
        if listening:
            command.wait_until_it_listens()
        return command

    yield start
    for command, follower in running:
        command.process.kill()
        command.process.wait()
        follower.join(10)
        for pipe in (command.process.stdout, command.process.stderr):
            if pipe is not None:
                pipe.close()


def run(worker: Worker, names: Sequence[str], *, calls: int = CALLS, queue: str = "") -> None:
    """Call these tasks in turns, and wait for all of them."""
    results = [
        worker.app.send_task(name, queue=queue or None) for _ in range(calls) for name in names
    ]
    for result in results:
        result.get(timeout=TIMEOUT, propagate=False)


def named(*names: str) -> list[str]:
    return [part for name in names for part in ("--task", name)]


# ── verdicts ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pool", ["prefork", "prefork-spawn", "solo"])
def test_each_kind_of_task_gets_its_verdict(worker: StartWorker, audit: Audit, pool: str) -> None:
    running = worker("audited", pool=pool, args=["--memory-audit"])
    command = audit("--json", "--calls", str(CALLS), *named(*KINDS))

    run(running, list(KINDS))

    tasks = command.tasks()
    assert {name: task["verdict"] for name, task in tasks.items()} == KINDS
    leak, peak = tasks["audited.leaks"], tasks["audited.peaks_and_frees"]
    assert leak["kept_per_call_bytes"] == pytest.approx(MIB, rel=0.05)
    assert leak["action"].startswith("isolate")
    assert peak["peak_bytes"] == pytest.approx(60 * MIB, rel=0.05)
    assert (peak["action"], peak["batch_size"]) == ("", None)
    # Not that of another task.
    assert leak["peak_bytes"] < 8 * MIB
    # Other tasks may have left room for some of its 40 MB.
    assert 20 * MIB < tasks["audited.fragments"]["idle_bytes"] < 60 * MIB
    assert all(task["calls"] == CALLS for task in tasks.values())


def test_events_come_over_amqp_too(worker: StartWorker, audit: Audit) -> None:
    running = worker("audited", broker="amqp", args=["--memory-audit"])
    command = audit("--json", "--calls", str(CALLS), *named("audited.leaks"), broker="amqp")

    run(running, ["audited.leaks"])

    assert command.tasks()["audited.leaks"]["verdict"] == "grows"


def test_results_and_errors_are_not_taken_for_what_a_task_keeps(
    worker: StartWorker, audit: Audit
) -> None:
    running = worker("audited", args=["--memory-audit"])
    names = ["audited.returns_much", "audited.fails"]
    command = audit("--json", "--calls", str(CALLS), *named(*names))

    run(running, names)

    assert {task["verdict"] for task in command.tasks().values()} == {"fine"}


def test_who_listens_later_learns_what_came_before(worker: StartWorker, audit: Audit) -> None:
    running = worker("audited", args=["--memory-audit"])
    # Only the first call adds to the process, and nobody hears of it.
    run(running, ["audited.fragments"], calls=3)
    command = audit("--json", "--calls", str(CALLS), *named("audited.fragments"))

    run(running, ["audited.fragments"])

    assert command.tasks()["audited.fragments"]["verdict"] == "keeps its peak"


def test_processes_that_are_replaced_make_one_verdict(worker: StartWorker, audit: Audit) -> None:
    running = worker("audited", args=["--memory-audit", "--max-tasks-per-child", "7"])
    command = audit("--json", "--calls", "21", *named("audited.leaks"))

    run(running, ["audited.leaks"], calls=21)

    (task,) = command.tasks().values()
    assert (task["verdict"], task["processes"]) == ("grows", 3)


# ── what is measured ────────────────────────────────────────────────────────────────────────────


def test_isolated_tasks_and_tasks_within_a_call_are_left_out(
    worker: StartWorker, audit: Audit
) -> None:
    running = worker("audited", args=["--memory-audit"])
    audited = ["audited.calls_another_in_place", "audited.where"]
    command = audit("--json", "--calls", "2", *named(*audited))

    # What is not to be heard of comes first.
    run(running, ["audited.isolated", *audited], calls=2)

    tasks = command.tasks()
    assert set(tasks) == {"audited.calls_another_in_place", "audited.where"}
    outer = tasks["audited.calls_another_in_place"]
    # Its own peak comes after that of the other.
    assert outer["calls"] == 2
    assert outer["peak_bytes"] == pytest.approx(20 * MIB, rel=0.1)


@pytest.mark.parametrize(
    ("conf", "args"),
    [({"isolated_memory_audit": True}, []), ({}, ["--", "isolated.memory_audit=yes"])],
    ids=["setting", "command line"],
)
def test_the_setting_asks_for_it_too(
    worker: StartWorker, audit: Audit, conf: dict[str, Any], args: list[str]
) -> None:
    running = worker("audited", conf=conf, args=args)
    command = audit("--json", "--calls", "1", *named("audited.clean"))

    run(running, ["audited.clean"], calls=1)

    assert command.tasks()["audited.clean"]["calls"] == 1


def test_an_app_that_knows_nothing_of_this_package_can_be_audited(
    worker: StartWorker, audit: Audit
) -> None:
    running = worker("plain", args=["--memory-audit"])
    command = audit("--json", "--calls", "1", *named("plain.add"), module="plain")

    assert running.call("plain.add", 1, 2).get(timeout=TIMEOUT) == 3

    assert command.tasks()["plain.add"]["calls"] == 1


def test_a_program_that_starts_a_worker_can_have_it_audited(
    worker: StartWorker, audit: Audit
) -> None:
    running = worker("audited_program.py", pool="solo")
    command = audit("--json", "--calls", "1", *named("program.add"))

    assert running.call("program.add", 1, 2).get(timeout=TIMEOUT) == 3

    assert command.tasks()["program.add"]["calls"] == 1


def test_nothing_is_measured_where_nobody_asked(worker: StartWorker, audit: Audit) -> None:
    running = worker("audited")
    command = audit("--json")

    run(running, ["audited.clean"], calls=1)
    command.process.send_signal(signal.SIGTERM)

    assert command.tasks() == {}
    assert any("no worker with --memory-audit" in line for line in command.said)
    assert "memory audit" not in running.log()


@pytest.mark.parametrize("pool", ["threads", "gevent", "eventlet"])
def test_where_tasks_share_a_process_they_are_said_to_be_unmeasurable(
    worker: StartWorker, audit: Audit, pool: str
) -> None:
    running = worker("audited", pool=pool, concurrency=2, args=["--memory-audit"])
    arguments = ["--calls", "1", "--fail-on", "grows", *named("audited.leaks")]
    command = audit("--json", *arguments)
    table = audit(*arguments)

    run(running, ["audited.leaks"], calls=1)

    code, printed = command.finish()
    (task,) = json.loads(printed)["tasks"]
    assert (code, task["verdict"], task["calls"]) == (3, "unmeasurable", 0)
    assert "several tasks in one process" in task["because"]
    assert "unmeasurable" in table.finish()[1]
    assert re.search(r"WARNING.*memory audit: plain tasks are unmeasurable", running.log())


def test_a_setting_that_is_no_bool_is_one_clear_error(worker: StartWorker) -> None:
    running = worker("audited", conf={"isolated_memory_audit": "maybe"}, ready=False)

    running.wait_for_log("OptionError: app.conf: isolated_memory_audit='maybe': must be True or")
    assert running.process.wait(TIMEOUT) != 0


# ── the command ─────────────────────────────────────────────────────────────────────────────────


def test_two_workers_are_heard_at_once(
    worker: StartWorker, workplace: Workplace, audit: Audit
) -> None:
    queues = [f"{workplace.name}-{number}" for number in (1, 2)]
    args = [["--memory-audit", "-Q", queue] for queue in queues]
    workers = [worker("audited", args=args[0]), worker("audited", pool="solo", args=args[1])]
    names = ["audited.clean", "audited.leaks"]
    arguments = ["--calls", str(2 * CALLS), *named(*names)]
    command, table = audit("--json", *arguments), audit(*arguments)

    for one, queue in zip(workers, queues, strict=True):
        run(one, names, queue=queue)

    tasks = command.tasks()
    assert {name: task["verdict"] for name, task in tasks.items()} == {
        "audited.clean": "fine",
        "audited.leaks": "grows",
    }
    for task in tasks.values():
        assert task["workers"] == sorted(one.name for one in workers)
        assert (task["calls"], task["processes"]) == (2 * CALLS, 2)
    code, printed = table.finish()
    assert code == 0
    assert re.search(r"audited\.leaks\s+│\s+28\s+│.*│\s+1\.0 MiB\s+│\s+grows", printed)
    assert re.search(r"audited\.leaks: grows → isolate.*\n +each of", printed)
    assert re.search(r"audited\.clean: fine\n +of a peak", printed)


def test_a_verdict_can_fail_a_test(worker: StartWorker, audit: Audit) -> None:
    running = worker("audited", args=["--memory-audit"])
    names = ["audited.clean", "audited.fragments", "audited.leaks"]
    calls = ["--json", "--calls", str(CALLS)]
    commands = {
        code: audit(*calls, "--fail-on", verdict, *named(*tasks))
        for code, verdict, tasks in [
            ("leak", "grows", names),
            ("no leak", "grows", names[:2]),
            ("no leak, but a peak", "keeps-its-peak", names[:2]),
            ("clean", "keeps-its-peak", names[:1]),
        ]
    }

    run(running, names)

    codes = {name: command.finish()[0] for name, command in commands.items()}
    assert codes == {"leak": 1, "no leak": 0, "no leak, but a peak": 1, "clean": 0}


def test_to_fail_on_what_nobody_could_judge_is_a_failure_of_its_own(
    worker: StartWorker, audit: Audit
) -> None:
    running = worker("audited", args=["--memory-audit"])
    command = audit("--json", "--fail-on", "grows", "--calls", "2", *named("audited.leaks"))

    run(running, ["audited.leaks"], calls=2)

    code, printed = command.finish()
    assert (code, json.loads(printed)["tasks"][0]["verdict"]) == (3, "too few calls")


def test_in_a_terminal_the_table_is_there_meanwhile(worker: StartWorker, audit: Audit) -> None:
    running = worker("audited", args=["--memory-audit"])
    controller, terminal = pty.openpty()
    command = audit("--task", "audited.clean", stdout=terminal)
    os.close(terminal)

    run(running, ["audited.clean"], calls=1)
    shown = read_until(controller, rb"audited\.clean\W+1\W.*too few calls")
    command.process.send_signal(signal.SIGINT)
    shown = read_until(controller, rb"5 are needed")

    assert command.process.wait(TIMEOUT) == 0, shown
    os.close(controller)


def read_until(descriptor: int, pattern: bytes) -> bytes:
    """What a terminal shows until it has shown this."""
    shown = b""
    while not re.search(pattern, shown):
        shown += os.read(descriptor, 4096)
    return shown


def test_it_ends_after_a_time(worker: StartWorker, audit: Audit) -> None:
    command = audit("--json", "--seconds", "0.5", listening=False)

    code, printed = command.finish()

    assert code == 0
    assert json.loads(printed)["seconds"] >= 0.5


def test_a_broker_that_does_not_answer_is_one_clear_error(workplace: Workplace, apps: Path) -> None:
    settings = workplace.settings(broker="redis://127.0.0.1:1/0", backend="cache+memory://")
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "audited", "isolated", "audit", "--json"],
        env={
            **os.environ,
            **settings.environ(),
            "PYTHONPATH": os.pathsep.join(map(str, [apps, SUPPORT])),
        },
        cwd=workplace.folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )

    assert done.returncode == os.EX_UNAVAILABLE
    assert "the broker does not answer" in done.stderr
    assert "Traceback" not in done.stderr
