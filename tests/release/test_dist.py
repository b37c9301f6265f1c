"""The wheel and the sdist: what is in them, and the README's quickstart with nothing else there."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import HeaderParser
from pathlib import Path

import celery
import pytest
import readme_renderer.markdown

import isolated_tasks
from harness.services import ServiceMissing, require

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

#: What no archive may have in it.
OUTPUT = re.compile(r"__pycache__|\.pyc$|\.so$|_cache/|\.egg-info|\.venv|(^|/)(build|dist)/|\.git/")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `python -m build` has put both. What it needs is installed, so it downloads nothing."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    assert len(found) == 1
    return found[0]


def _in_wheel(dist: Path) -> list[str]:
    with zipfile.ZipFile(_only(dist, "*.whl")) as wheel:
        return wheel.namelist()


def _in_sdist(dist: Path) -> set[str]:
    with tarfile.open(_only(dist, "*.tar.gz")) as sdist:
        return {name.partition("/")[2] for name in sdist.getnames()}


def _sources(folder: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not OUTPUT.search(str(path.relative_to(ROOT)))
    }


def test_the_wheel_has_the_package_whole_and_nothing_else(dist: Path) -> None:
    names = _in_wheel(dist)
    metadata = f"isolated_tasks-{isolated_tasks.__version__}.dist-info/"

    assert {name for name in names if not name.startswith(metadata)} == _sources("isolated_tasks")
    assert metadata + "licenses/LICENSE" in names


def test_the_sdist_has_what_building_and_testing_needs_and_nothing_else(dist: Path) -> None:
    names = _in_sdist(dist)

    assert [name for name in names if OUTPUT.search(name)] == []
    for folder in ("isolated_tasks", "tests", "examples", ".ci", ".github"):
        assert _sources(folder) <= names
    assert {name.partition("/")[0] for name in names} == {
        *(".ci", ".github", ".gitignore", "docs", "examples", "isolated_tasks", "tests"),
        *("CHANGELOG.md", "LICENSE", "Makefile", "PKG-INFO", "README.md", "pyproject.toml"),
    }


def test_the_metadata_is_what_pypi_wants(dist: Path) -> None:
    files = list(map(str, dist.iterdir()))
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr


def _readme_in(dist: Path) -> str:
    with zipfile.ZipFile(_only(dist, "*.whl")) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        return str(HeaderParser().parsestr(wheel.read(name).decode()).get_payload())


def test_pypi_shows_the_readme_with_its_picture_its_tables_and_its_code(dist: Path) -> None:
    page = readme_renderer.markdown.render(_readme_in(dist))

    assert page is not None
    assert page.count("<img ") == README.count("![")
    assert page.count("<table>") == len(re.findall(r"^\|[-:|]+\|$", README, re.M))
    assert page.count("<pre") == len(re.findall(r"^ *```\w", README, re.M))
    assert "```" not in page
    assert "skip:" not in page


def test_on_pypi_no_link_of_the_readme_is_relative(dist: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", _readme_in(dist))

    assert len(links) > 20
    assert [link for link in links if not re.match(r"https?://|#", link)] == []
    in_readme = re.findall(r"\]\(([^)]+)\)", README)
    assert [link.rpartition("/main/")[2] for link in links] == in_readme


@contextmanager
def _environment(folder: Path, archive: Path) -> Iterator[Path]:
    """A virtual environment with the archive and a client of Redis; yields its scripts."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # The Celery of this environment, for what is run here is to work with that one.
    wanted = [str(archive), "celery[redis]", f"celery=={celery.__version__}"]
    installed = subprocess.run(
        [*pip, "install", *wanted], capture_output=True, text=True, env=_clean()
    )
    if re.search(r"NewConnectionError|NameResolutionError|ProxyError", installed.stderr):
        require(ServiceMissing(f"no package index to install from: {installed.stderr[-500:]}"))
    assert installed.returncode == 0, installed.stderr
    yield python.parent
    shutil.rmtree(folder)  # some hundred MB for each, which pytest would keep


def _clean() -> dict[str, str]:
    """The environment without what would bring in the sources or the packages of the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "C_FORCE_ROOT": "1"}


def _blocks() -> list[tuple[str, str]]:
    """The quickstart's code blocks, with their language, but those that are skipped."""
    section = README.split("\n## Quickstart\n")[1].split("\n## ")[0]
    found = re.findall(
        r"(<!--- skip: next.*?-->\s*)?^ *```(\w+)\n(.*?)^ *```$", section, re.M | re.S
    )
    return [(language, textwrap.dedent(text)) for skip, language, text in found if not skip]


class _Worker:
    """A worker in the background, and its log."""

    def __init__(self, command: str, folder: Path, env: dict[str, str]) -> None:
        self.lines: list[str] = []
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._follower = threading.Thread(target=self._follow)
        self._follower.start()
        assert self._ready.wait(60)
        assert self.process.poll() is None, self.log()

    def log(self) -> str:
        return "".join(self.lines)

    def _follow(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if " ready." in line:
                self._ready.set()
        self._ready.set()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        self._follower.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def _masked(line: str) -> str:
    """With its numbers, and all before the last level of a log line, made alike."""
    return re.sub(r"\d+(\.\d+)?", "0", line.rpartition("MainProcess] ")[2].strip())


def _follow_the_quickstart(scripts: Path, folder: Path, redis_url: str, pool: str) -> list[str]:
    """Do what the README says, in the pool; what was printed, and the worker's log at last."""
    folder.mkdir()
    env = {**_clean(), "PATH": f"{scripts}:{os.environ['PATH']}"}
    printed: list[str] = []
    worker: _Worker | None = None
    promised: list[tuple[str, str]] = []
    try:
        for language, text in _blocks():
            if language == "python":
                assert text.startswith("# proj.py\n")
                assert text.count("redis://127.0.0.1:6379/0") == 2
                text = text.replace("redis://127.0.0.1:6379/0", redis_url)
                (folder / "proj.py").write_text(text)
                continue
            assert language == "console"
            for command, *output in (part.splitlines() for part in text.split("$ ")[1:]):
                if command.endswith(" &"):
                    worker = _Worker(f"{command[:-2]} --pool {pool}", folder, env)
                    promised += [(line, "log") for line in output]
                    continue
                run = ["bash", "-c", command]
                done = subprocess.run(
                    run, cwd=folder, env=env, capture_output=True, text=True, timeout=60
                )
                assert done.returncode == 0, done.stderr + (worker.log() if worker else "")
                printed.append(done.stdout.strip())
                assert [_masked(line) for line in output] == [_masked(done.stdout)]
    finally:
        if worker is not None:
            worker.stop()
    assert worker is not None
    for line, _ in promised:
        assert _masked(line) in map(_masked, worker.lines)
    return [*printed, worker.log()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("pattern", "pools"),
    [
        ("*.whl", ["prefork", "threads"]),
        ("*.tar.gz", ["prefork"]),
    ],
)
def test_the_quickstart_works_where_nothing_else_is_installed(
    dist: Path, tmp_path: Path, redis_url: str, pattern: str, pools: list[str]
) -> None:
    with _environment(tmp_path / "venv", _only(dist, pattern)) as scripts:
        for pool in pools:
            first, second, log = _follow_the_quickstart(scripts, tmp_path / pool, redis_url, pool)

            assert eval(first)["bytes"] == eval(second)["bytes"] == 300 << 20
            assert eval(first)["pid"] != eval(second)["pid"]
            assert len(re.findall(r"succeeded in [\d.]+s, peak \d+ MiB, cpu ", log)) == 2
