"""The examples, run as anybody would run them."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[3] / "examples"

#: In seconds. An example has to end before its test is failed, so that its output is shown.
PATIENCE = 110


def run_example(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `examples/<name>.py` in a folder, in which its temporary files are made too."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
