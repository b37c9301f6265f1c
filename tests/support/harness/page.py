"""Runs the code blocks of one page of the documentation, in their order.

``python -m harness.page PAGE --redis URL --amqp URL``, in an empty folder, which becomes the page's
working folder: a process for each page. What a page may have, by the language of the block:

python      Runs, in one namespace for the page, which has an ``app`` and `IsolatedTask` from the
            beginning. A block that begins with a comment that is a file name, ``# proj.py``, is
            that file: it is written and imported, and its public names come into the namespace.
console     Lines that begin with ``$ `` are commands, for bash, and have to succeed. Other lines
            are output, which has to come in that order; numbers and ids are masked, and ``…``
            stands for anything. What ends with `` &`` runs until the end of the page; if it is a
            worker, it is waited for, and output has to come within `PATIENCE` seconds.
            ``pip install`` installs nothing: what it names has to be there.
ini, toml, yaml, json, dockerfile
            Are parsed; a unit of systemd is looked at by ``systemd-analyze verify``.
text        Nothing happens.

``redis://127.0.0.1:6379/0`` and ``amqp://guest:guest@127.0.0.1:5672//`` in a page become the URLs
given. ``examples`` in the working folder is that of the repository. At the end the options of all
isolated tasks that there are have been checked.
"""

import argparse
import configparser
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
import unittest
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from celery import Celery
from packaging.requirements import Requirement
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from sybil.typing import Parser

from isolated_tasks import IsolatedTask, settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["LANGUAGES", "REDIS", "Page", "matches"]

ROOT = Path(__file__).parents[3]

#: What pages call their servers, and what stands in for them.
REDIS, AMQP = "redis://127.0.0.1:6379/0", "amqp://guest:guest@127.0.0.1:5672//"

#: A command, a worker's start, and promised output in the background get so long, in seconds.
PATIENCE = 60.0

FILE_NAME = re.compile(r"# *([\w./-]+\.py)\n")


class Broken(AssertionError):
    """A block does not do what its page says."""


# ── output ──────────────────────────────────────────────────────────────────────────────────────

#: In this order: ids, addresses, numbers. And what is drawn as wide as its content.
_MASKED = (
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "#"),
    (re.compile(r"\b0x[0-9a-f]+\b"), "#"),
    (re.compile(r"\d+([.,:]\d+)*"), "#"),
    (re.compile(r"([─━═-])\1+"), r"\1"),
    (re.compile(r"\s+"), " "),
)


def _masked(line: str) -> str:
    for pattern, mask in _MASKED:
        line = pattern.sub(mask, line)
    return line.strip()


def matches(promised: str, line: str) -> bool:
    """Whether a line of output has what a page promises of it."""
    pattern = ".*".join(re.escape(part.strip()) for part in _masked(promised).split("…"))
    return re.search(pattern, _masked(line)) is not None


def _missing(promised: list[str], printed: list[str]) -> str | None:
    """The first promised line that does not come after those before it."""
    lines = iter(printed)
    for promise in promised:
        if promise.strip() and not any(matches(promise, line) for line in lines):
            return promise
    return None


# ── commands ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Command:
    """A line of a console block, and what it is to print."""

    line: str
    output: list[str]

    @property
    def is_in_background(self) -> bool:
        """Whether it runs until the end of the page."""
        return self.line.endswith(" &")

    @property
    def is_worker(self) -> bool:
        """Whether it has to become ready."""
        return re.search(r"\bcelery\b.* worker\b", self.line) is not None


def commands_of(block: str) -> list[Command]:
    """What a console block says."""
    found: list[Command] = []
    is_open = False
    for line in block.splitlines():
        if is_open:
            found[-1].line += "\n" + line
        elif line.startswith("$ "):
            found.append(Command(line[2:], []))
        elif found:
            found[-1].output.append(line)
        elif line.strip():
            raise Broken(f"output before any command, which begins with '$ ': {line!r}")
        is_open = line.endswith("\\")
    return found


