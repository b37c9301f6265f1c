"""Two machines serve one queue; one of them goes, or its network does, and no result is lost.

Each machine has namespaces of its own (`harness.network`). Half-way is when half of the results are
there; then each slot of one machine is made to be in the middle of a body, so that it is known
which messages go with it.
"""

import contextlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import celery.exceptions
import psutil
import pytest
from celery.result import AsyncResult
from kombu.transport.redis import Channel

from harness import marks
from harness.combination import PER_CHILD
from harness.leaks import descriptors_of
from harness.network import (
    Machine,
    Network,
    in_network_of_its_own,
    seen_from_machines,
    server_of,
    skip_without_namespaces,
)
from harness.processes import PATIENCE, Mailbox
from harness.worker import Worker
from harness.workplace import SUPPORT, Workplace

PAGE = Path(__file__).parents[2] / "docs/how-to/run-on-two-machines.md"

CALLS = 1000

CALLS_WHILE_UNPLUGGED = 200

#: Of each worker.
SLOTS = 2

#: After so many calls each process of a worker has all that it needs.
WARM_UP_CALLS = 60

#: What a process of the survivor may grow by, in bytes; see test_memory.py.
GROWTH = 2_000_000

CONF: Mapping[str, Any] = {
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "worker_prefetch_multiplier": 1,
    "worker_cancel_long_running_tasks_on_connection_loss": True,
    # So that the processes which stay are soon alone.
    "isolated_batch_idle_timeout": 0.5,
}

#: What has each broker notice within seconds that a worker is gone of which it hears nothing.
CONF_OF: Mapping[str, Mapping[str, Any]] = {
    "amqp": {"broker_heartbeat": 2},
    "redis": {
        "broker_transport_options": {
            "visibility_timeout": 5,
            # How often workers look for messages beyond it; see `look_for_abandoned`.
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
            # Who looks has a lock meanwhile. One that goes just then would keep it for 300 s.
            "unacked_mutex_expire": 5,
        }
    },
}

#: Options that name where kombu keeps what is not acknowledged.
UNACKED = ("unacked_key", "unacked_index_key", "unacked_mutex_key")


@dataclass
class Site:
    """A machine and the worker on it."""

    machine: Machine
    worker: Worker

    @property
    def forkserver(self) -> psutil.Process:
        children = psutil.Process(self.worker.pid).children()
        (found,) = (one for one in children if "forkserver" in " ".join(one.cmdline()))
        return found

    def lasting_processes(self) -> dict[str, psutil.Process]:
        """All that is there between two calls."""
        forkserver = self.forkserver
        assert marks.wait(forkserver.children(), timeout=PATIENCE) == []
        main = psutil.Process(self.worker.pid)
        pool = [child for child in main.children() if child != forkserver]
        assert len(pool) == SLOTS
        named = {f"pool process {number}": one for number, one in enumerate(pool)}
        named.update({"main process": main, "forkserver": forkserver})
        assert set(self.machine.processes()) == set(named.values())
        return named


@dataclass
class Pair:
    """Two sites that serve the queue of a test, and what their bodies tell."""

    workplace: Workplace
    broker: str
    mailbox: Mailbox
    alpha: Site
    beta: Site
    sent: list[AsyncResult] = field(default_factory=list)

    def send(self, calls: int) -> list[AsyncResult]:
        """Each call has the number of those before it as its argument."""
        first = len(self.sent)
        worker = self.alpha.worker
        self.sent += [
            worker.call("two_machines.where", number) for number in range(first, first + calls)
        ]
        return self.sent[first:]

    def hosts(self, results: list[AsyncResult]) -> dict[int, str]:
        """Where the body ran whose result it is, by the number of each call."""
        return dict(self._answer(result) for result in results)

    def _answer(self, result: AsyncResult) -> tuple[int, str]:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                number, host = result.get(timeout=2)
            except celery.exceptions.TimeoutError:
                assert time.monotonic() < deadline
                self._look_for_abandoned()
            else:
                assert self.sent[number] == result
                return number, host

    def _look_for_abandoned(self) -> None:
        """What workers do every 10 to 100 seconds with kombu before 5.7, which has no option."""
        if self.broker == "redis" and not hasattr(Channel, "unacked_restore_interval"):
            with self.alpha.worker.app.connection_for_read() as connection:
                connection.default_channel.qos.restore_visible(num=1000, interval=1)

    def hold(self, site: Site) -> set[int]:
        """Have each slot of a site in a body that does not end; return the numbers of the calls."""
        path = self.workplace.folder / f"hold-{site.machine.name}"
        path.write_text(self.mailbox.path)
        held = {number for _ in range(SLOTS) for number in self.mailbox.read()}
        path.unlink()
        return held

    def runs(self) -> dict[int, list[str]]:
        """Where the body of each call ran, however it ended: for the first time, then again."""
        found: dict[int, list[str]] = {}
        for number, host, is_redelivered in self.workplace.lines("runs"):
            # No other reason to run a body again.
            assert is_redelivered or number not in found
            found.setdefault(number, []).append(host)
        return found


