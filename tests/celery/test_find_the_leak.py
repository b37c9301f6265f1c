"""The example that finds the leaking task among four, as anybody would run it."""

import json
from pathlib import Path

import pytest

from harness.examples import run_example


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_it_tells_the_four_tasks_apart_and_leaves_nothing(tmp_path: Path, pool: str) -> None:
    done = run_example("find_the_leak", tmp_path, "--json", "--pool", pool)

    assert done.returncode == 0, done.stderr
    tasks = json.loads(done.stdout)["tasks"]
    assert {task["task"]: task["verdict"] for task in tasks} == {
        "leaks": "grows",
        "fragments": "keeps its peak",
        "peaks_and_frees": "fine",
        "clean": "fine",
    }
    assert list(tmp_path.iterdir()) == []


def test_it_prints_the_advice(tmp_path: Path) -> None:
    done = run_example("find_the_leak", tmp_path)

    assert done.returncode == 0, done.stderr
    assert "leaks: grows → isolate" in done.stdout


def test_an_option_that_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    done = run_example("find_the_leak", tmp_path, "--calls", "0")

    assert done.returncode == 2
    assert "--calls" in done.stderr
    assert "Traceback" not in done.stderr
