"""The examples that measure and plot, each of them small: they show what they promise."""

import json
from pathlib import Path
from typing import Any

import pytest
import redis

from harness.examples import run_example

MEGABYTE = 1_000_000


def figures(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the example; return what it has written, beside which there is nothing but the plot."""
    done = run_example(name, folder, "--output", "output", *arguments)

    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} == {"output"}
    output = folder / "output"
    assert {path.name for path in output.iterdir()} == {
        f"{name}.json",
        f"{name}.png",
        f"{name}.svg",
    }
    found: dict[str, Any] = json.loads((output / f"{name}.json").read_text())
    return found


def test_compare_rss_shows_that_the_plain_worker_alone_keeps_its_peak(
    tmp_path: Path, redis_url: str
) -> None:
    arguments = ["--tasks", "2", "--megabytes", "60", "--variants", "plain,isolated"]
    arguments += ["--broker", redis_url, "--backend", redis_url]

    plain, isolated = figures("compare_rss", tmp_path, *arguments)["runs"]

    assert plain["retained_bytes"] > 40 * MEGABYTE
    assert isolated["retained_bytes"] < 10 * MEGABYTE
    assert isolated["peak_bytes"] - isolated["baseline_bytes"] > 60 * MEGABYTE


def test_process_large_data_shows_that_the_plain_worker_alone_does_not_shrink(
    tmp_path: Path,
) -> None:
    arguments = ["--megabytes", "60", "--calls", "2"]

    plain, isolated = figures("process_large_data", tmp_path, *arguments)["runs"]

    assert len(plain["retained_bytes"]) == len(isolated["retained_bytes"]) == 2
    assert min(plain["retained_bytes"]) > 60 * MEGABYTE
    assert max(isolated["retained_bytes"]) < min(plain["retained_bytes"]) / 4
    assert isolated["peak_bytes"] - isolated["before_bytes"] > 60 * MEGABYTE


def test_shared_model_shows_what_is_shared_and_what_must_not_be_forked(
    tmp_path: Path, redis_url: str
) -> None:
    arguments = ["--megabytes", "100", "--slots", "3", "--calls", "3"]
    arguments += ["--broker", redis_url, "--backend", redis_url]

    found = figures("shared_model", tmp_path, *arguments)

    plain, imported, isolated = found["sharing"]
    assert plain["answers"] == imported["answers"] == isolated["answers"]
    # The model is there before the first call, and its users add none.
    assert isolated["before_bytes"] > 100 * MEGABYTE
    added = isolated["total_bytes"] - isolated["before_bytes"]
    assert plain["total_bytes"] - plain["before_bytes"] > 3 * 100 * MEGABYTE
    assert added < 1.3 * 100 * MEGABYTE

    forked, spawned, batched = found["asking"]
    assert (forked["answers"], forked["loads"]) == (0, 0)
    assert forked["error"].startswith("RuntimeError: ")
    assert (spawned["answers"], spawned["processes"], spawned["loads"]) == (3, 3, 3)
    assert (batched["answers"], batched["processes"], batched["loads"]) == (3, 1, 1)

    with redis.Redis.from_url(redis_url) as server:
        assert server.keys("*shared_model*") == []


@pytest.mark.parametrize(
    ("name", "option"),
    [("compare_rss", "--tasks"), ("process_large_data", "--calls"), ("shared_model", "--slots")],
)
def test_an_option_that_cannot_be_used_is_one_clear_line(
    tmp_path: Path, name: str, option: str
) -> None:
    done = run_example(name, tmp_path, option, "0")

    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}: ")
    assert option in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
