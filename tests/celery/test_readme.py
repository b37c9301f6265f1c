"""The README's quickstart, as printed: its file, its worker, its call."""

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def _block(heading: str, language: str, number: int = 0) -> str:
    """A code block of a section, without its indentation."""
    section = README.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", section, re.M | re.S)
    return textwrap.dedent([text for name, text in fenced if name == language][number])


@pytest.fixture
def project(tmp_path: Path, redis_url: str) -> Path:
    source = _block("Use", "python")
    assert source.count("redis://127.0.0.1:6379/0") == 2
    (tmp_path / "proj.py").write_text(source.replace("redis://127.0.0.1:6379/0", redis_url))
    return tmp_path


def _command(number: int) -> list[str]:
    # The scripts of this environment, which need not be on PATH.
    words = shlex.split(_block("Use", "", number))
    if words[0] == "celery":
        words[:1] = [sys.executable, "-m", "celery"]
    elif words[0] == "python":
        words[0] = sys.executable
    return words


def test_the_quickstart_works_as_printed(project: Path) -> None:
    log_line = _block("Use", "", 1)
    environment = {**os.environ, "C_FORCE_ROOT": "1"}
    worker = subprocess.Popen(
        _command(0),
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert worker.stdout is not None
    lines: list[str] = []
    ready = threading.Event()

    def follow() -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            lines.append(line)
            if " ready." in line:
                ready.set()
        ready.set()

    follower = threading.Thread(target=follow)
    follower.start()
    try:
        assert ready.wait(60)
        called = subprocess.run(
            _command(2), cwd=project, env=environment, capture_output=True, text=True, timeout=60
        )
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(30)
        follower.join(10)
        worker.stdout.close()
    log = "".join(lines)
    assert called.returncode == 0, called.stderr + log
    result = eval(called.stdout)
    assert result["bytes"] == 300 << 20
    # The line that it promises; numbers differ.
    promised = re.sub(r"[\d.]+\d", "NUMBER", log_line.split("] ")[1].strip())
    assert promised in re.sub(r"[\d.]+\d", "NUMBER", log)