@contextlib.contextmanager
def pair(
    request: pytest.FixtureRequest, workplace: Workplace, mailbox: Mailbox, broker: str
) -> Iterator[Pair]:
    """Two machines, each with a worker; one Redis has the results."""
    skip_without_namespaces()
    services = {"redis", broker}
    urls = {service: request.getfixturevalue(f"{service}_url") for service in services}
    conf = {**CONF, **CONF_OF[broker]}
    if broker == "redis":
        # What all workers of a database share otherwise, those of other tests too.
        keys = {key: f"{workplace.name}-{key}" for key in UNACKED}
        conf["broker_transport_options"] = {**conf["broker_transport_options"], **keys}
    client = workplace.app(workplace.settings(broker=broker, backend="redis", conf=conf))
    with contextlib.ExitStack() as stack:
        servers = map(server_of, urls.values())
        network = stack.enter_context(Network({port: (host, port) for host, port in servers}))
        sites: dict[str, Site] = {}
        for name in ("alpha", "beta"):
            machine = stack.enter_context(network.machine(name, folder=workplace.folder))
            worker = workplace.start(
                "two_machines",
                concurrency=SLOTS,
                broker=seen_from_machines(urls[broker]),
                backend=seen_from_machines(urls["redis"]),
                conf=conf,
                app=client,
                machine=machine,
                ready=False,
            )
            sites[name] = Site(machine, worker)
        for site in sites.values():
            site.worker.wait_until_ready()
        yield Pair(workplace, broker, mailbox, sites["alpha"], sites["beta"])


def kill_worker(site: Site) -> None:
    """SIGKILL to its main process, and to nothing else."""
    site.worker.kill()
    assert marks.wait(site.machine.processes(), timeout=PATIENCE) == []
    # What billiard makes and a killed worker cannot remove.
    assert [path for path in site.machine.files() if "pymp-" not in path.name] == []


def cut_power(site: Site) -> None:
    """SIGKILL to all of its processes at once; its kernel does not tell the broker either."""
    processes = site.machine.processes()
    assert len(processes) >= 2 + SLOTS + SLOTS
    site.machine.cut_power()
    assert [process for process in processes if marks.is_alive(process)] == []


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("broker", "end"),
    [("amqp", kill_worker), ("redis", cut_power)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_no_result_is_lost_with_a_machine(
    request: pytest.FixtureRequest,
    workplace: Workplace,
    mailbox: Mailbox,
    broker: str,
    end: Callable[[Site], None],
    record_property: Callable[[str, object], None],
) -> None:
    with pair(request, workplace, mailbox, broker) as both:
        both.hosts(both.send(WARM_UP_CALLS))
        before = {role: measure(one) for role, one in both.alpha.lasting_processes().items()}

        results = both.send(CALLS)
        first_half = both.hosts(results[: CALLS // 2])
        held = both.hold(both.beta)
        end(both.beta)

        hosts = both.hosts(results)
        assert len(hosts) == CALLS
        assert Counter(hosts.values()).keys() == {"alpha", "beta"}
        assert {hosts[number] for number in held} == {"alpha"}
        # It has said nothing after its end.
        runs = both.runs()
        again = {number for number, where in runs.items() if len(where) > 1}
        record_property("calls run again", len(again))
        assert held <= again
        after = {role: measure(one) for role, one in both.alpha.lasting_processes().items()}
        print(f"of beta: {Counter(first_half.values())['beta']} of the first half; again: {again}")
        for role, (rss, descriptors) in after.items():
            print(f"{role}: {before[role]} → {rss, descriptors}")
            assert rss - before[role][0] < GROWTH, role
            # A slot keeps some for its last child, and for its last spare, until it has the next.
            assert descriptors <= before[role][1] + 2 * PER_CHILD, role
        assert both.alpha.worker.stop() == 0


@pytest.mark.timeout(180)
def test_no_result_is_lost_where_a_network_is_gone_for_some_time(
    request: pytest.FixtureRequest, workplace: Workplace, mailbox: Mailbox
) -> None:
    with pair(request, workplace, mailbox, "amqp") as both:
        results = both.send(CALLS_WHILE_UNPLUGGED)
        both.hosts(results[: CALLS_WHILE_UNPLUGGED // 2])
        held = both.hold(both.beta)

        both.beta.machine.unplug()

        # RabbitMQ gives the messages back; nobody has told beta.
        hosts = both.hosts(results)
        assert {hosts[number] for number in held} == {"alpha"}
        # Beta hears nothing from RabbitMQ, and ends bodies whose messages are no longer its own.
        both.beta.worker.wait_for_log("Connection to broker lost", PATIENCE)
        assert marks.wait(both.beta.forkserver.children(), timeout=PATIENCE) == []

        both.beta.machine.plug_in()

        # It serves again, as the same worker.
        while "beta" not in both.hosts(both.send(SLOTS)).values():
            pass
        assert both.hosts(results) == hosts
        assert {number for number, where in both.runs().items() if len(where) > 1} >= held
        both.beta.lasting_processes()
        for site in (both.alpha, both.beta):
            assert site.worker.stop() == 0
            assert not site.worker.killed


@pytest.mark.timeout(180)
@pytest.mark.skipif(
    not hasattr(Channel, "unacked_restore_interval"),
    reason="with kombu before 5.7 a worker looks for abandoned messages each 100 s",
)
def test_the_page_on_two_machines_can_be_followed(tmp_path: Path) -> None:
    skip_without_namespaces()
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server on PATH, as the page wants it")

    done = in_network_of_its_own(
        *(sys.executable, "-m", "harness.page", str(PAGE)),
        folder=tmp_path,
        environ={"PYTHONPATH": str(SUPPORT)},
    )

    print(done.stdout)
    assert done.returncode == 0
    assert "skipped" not in done.stdout


def measure(process: psutil.Process) -> tuple[int, int]:
    """RSS and how many descriptors."""
    return process.memory_info().rss, len(descriptors_of(process.pid))
