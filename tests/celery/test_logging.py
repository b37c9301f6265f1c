"""What a body logs is written as what a plain body logs, to the letter."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from harness.worker import Worker

TIMEOUT = 30

#: Ways to set logging up: options of the worker, variables for the app, settings.
WAYS: dict[str, dict[str, Any]] = {
    "Celery's own": {},
    "setup_logging": {"env": {"TEST_LOGGING": "setup_logging"}},
    "after_setup": {"env": {"TEST_LOGGING": "after_setup"}},
    "a file": {"args": ["--logfile={folder}/of-%h.log"]},
    "a file for each process": {"args": ["--logfile={folder}/of-%n%I.log"]},
    "a file for each number": {"args": ["--logfile={folder}/of-%n-%i.log"]},
    "formats": {
        "conf": {
            "worker_log_format": "all %(processName)s %(levelname)s %(message)s",
            "worker_task_log_format": "task %(processName)s %(task_name)s[%(task_id)s] %(message)s",
        }
    },
    "no redirection": {"conf": {"worker_redirect_stdouts": False}},
    "redirected as INFO": {"conf": {"worker_redirect_stdouts_level": "INFO"}},
    "the root logger let alone": {"conf": {"worker_hijack_root_logger": False}},
    "colour": {"conf": {"worker_log_color": True}},
}

POOLS = {"setup_logging": ["prefork", "threads"], "a file for each process": ["prefork", "gevent"]}

CASES = [(way, pool) for way in WAYS for pool in POOLS.get(way, ["prefork"])]


class Logged:
    """A worker, and all that it writes, by the name of the file."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker = worker
        self._folder = folder

    def written_by(self, task: str) -> dict[str, list[str]]:
        """What one call has written, without what is its own alone."""
        word = f"word{os.urandom(4).hex()}"
        result = self.worker.call(f"logged.{task}", word)
        result.get(timeout=TIMEOUT)
        # All that has gone to the terminal before this has arrived when this has.
        self.worker.call("logged.mark", f"end of {word}").get(timeout=TIMEOUT)
        self.worker.wait_for_log(f"end of {word}")
        texts = self._texts(lambda text: word in text)
        return {
            name: [
                self._normal(line, task, word, result.id)
                for line in text.splitlines()
                if (word in line or result.id in line) and "end of" not in line
            ]
            for name, text in texts.items()
        }

    def _texts(self, is_meant: Callable[[str], bool]) -> dict[str, str]:
        files = {path.name: path.read_text() for path in sorted(self._folder.iterdir())}
        return {
            name: text
            for name, text in {**files, "the terminal": self.worker.log()}.items()
            if is_meant(text)
        }

    def _normal(self, line: str, task: str, word: str, task_id: str) -> str:
        line = line.replace(word, "WORD").replace(task_id, "ID").replace(f"logged.{task}", "TASK")
        line = re.sub(r"\d{4}-\d\d-\d\d [\d:,]+", "TIME", line)
        return re.sub(r"in [\d.e-]+s: ", "in SECONDS: ", line)


@pytest.fixture(scope="module", params=CASES, ids=" in ".join)
def logged(
    request: pytest.FixtureRequest,
    open_workplace: Callable[[], AbstractContextManager[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Logged]:
    way, pool = request.param
    folder = tmp_path_factory.mktemp("logs")
    options = dict(WAYS[way])
    options["args"] = [argument.format(folder=folder) for argument in options.get("args", ())]
    options["env"] = {**options.get("env", {}), "TEST_LOG": str(folder / "own.log")}
    with open_workplace() as workplace:
        # A worker that logs elsewhere does not say on the terminal that it is ready.
        worker = workplace.start("logged", pool=pool, ready=False, **options)
        worker.app.send_task("logged.plain_talk", ("first",)).get(timeout=60)
        yield Logged(worker, folder)
        assert worker.stop() == 0


@pytest.mark.parametrize("task", ["talk", "spawned_talk"])
def test_a_body_logs_what_and_where_a_plain_one_does(logged: Logged, task: str) -> None:
    plain = logged.written_by("plain_talk")
    isolated = logged.written_by(task)

    assert any("by the task logger" in line for lines in plain.values() for line in lines)
    assert any("printed" in line for lines in plain.values() for line in lines)
    assert not any("too quiet" in line for lines in plain.values() for line in lines)
    assert by_source(isolated) == by_source(plain)


def by_source(written: dict[str, list[str]]) -> dict[str, list[str]]:
    """What the body has written, in its order.

    What the slot says about the call itself may come later than the result. And what goes to stdout
    itself does not wait for what a pipe takes to stderr; the terminal here is both.
    """
    return {
        name: sorted(
            (line for line in lines if " succeeded in " not in line and " received" not in line),
            key=lambda line: line != "WORD: printed",
        )
        for name, lines in written.items()
    }


# ── what is said of a batch ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "argument", "why"),
    [
        ("hold", 200 << 20, r"2\d\d MiB of memory"),
        ("change_the_process", "umask", r"another umask \(031\)"),
    ],
    ids=["memory", "umask"],
)
def test_why_a_process_serves_no_further_call_of_its_batch_is_in_the_worker_s_log(
    worker: Callable[..., Worker], body: str, argument: object, why: str
) -> None:
    running = worker("isolated", conf={"isolated_batch_memory_limit": 200 << 20})

    pid = running.call("isolated.run_in_batch", body, argument).get(timeout=TIMEOUT)
    after = running.call("isolated.run_in_batch", "ids").get(timeout=TIMEOUT)["pid"]

    line = (
        rf"WARNING/\S+\] child pid={pid} task=isolated\.run_in_batch serves no further call of its "
        rf"batch: it was left with {why}\n"
    )
    assert len(re.findall(line, running.wait_for_log(line).string)) == 1
    assert after != pid