class Background:
    """A command that runs until the end of the page."""

    def __init__(self, line: str) -> None:
        self.line = line
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._follower = threading.Thread(target=self._follow)
        self._follower.start()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(f"    | {line}", end="", flush=True)
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, promised: list[str]) -> None:
        """Wait until it has printed all this."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or _missing(promised, self._lines) is None, PATIENCE
            )
            missing = _missing(promised, self._lines)
        if missing is not None:
            raise Broken(f"{self.line}: it has not printed {missing!r}")

    def stop(self) -> None:
        """Ask it to end, and see that it does."""
        try:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise Broken(f"{self.line}: it did not end") from None
        finally:
            self._follower.join(5)


def _pip_install(line: str) -> None:
    """See that all is there that a page would install; the extras of ours exist."""
    own = importlib.metadata.metadata("isolated-tasks").get_all("Provides-Extra") or []
    for word in shlex.split(line)[2:]:
        if word.startswith("-"):
            continue
        wanted = Requirement(re.sub(r"^\.(?=$|\[)", "isolated-tasks", word))
        version = importlib.metadata.version(wanted.name)
        if not wanted.specifier.contains(version, prereleases=True):
            raise Broken(f"{word}: {version} is installed")
        if wanted.name == "isolated-tasks" and not wanted.extras <= set(own):
            raise Broken(f"{word}: the extras are {', '.join(own)}")


# ── files ───────────────────────────────────────────────────────────────────────────────────────

#: The instructions that there are.
_DOCKERFILE = re.compile(
    "ADD|ARG|CMD|COPY|ENTRYPOINT|ENV|EXPOSE|FROM|HEALTHCHECK|LABEL|ONBUILD|RUN|SHELL|STOPSIGNAL"
    "|USER|VOLUME|WORKDIR"
)


def _dockerfile(text: str) -> None:
    joined = re.sub(r"\\\n", " ", text)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    words = [line.split()[0] for line in lines]
    if not words or words[0] not in ("FROM", "ARG") or not all(map(_DOCKERFILE.fullmatch, words)):
        raise Broken(f"no Dockerfile: {words}")


def _ini(text: str) -> None:
    parser = configparser.RawConfigParser(strict=False, allow_no_value=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    if parser.has_section("Service"):
        _unit(text)


#: What systemd knows since 254, and older ones ignore.
_NEW_IN_UNITS = ("'DelegateSubgroup'",)


def _unit(text: str) -> None:
    if shutil.which("systemd-analyze") is None:
        print("    there is no systemd-analyze")
        return
    # The programs of a unit are not on this machine, and a part of one starts nothing.
    text = re.sub(r"(?m)^(Exec\w+=[-@:+!]*)\S+", r"\1/bin/true", text)
    if "ExecStart=" not in text:
        text = text.replace("[Service]\n", "[Service]\nExecStart=/bin/true\n")
    Path("page.service").write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", "./page.service"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    complaints = [
        line
        for line in checked.stderr.splitlines()
        if "page.service" in line and not any(key in line for key in _NEW_IN_UNITS)
    ]
    if checked.returncode or complaints:
        raise Broken("systemd-analyze: " + "\n".join(complaints or [checked.stderr]))


# ── the page ────────────────────────────────────────────────────────────────────────────────────


class Page:
    """Runs one page.

    Args:
        path: of the page.
        urls: what stands in for each URL.
    """

    def __init__(self, path: Path, urls: dict[str, str]) -> None:
        text = path.read_text()
        for given, real in urls.items():
            text = text.replace(given, real)
        # A module, so that functions of the page pickle as those of a script do.
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        self._namespace = vars(module)
        redis = urls.get(REDIS, REDIS)
        self._namespace.update(
            app=Celery("proj", broker=redis, backend=redis), IsolatedTask=IsolatedTask
        )
        self._background: list[Background] = []
        self.document = Document(text, str(path))
        self.document.namespace = self._namespace
        parsers: list[Parser] = [SkipParser()]
        parsers += [CodeBlockParser(name, what(self)) for name, what in LANGUAGES.items()]
        for parser in parsers:
            for region in parser(self.document):
                self.document.add(region)

    def run(self) -> bool:
        """Run all blocks; whether all is well."""
        try:
            is_well = all(map(self._run, self.document)) and self._check_options()
        finally:
            for command in reversed(self._background):
                try:
                    command.stop()
                except Broken as error:
                    print(error)
                    is_well = False
        return is_well

    def _run(self, example: Example) -> bool:
        began = time.monotonic()
        print(f"── {example.path}:{example.line}", flush=True)
        try:
            example.evaluate()
        except unittest.SkipTest as reason:
            print(f"    skipped: {reason}")
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            return False
        print(f"    {time.monotonic() - began:.2f} s", flush=True)
        return True

    def python(self, example: Example) -> None:
        """A block of code, or a file."""
        source = str(example.parsed)
        named = FILE_NAME.match(source)
        if named is None:
            PythonEvaluator()(example)
            return
        path = Path(named[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        module = vars(importlib.import_module(name))
        names = module.get("__all__") or [name for name in module if not name.startswith("_")]
        self._namespace.update((name, module[name]) for name in names)

    def console(self, example: Example) -> None:
        """Commands and their output."""
        for command in commands_of(str(example.parsed)):
            print(f"    $ {command.line}", flush=True)
            if command.is_in_background:
                self._background.append(Background(command.line.removesuffix("&")))
                if command.is_worker:
                    self._background[-1].wait(["ready."])
                self._background[-1].wait(command.output)
            elif re.match(r"pip3? install ", command.line):
                _pip_install(command.line)
            else:
                self._call(command)

    def _call(self, command: Command) -> None:
        called = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command.line],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        print("".join(f"    | {line}\n" for line in called.stdout.splitlines()), end="")
        if called.returncode != 0:
            raise Broken(f"{command.line}: it exited with {called.returncode}")
        missing = _missing(command.output, called.stdout.splitlines())
        if missing is not None:
            raise Broken(f"{command.line}: it has not printed {missing!r}")

    def _check_options(self) -> bool:
        """Have Celery make the tasks that it puts off, and this package look at them."""
        apps = {id(value): value for value in self._namespace.values() if isinstance(value, Celery)}
        try:
            for app in apps.values():
                settings.check_settings(app)
                for task in list(app.tasks.values()):
                    if isinstance(task, IsolatedTask):
                        settings.check_task(task)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            return False
        return True


def _parsed(parse: Callable[[str], object]) -> Callable[[Page], Callable[[Example], None]]:
    def evaluate(example: Example) -> None:
        parse(str(example.parsed))

    return lambda page: evaluate


def _yaml(text: str) -> None:
    if not list(yaml.safe_load_all(io.StringIO(text))):
        raise Broken("there is nothing in it")


#: What happens to a block of each language.
LANGUAGES: dict[str, Callable[[Page], Callable[[Example], None]]] = {
    "python": lambda page: page.python,
    "console": lambda page: page.console,
    "ini": _parsed(_ini),
    "toml": _parsed(tomllib.loads),
    "yaml": _parsed(_yaml),
    "json": _parsed(json.loads),
    "dockerfile": _parsed(_dockerfile),
    # So that a skip that stands before one does not skip the block after it.
    "text": _parsed(len),
}


@contextlib.contextmanager
def _working_folder() -> Iterator[None]:
    examples = Path("examples")
    examples.symlink_to(ROOT / "examples")
    sys.path.insert(0, os.getcwd())
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Tests may run as root, and Celery refuses that for some settings without being told.
    os.environ["C_FORCE_ROOT"] = "1"
    # A worker says that it is ready at this level, and is not told to by each page.
    os.environ["CELERY_WORKER_LOGLEVEL"] = "INFO"
    yield


def _main() -> int:
    parser = argparse.ArgumentParser(description="Run the code blocks of a page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("--redis", default=REDIS)
    parser.add_argument("--amqp", default=AMQP)
    arguments = parser.parse_args()
    with _working_folder():
        return not Page(arguments.page, {REDIS: arguments.redis, AMQP: arguments.amqp}).run()


if __name__ == "__main__":
    sys.exit(_main())
