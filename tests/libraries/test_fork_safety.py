"""The program that tries what may be loaded in the forkserver; its table is on a page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/explanation/fork-safety.md"


def test_a_library_is_tried_and_does_what_the_page_says(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    redis: str = request.getfixturevalue("redis_url")
    path = os.pathsep.join([f"{ROOT}/tests/support", f"{ROOT}/tests/benchmarks"])

    done = subprocess.run(
        [sys.executable, "-m", "fork_safety", "PIL", "--redis", redis, "--json", "found.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=110,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["PIL"]
    row = done.stdout.splitlines()[-1]
    assert [one["shared"] for one in found["used"]["children"]] == [False, False]
    # But for the version.
    assert row.split(" | ")[1:] in [line.split(" | ")[1:] for line in PAGE.read_text().splitlines()]
