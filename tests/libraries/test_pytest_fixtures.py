"""The fixtures of celery.contrib.pytest: workers in a thread of the tests' own process.

Those of pytest-celery from 1.0 on are others, of the same names: their workers run in Docker, which
starts them as `celery worker`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import marks
from harness.processes import PATIENCE, survivors

SUITE = Path(__file__).parent / "apps" / "suite_of_a_user.py"


@pytest.mark.parametrize(
    ("broker", "pool"), [("memory", "solo"), ("redis", "threads")], ids=["memory-solo", "redis"]
)
def test_a_users_suite_passes(workplace: Any, tmp_path: Path, broker: str, pool: str) -> None:
    # Away from this project's conftest files.
    suite = tmp_path / "test_suite.py"
    shutil.copy(SUITE, suite)
    mark = f"suite-{os.urandom(6).hex()}"
    in_memory = {"BROKER_URL": "memory://", "RESULT_BACKEND": "cache+memory://"}
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", str(suite)),
            *("-p", "celery.contrib.pytest", "-p", "no:celery", "-p", "no:cacheprovider"),
            # Nothing of this project's own configuration.
            *("-c", os.devnull, "--rootdir", str(tmp_path)),
        ],
        env={
            **os.environ,
            **workplace.settings().environ(),
            **(in_memory if broker == "memory" else {}),
            "POOL": pool,
            "TMPDIR": str(workplace.temporary),
            marks.VARIABLE: mark,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
    )

    assert run.returncode == 0, run.stdout + run.stderr
    assert "4 passed" in run.stdout
    left = [process.pid for process in marks.marked_processes(mark)]
    assert survivors(left, timeout=PATIENCE) == set()
    assert list(workplace.temporary.iterdir()) == []
