"""Every code block of every page runs, or is parsed; `harness.page` says how."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import marks, services

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def own_redis(request: pytest.FixtureRequest) -> Iterator[str]:
    """A Redis for one page: pages call their queues alike, and would take each other's messages."""
    program = services.find_redis_server()
    if program is None:
        yield request.getfixturevalue("redis_url")
        return
    with services.new_redis(program) as url:
        yield url


def run(page: Path, folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run a page; the test fails if it leaves a process behind."""
    mark = f"page-{os.urandom(6).hex()}"
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "harness.page", str(page), *options],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(SUPPORT), marks.VARIABLE: mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
        )
    finally:
        left = marks.wait(marks.marked_processes(mark), timeout=5)
        described = [marks.describe(process) for process in left]
        marks.kill(left)
    assert described == [], ran.stdout
    return ran


@pytest.mark.timeout(300)
def test_the_code_of_a_page_runs(
    page_with_code: Path, tmp_path: Path, own_redis: str, request: pytest.FixtureRequest
) -> None:
    options = ["--redis", own_redis]
    if "amqp://" in page_with_code.read_text():
        options += ["--amqp", request.getfixturevalue("amqp_url")]

    ran = run(page_with_code, tmp_path, *options)

    print(ran.stdout)
    if ran.returncode != 0:
        pytest.fail("the page does not do what it says, see above", pytrace=False)


# What a page may get wrong, and what the report says of it.
WRONG = {
    "code that raises": ("```python\n1 / 0\n```", "ZeroDivisionError"),
    "code that does not compile": ("```python\nif:\n```", "SyntaxError"),
    "a file that cannot be imported": ("```python\n# mod.py\nimport nonesuch\n```", "nonesuch"),
    "an option that cannot be used": (
        "```python\n@app.task(base=IsolatedTask, memory_limit='lots')\ndef f(): ...\n```",
        "OptionError",
    ),
    "an option that is misspelt": (
        "```python\n@app.task(base=IsolatedTask, batchsize=2)\ndef f(): ...\n```",
        "did you mean 'batch_size'",
    ),
    "a setting that does not exist": (
        "```python\napp.conf.isolated_nonesuch = 1\n```",
        "there is no such setting",
    ),
    "a command that fails": ("```console\n$ false\n```", "exited with 1"),
    "the first of a pipe that fails": ("```console\n$ false | cat\n```", "exited with 1"),
    "output that does not come": ("```console\n$ echo a\nb\n```", "it has not printed 'b'"),
    "output in another order": ("```console\n$ printf 'a\\nb\\n'\nb\na\n```", "not printed 'a'"),
    "a worker that does not start": (
        "```console\n$ celery -A nonesuch worker &\n```",
        "it has not printed 'ready.'",
    ),
    "an extra that there is not": ("```console\n$ pip install 'isolated-tasks[x]'\n```", "extras"),
    "a package that is not there": ("```console\n$ pip install nonesuch\n```", "nonesuch"),
    "no unit of systemd": ("```ini\n[Service]\nKillMode=mix\n```", "kill mode"),
    "no TOML": ("```toml\na =\n```", "TOMLDecodeError"),
    "no YAML": ("```yaml\na: [\n```", "ParserError"),
    "no JSON": ("```json\n{\n```", "JSONDecodeError"),
    "no Dockerfile": ("```dockerfile\nFROM a\nRUNS b\n```", "no Dockerfile"),
    "a skip without a reason that is text": (
        "<!--- skip: next why -->\n```console\n$ true\n```",
        "NameError",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_page_that_is_wrong_is_told_so(what: str, tmp_path: Path) -> None:
    text, said = WRONG[what]
    (tmp_path / "page.md").write_text(text)

    ran = run(tmp_path / "page.md", tmp_path)

    assert ran.returncode == 1, ran.stdout
    assert said in ran.stdout


def test_a_page_that_is_right_is_run_in_its_order(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "1. Indented:\n\n   ```python\n   # mod.py\n   a = 1\n   ```\n\n"
        "```python\nassert a == 1\n```\n\n"
        '<!--- skip: next "for this test" -->\n```text\n```\n\n'
        "<!--- invisible-code-block: python\nb = 2\n-->\n\n"
        "```console\n$ python -c 'import mod; print(mod.a, 0.5)' \\\n  | cat\n8 … 1.25\n```\n\n"
        '<!--- skip: next "this one as well" -->\n```python\n1 / 0\n```\n\n'
        "```python\nassert b == 2\nopen('done', 'w').close()\n```\n"
    )

    ran = run(tmp_path / "page.md", tmp_path)

    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.count("skipped: ") == 2
    assert (tmp_path / "done").exists()
