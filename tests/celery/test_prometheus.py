"""A worker's metrics, scraped over HTTP."""

import collections
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness.processes import PATIENCE, Mailbox, Word
from harness.worker import Worker
from isolated_tasks import ChildLostError, MemoryLimitExceeded

StartWorker = Callable[..., Worker]

TIMEOUT = 30
MIB = 1 << 20

#: A port of the system's choice, which the log tells. A spare would be one more child.
CONF = {
    "isolated_prometheus_port": 0,
    "isolated_prometheus_host": "127.0.0.1",
    "isolated_spares": 0,
}

Labels = frozenset[tuple[str, str]]


class Scrape:
    """What a worker has served once."""

    def __init__(self, url: str) -> None:
        # Not urlopen(): it would ask a proxy that the environment names.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=TIMEOUT) as response:
            text = response.read().decode()
        self.values: dict[tuple[str, Labels], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self.values
                self.values[key] = sample.value

    def get(self, name: str, **labels: str) -> float:
        return self.values["isolated_tasks_" + name, frozenset(labels.items())]

    def calls(self) -> dict[tuple[str, ...], float]:
        """How many there were, by task and exit reason, where there were any."""
        counts = self.by("calls_total", "task", "exit_reason")
        return {key: count for key, count in counts.items() if count}

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """All values of a metric, by its labels."""
        return {
            tuple(dict(key)[label] for label in labels): value
            for (full_name, key), value in self.values.items()
            if full_name == "isolated_tasks_" + name
        }


class Served:
    """A worker that serves metrics."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        line = worker.wait_for_log(r"metrics are served at (http://\S+:(\d+)/\S+)")
        self.url, self.port = line[1], int(line[2])

    def call(self, task: str, *args: Any) -> Any:
        return self.worker.call(f"scraped.{task}", *args)

    def scrape(self, until: Callable[[Scrape], bool] = lambda scrape: True) -> Scrape:
        """Scrape; again until it is so: a result is there before the main process knows of it."""
        deadline = time.monotonic() + PATIENCE
        while not until(scrape := Scrape(self.url)):
            assert time.monotonic() < deadline, scrape.values
        return scrape

    def scrape_after(self, count: int) -> Scrape:
        """Scrape when so many calls are counted."""
        return self.scrape(lambda scrape: sum(scrape.calls().values()) >= count)


def refused(url: str) -> bool:
    try:
        Scrape(url)
    except urllib.error.URLError as exc:
        return isinstance(exc.reason, ConnectionRefusedError)
    return False


def listening(process: psutil.Process) -> set[int]:
    connections = process.net_connections("tcp")
    return {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "eventlet"])
def test_each_call_is_counted_once_with_what_it_used(
    open_workplace: Callable[[], AbstractContextManager[Any]], pool: str, tmp_path: Path
) -> None:
    with open_workplace() as workplace:
        # As where the program's plain tasks have metrics in pool processes: each process that makes
        # a metric, or only one of its values, has a file there.
        files = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        served = Served(workplace.start("scraped", pool=pool, conf=CONF, env=files))
        for size in (2 * MIB, 64 * MIB, 64 * MIB):
            served.call("hold", size).get(timeout=TIMEOUT)
        for task, error in [
            ("fail", ValueError),
            ("hold_too_much", MemoryLimitExceeded),
            ("leave", ChildLostError),
        ]:
            with pytest.raises(error):
                served.call(task).get(timeout=TIMEOUT)

        scrape = served.scrape_after(6)
        told = workplace.lines("usages")
        main_process = served.worker.pid
    assert {one["told_in"] for one in told} == {main_process}
    assert scrape.calls() == {
        ("scraped.hold", "returned"): 3,
        ("scraped.fail", "raised"): 1,
        ("scraped.hold_too_much", "memory_limit"): 1,
        ("scraped.leave", "lost"): 1,
    }
    expect_histogram(scrape, "call_peak_memory_bytes", told, "tree_peak_bytes")
    expect_histogram(scrape, "call_startup_seconds", told, "start_seconds")
    expect_histogram(scrape, "call_run_seconds", told, "wall_seconds")
    for mode in ("user", "system"):
        cpu = scrape.by("call_cpu_seconds_total", "task", "mode")
        used = sum(one[f"{mode}_seconds"] or 0.0 for one in told if one["task"] == "scraped.hold")
        assert cpu["scraped.hold", mode] == pytest.approx(used)
    buckets = scrape.by("call_peak_memory_bytes_bucket", "task", "le").items()
    peaks = {float(bound): n for (task, bound), n in buckets if task == "scraped.hold"}
    assert (peaks[16 * MIB], peaks[64 * MIB], peaks[128 * MIB]) == (0, 1, 3)
    assert list(tmp_path.iterdir()) == []


def expect_histogram(scrape: Scrape, name: str, told: list[Any], field: str) -> None:
    """It is of just the values that the signal has told."""
    values = collections.defaultdict(list)
    for one in told:
        values[one["task"]].append(one[field])
    buckets = scrape.by(f"{name}_bucket", "task", "le")
    assert {task for task, _ in buckets} == set(values)
    for task, all_of_it in values.items():
        known = [value for value in all_of_it if value is not None]
        assert scrape.get(f"{name}_count", task=task) == len(known)
        assert scrape.get(f"{name}_sum", task=task) == pytest.approx(sum(known))
    for (task, bound), count in buckets.items():
        known = [value for value in values[task] if value is not None]
        assert count == sum(value <= float(bound) for value in known)


@pytest.fixture
def served(worker: StartWorker, pool: str) -> Served:
    return Served(worker("scraped", pool=pool, conf=CONF))


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "eventlet"])
def test_live_children_and_the_forkserver_are_seen_while_a_body_runs(
    served: Served, mailbox: Mailbox, word: Word
) -> None:
    forkserver = int(served.worker.wait_for_log(r"forkserver pid=(\d+) loaded")[1])
    result = served.call("report_and_wait", mailbox.path, word.path)
    mailbox.read()

    during = served.scrape()
    word.give()
    result.get(timeout=TIMEOUT)
    after = served.scrape(lambda scrape: scrape.get("children") == 0)

    assert during.get("children") == 1
    assert during.calls() == {}
    assert during.get("forkserver_up") == 1
    assert during.get("forkserver_starts_total") == 1
    assert during.get("forkserver_failures_total") == 0
    rss = psutil.Process(forkserver).memory_info().rss
    assert after.get("forkserver_rss_bytes") == pytest.approx(rss, rel=0.1)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_forkserver_that_died_is_a_failure_and_calls_go_on_counting(served: Served) -> None:
    forkserver = int(served.worker.wait_for_log(r"forkserver pid=(\d+) loaded")[1])
    served.call("hold", MIB).get(timeout=TIMEOUT)
    os.kill(forkserver, signal.SIGKILL)
    served.worker.wait_for_log(rf"forkserver pid=(?!{forkserver}\b)\d+ loaded")
    served.call("hold", MIB).get(timeout=TIMEOUT)

    scrape = served.scrape_after(2)

    assert scrape.get("forkserver_starts_total") == 2
    assert scrape.get("forkserver_failures_total") == 1
    assert scrape.get("forkserver_up") == 1
    assert scrape.calls() == {("scraped.hold", "returned"): 2}


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_a_second_worker_finds_the_port_taken_and_goes_on(
    served: Served, worker: StartWorker, pool: str
) -> None:
    conf = {**CONF, "isolated_prometheus_port": served.port}

    second = worker("scraped", pool=pool, conf=conf)

    second.wait_for_log(rf"ERROR.*isolated_prometheus_port={served.port}: .*already in use")
    served.worker.stop()
    second.call("scraped.hold", MIB).get(timeout=TIMEOUT)


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_the_main_process_alone_listens_until_it_stops(served: Served) -> None:
    served.call("hold", MIB).get(timeout=TIMEOUT)

    main, *others = served.worker.tree()
    assert served.port in listening(main)
    assert others
    assert [process for process in others if served.port in listening(process)] == []
    assert served.worker.stop() == 0
    assert refused(served.url)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_program_adds_the_metrics_to_its_own_exporter(worker: StartWorker, pool: str) -> None:
    own = {"OWN_EXPORTER": "yes"}
    served = Served(worker("scraped", pool=pool, conf={"isolated_spares": 0}, env=own))
    served.call("hold", MIB).get(timeout=TIMEOUT)

    scrape = served.scrape_after(1)

    assert scrape.calls() == {("scraped.hold", "returned"): 1}
    assert scrape.get("forkserver_up") == 1
