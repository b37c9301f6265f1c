"""The program that measures where memory goes: what its page says of the figures is true here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "where_memory_goes.py"

# All is measured once, at the beginning: forty processes, and eight workers.
pytestmark = pytest.mark.timeout(300)

MEGABYTES = 30
CALLS = 3


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("where")
    arguments = ["--json", "--megabytes", str(MEGABYTES), "--calls", str(CALLS), "--jobs", "4"]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


#: What is kept of the memory of each way: nearly all of it, or next to nothing. Left out: what the
#: page says nothing of, and jemalloc's, which not every machine has.
ALL, NONE = "all", "none"
TRIM = "malloc_trim(0)"
ARENA, THRESHOLD = "MALLOC_ARENA_MAX=1", "MALLOC_TRIM_THRESHOLD_=131072"
SHAPE: dict[str, dict[str, str]] = {
    "large": {"del": NONE},
    "small": {"del": NONE},
    "small_pinned": {
        "del": ALL, "gc.collect()": ALL, TRIM: ALL, ARENA: ALL, THRESHOLD: ALL, "jemalloc": ALL,
    },
    "blocks": {"del": NONE},
    "blocks_pinned": {
        "del": ALL, "gc.collect()": ALL, TRIM: NONE, ARENA: ALL, THRESHOLD: ALL, "jemalloc": NONE,
    },
    "threads": {
        "del": ALL, "gc.collect()": ALL, TRIM: NONE, ARENA: NONE, THRESHOLD: ALL, "jemalloc": NONE,
    },
    "several": {"del": NONE},
    "several_later": {TRIM: NONE, THRESHOLD: NONE, "jemalloc": NONE},
    "cycles": {"del": ALL, "gc.collect()": NONE},
    "library": {"del": ALL, "gc.collect()": ALL, TRIM: ALL, ARENA: ALL, THRESHOLD: ALL},
}  # fmt: skip


def share(size: int, megabytes: int = MEGABYTES) -> str:
    part = size / (megabytes * 1_000_000)
    return ALL if part > 0.7 else NONE if part < 0.3 else f"{part:.0%}"


@pytest.mark.parametrize("name", SHAPE)
def test_each_way_to_use_memory_keeps_what_the_page_says(found: dict[str, Any], name: str) -> None:
    (way,) = (one["bytes"] for one in found["ways"] if one["name"] == name)
    expected = {"peak": ALL, "a child that exits": NONE, **SHAPE[name]}

    assert {point: share(way[point]) for point in expected if point in way} == {
        point: what for point, what in expected.items() if point in way
    }


def test_a_threshold_that_has_risen_keeps_more(found: dict[str, Any]) -> None:
    ways = {one["name"]: one["bytes"] for one in found["ways"]}

    assert ways["several_later"]["del"] > ways["several"]["del"] + MEGABYTES * 1_000_000 / 5


def test_free_lists_are_not_what_keeps_megabytes(found: dict[str, Any]) -> None:
    assert 0 < found["free_lists_bytes"] < 1_000_000


@pytest.mark.parametrize(
    ("name", "kept", "processes"),
    [
        ("plain", ALL, 1),
        ("one", NONE, CALLS),
        ("five", ALL, 1),
        ("memory", NONE, CALLS),
        # It gives all back by itself, and its process is replaced for its peak all the same.
        ("peak", NONE, CALLS),
        ("threads", ALL, 1),
        ("isolated", NONE, CALLS),
        ("isolated-threads", NONE, CALLS),
    ],
)
def test_each_worker_keeps_what_the_page_says(
    found: dict[str, Any], name: str, kept: str, processes: int
) -> None:
    (worker,) = (one for one in found["workers"] if one["name"] == name)

    assert (share(worker["kept_bytes"]), worker["processes"]) == (kept, processes)
    # No option keeps a call from taking it.
    assert worker["peak_bytes"] > 0.5 * MEGABYTES * 1_000_000


def test_the_page_has_each_way_and_each_worker(found: dict[str, Any]) -> None:
    text = (ROOT / "docs/explanation/where-memory-goes.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()]

    labels = [one["label"] for one in [*found["ways"], *found["workers"]]]
    assert [label for label in labels if label not in rows] == []
