"""A worker that several tests share: after each it has to be as it was before.

The app of such a worker has two tasks that run one of `harness.bodies`: `run`, which is isolated,
and `plain_run`, which is not.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from celery.result import AsyncResult

from harness.leaks import descriptors_of
from harness.processes import PATIENCE
from harness.worker import Worker
from harness.workplace import Workplace

#: How long a call may take.
TIMEOUT = 30

#: The result backend that goes with a broker.
BACKENDS = {"redis": "redis", "amqp": "rpc"}

#: Descriptors that a process keeps for a child that has ended, until its slot has the next.
PER_CHILD = 6


@dataclass(frozen=True)
class State:
    """What a worker is made of between two tasks."""

    processes: frozenset[int]
    #: By process.
    descriptors: dict[int, list[str]]
    files: frozenset[Path]


class Combination:
    """A worker of one pool over one broker.

    Args:
        workplace: where it is.
        module: of its app.
        pool: one of POOLS.
        broker: "redis" or "amqp".
        conf: further Celery settings.
        queues: that it takes from beside its own.
    """

    def __init__(
        self,
        workplace: Workplace,
        module: str,
        *,
        pool: str,
        broker: str = "redis",
        conf: Mapping[str, Any] | None = None,
        queues: Sequence[str] = (),
    ) -> None:
        self.pool = pool
        self.broker = broker
        self.slots = 1 if pool == "solo" else 2
        self._module = module
        self._workplace = workplace
        self._fifo = str(workplace.folder / "fifo")
        os.mkfifo(self._fifo)
        workplace.queues.extend(queues)
        self.worker: Worker = workplace.start(
            module,
            pool=pool,
            concurrency=self.slots,
            broker=broker,
            backend=BACKENDS[broker],
            conf=conf,
            args=["-Q", ",".join([workplace.name, *queues])],
        )
        forkserver = int(self.worker.wait_for_log(r"forkserver pid=(\d+) loaded")[1])
        self.pool_processes = frozenset(
            process.pid
            for process in psutil.Process(self.worker.pid).children()
            if process.pid != forkserver
        )
        assert len(self.pool_processes) == (2 if pool == "prefork" else 0)
        self.processes = {self.worker.pid, forkserver, *self.pool_processes}
        self.serve_in_each_slot()
        self.serve_in_each_slot()
        self._descriptors = {pid: len(descriptors_of(pid)) for pid in self.processes}

    def call(self, task: str, *args: Any, **kwargs: Any) -> AsyncResult:
        """Send a task of its app."""
        return self.worker.call(f"{self._module}.{task}", *args, **kwargs)

    def send(self, task: str, *args: Any, **options: Any) -> AsyncResult:
        """Send a task of its app, with options of `apply_async`."""
        return self.worker.app.send_task(f"{self._module}.{task}", args, **options)

    def get(self, task: str, *args: Any, **kwargs: Any) -> Any:
        """Send one, and return its result."""
        return self.call(task, *args, **kwargs).get(timeout=TIMEOUT)

    def serve_in_each_slot(self) -> None:
        """Run an isolated task in each slot, and see that slots are where they were."""
        isolated = self._meet("run") if self.slots == 2 else {self.get("run", "ids")["pid"]}
        assert not isolated & self.processes
        if self.pool == "prefork":
            assert self._meet("plain_run") == self.pool_processes
        else:
            assert self.get("plain_run", "ids")["pid"] == self.worker.pid

    def _meet(self, task: str) -> set[int]:
        """The processes that run two calls at the same time."""
        calls = [self.call(task, "meet", self._fifo, number) for number in (0, 1)]
        return {call.get(timeout=TIMEOUT) for call in calls}

    def state(self) -> State:
        """What it is made of now; zombies too, which somebody has forgotten."""
        below = psutil.Process(self.worker.pid).children(recursive=True)
        return State(
            frozenset(process.pid for process in [*self.worker.tree(), *below]),
            {pid: descriptors_of(pid) for pid in self.processes},
            frozenset(self._workplace.temporary.rglob("*")),
        )

    def settle(self) -> State:
        """The state once all children are gone."""
        return self._wait_for(lambda state: state.processes == self.processes)

    def assert_as_before(self, before: State) -> None:
        """See that each slot serves the next task, and that nothing has stayed of the last ones."""
        self.serve_in_each_slot()
        once = self.settle()
        self.serve_in_each_slot()

        def is_as_before(state: State) -> bool:
            return (
                state.processes == self.processes
                and state.files == before.files
                and not any(self._leaks(pid, before, once, state) for pid in self.processes)
            )

        self._wait_for(is_as_before)

    def _leaks(self, pid: int, before: State, once: State, twice: State) -> set[str]:
        """What a process has open since before the row, though each slot has served two tasks.

        For its last child a slot keeps something open until it has the next.
        """
        descriptors = twice.descriptors[pid]
        if len(descriptors) > self._descriptors[pid] + self.slots * PER_CHILD:
            return {*descriptors}
        new = {*once.descriptors[pid]} & {*descriptors} - {*before.descriptors[pid]}
        # Only their names are their own.
        return {at for at in new if at.startswith(("socket:", "pipe:"))}

    def _wait_for(self, predicate: Callable[[State], bool]) -> State:
        # Of a process or a descriptor that goes only its owner is told: there is no event.
        tick = threading.Event()
        deadline = time.monotonic() + PATIENCE
        while not predicate(state := self.state()):
            assert time.monotonic() < deadline, state
            tick.wait(0.01)
        return state
