"""A child is set up as a process of the worker's pool is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.processes import PATIENCE, survivors
from harness.worker import Worker

StartWorker = Callable[..., Worker]

TIMEOUT = 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a file of the folder").touch()
    return folder


def get(running: Worker, task: str) -> Any:
    return running.call(f"setting.{task}").get(timeout=TIMEOUT)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_body_finds_the_process_that_a_plain_one_finds(
    worker: StartWorker, folder: Path, pool: str
) -> None:
    running = worker("setting", pool=pool, env={"TEST_FOLDER": str(folder)})

    plain, isolated = get(running, "plain_describe"), get(running, "describe")

    assert plain["conf"] == {"yes": [1, 2]}
    assert plain["priority"] == 3
    assert plain["current_app"]
    assert plain["umask"] == 0o027
    assert plain["environment"]["MADE_AT_RUN_TIME"] == "yes"
    assert plain["zone"][1] == 5
    assert plain["folder"] == str(folder)
    assert plain["cwd_file"]
    assert plain["limits"] == [777, 777]
    assert isolated == plain


def test_random_numbers_differ_from_child_to_child(worker: StartWorker, folder: Path) -> None:
    running = worker("setting", env={"TEST_FOLDER": str(folder)})

    drawn = [get(running, "random_numbers") for _ in range(3)]

    for numbers in zip(*drawn, strict=True):
        assert len(set(numbers)) == 3


def notes(path: Path) -> dict[int, list[str]]:
    """The events of each process."""
    found: dict[int, list[str]] = {}
    for line in path.read_text().splitlines():
        event, pid = json.loads(line)
        found.setdefault(pid, []).append(event)
    return found


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_a_child_sends_the_signals_of_a_pool_process_once(
    worker: StartWorker, folder: Path, pool: str
) -> None:
    path = folder / "notes"
    environment = {"TEST_FOLDER": str(folder), "TEST_NOTES": str(path)}
    running = worker("setting", pool=pool, env=environment)

    first, second = get(running, "set_up_by"), get(running, "set_up_by")

    assert first == second
    assert first["worker_process_init"] == first["isolated_process_init"] == 1
    assert survivors([first["pid"]], timeout=PATIENCE) == set()
    assert notes(path)[first["pid"]] == [
        "worker_process_init",
        "isolated_process_init",
        "worker_process_shutdown",
        "isolated_process_shutdown",
    ]
    # Logging was set up before.
    running.wait_for_log(rf"WARNING/.*worker_process_init in {first['pid']}")


def test_celerys_own_signals_can_be_left_out(worker: StartWorker, folder: Path) -> None:
    path = folder / "notes"
    environment = {"TEST_FOLDER": str(folder), "TEST_NOTES": str(path)}
    conf = {"isolated_worker_process_init": False}
    running = worker("setting", env=environment, conf=conf)

    seen = get(running, "set_up_by")

    assert "worker_process_init" not in seen
    assert seen["isolated_process_init"] == 1
    get(running, "set_up_by")
    assert survivors([seen["pid"]], timeout=PATIENCE) == set()
    assert notes(path)[seen["pid"]] == ["isolated_process_init", "isolated_process_shutdown"]


def test_no_connection_is_shared_with_anyone(worker: StartWorker, folder: Path) -> None:
    path = folder / "connections"
    environment = {"TEST_FOLDER": str(folder), "TEST_CONNECT": str(path)}
    # redis-py notices a fork by itself, py-amqp does not.
    running = worker("setting", broker="amqp", env=environment)

    seen = [get(running, "connect") for _ in range(4)]

    # A connection lasts as long as its process.
    assert seen[0] == seen[1] != seen[2] == seen[3]
    # Both the main process and the forkserver have connected while they imported the app.
    inherited = {int(port) for events in notes(path).values() for port in events}
    assert len(inherited) == 2
    assert not inherited & {port for port, _ in seen}
