"""The benchmarks in short form: they run, and measure all that they promise to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent
SUPPORT = BENCHMARKS.parent / "support"

#: What each section has bounds for, at least so many.
BOUNDS = {
    "alone": 3,
    "celery": 5,
    "slots": 0,
    "imports": 0,
    "payloads": 2,
    "baseline": 1,
    "growth": 5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Path:
    """Where the short form has written what it has found."""
    folder = tmp_path_factory.mktemp("bench")
    path = os.pathsep.join([str(SUPPORT), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "REDIS_URL": redis_url}
    command = [sys.executable, "-m", "bench", "--short", "--output", str(folder)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.timeout(330)
def test_all_is_measured(folder: Path) -> None:
    data: dict[str, Any] = json.loads((folder / "bench.json").read_text())

    assert data["machine"]["cores"]
    assert list(data["sections"]) == list(BOUNDS)
    for name, section in data["sections"].items():
        bounded = [figure for figure in section["figures"] if figure["bound"]]
        assert len(bounded) >= BOUNDS[name], name
        assert section["series"], name
        for series in section["series"]:
            assert all(value > 0 for value in series["values"]), series


def test_there_is_a_plot(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {"bench.json", "bench.png", "bench.svg"}
