"""What the reference says, taken from the code; cog writes it into the pages.

A page has ``<!-- [[[cog … ]]] -->`` with a call of one of these functions, and what that prints
below. `make reference` writes the pages anew; the tests refuse one that is not what the code says.

The words of tables are comments (``#:``) and docstrings of the code.
"""

import ast
import dataclasses
import enum
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

import click
from celery.bin.worker import worker
from prometheus_client import CollectorRegistry
from sphinx.pycode import ModuleAnalyzer

from isolated_tasks import audit, prometheus, settings, usage
from isolated_tasks.commands import isolated
from isolated_tasks.process import lifecycle, protocol
from isolated_tasks.process.child import ExitCode
from isolated_tasks.process.usage import ExitReason, Usage


def _out(text: str) -> None:
    # There while cog runs a page, and not otherwise.
    import cog

    cog.outl(text)


def comments(module: str, owner: str) -> dict[str, str]:
    """The ``#:`` comments of a class, by attribute, as Markdown."""
    found = ModuleAnalyzer.for_module(module).find_attr_docs()
    return {
        name: markdown(" ".join(filter(None, lines)))
        for (cls, name), lines in found.items()
        if cls == owner
    }


def markdown(text: str) -> str:
    """A docstring's text: code in single backticks, and no bar that would end a cell."""
    return re.sub(r"``([^`]*)``", r"`\1`", text).replace("|", "\\|").strip()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    _out("")
    for row in [head, ["---"] * len(head), *rows]:
        _out(f"| {' | '.join(row)} |")
    _out("")


def size(value: int) -> str:
    """A number of bytes, in the largest unit that leaves it whole."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value and value % (1 << power) == 0:
            return f"{value >> power} {unit}"
    return f"{value}"


def default_of(name: str, value: Any) -> str:
    """A default as a page has it."""
    if name == "max_result_bytes":
        return size(value)
    return "none" if value is None or value == () else f"`{value!r}`"


def options() -> None:
    """Each option of a task: its setting, its default, and what its comment says."""
    words = comments("isolated_tasks.task", "IsolatedMixin")
    _table(
        ["option", "setting", "default", "meaning"],
        (
            [f"`{name}`", f"`{settings._setting_of(name)}`", default_of(name, value), words[name]]
            for name, value in settings.TASK_OPTIONS.items()
        ),
    )


def app_settings() -> None:
    """Each setting of an app that is no option of a task."""
    words = comments("isolated_tasks.settings", "WorkerSettings")
    rows = []
    for field in sorted(dataclasses.fields(settings.WorkerSettings), key=lambda field: field.name):
        name = f"isolated_{field.name}"
        text = words[field.name].removeprefix(f"`{name}`").lstrip(":. ")
        rows.append([f"`{name}`", default_of(field.name, field.default), text])
    _table(["setting", "default", "meaning"], rows)


def usage_fields() -> None:
    """The fields of `Usage`."""
    words = comments("isolated_tasks.process.usage", "Usage")
    hints = {field.name: str(field.type) for field in dataclasses.fields(Usage)}
    rows = [[f"`{name}`", f"`{hints[name]}`".replace("|", "\\|"), words[name]] for name in hints]
    prop = Usage.cpu_seconds
    rows.append(["`cpu_seconds`", "`float \\| None`", markdown(inspect.getdoc(prop) or "")])
    _table(["field", "type", "meaning"], rows)


def exit_reasons() -> None:
    """How a call may end."""
    _enum("isolated_tasks.process.usage", ExitReason, "exit reason")


def _enum(module: str, cls: type[enum.Enum], title: str) -> None:
    words = comments(module, cls.__name__)
    _table([title, "meaning"], ([f"`{one.value}`", words[one.name]] for one in cls))


def exit_codes() -> None:
    """The exit codes that a child has of its own."""
    words = comments("isolated_tasks.process.child", "ExitCode")
    rows = ([f"`{int(code)}`", f"`{code.name}`", words[code.name]] for code in sorted(ExitCode))
    _table(["exit code", "name", "meaning"], rows)


def isolated_event() -> None:
    """The fields of the event about a call, as they are sent."""
    words = comments("isolated_tasks.process.usage", "Usage")
    sample = Usage(
        *(1, 1, 1, 1, 1.0, 1.0, 1.0, 1.0, 1, 1), "forkserver", 1, ExitReason.RETURNED, None
    )
    names = {name: "pid" if name == "child_pid" else name for name in usage.fields(sample)}
    _table(["field", "meaning"], ([f"`{name}`", words[of]] for name, of in names.items()))


def audit_event() -> None:
    """The fields of the audit's event, which its module describes."""
    text = (audit.__doc__ or "").split("are bytes:")[1].split("\n\nWhere calls")[0]
    rows = re.findall(r"^(``.*?)\s{2,}(.+)$", text, re.M)
    _table(["field", "meaning"], ([markdown(cell) for cell in row] for row in rows))


def metrics() -> None:
    """The metrics, as a registry shows them."""
    registry = CollectorRegistry()
    prometheus.register(registry)
    described = {family.name: family for family in registry.collect()}
    listed = re.findall(r"^``(isolated\w+)`` +(\w+) *(.*)$", prometheus.__doc__ or "", re.M)
    rows = []
    for name, kind, labels in listed:
        family = described[name.removesuffix("_total")]
        assert family.type == kind, name
        rows.append([f"`{name}`", kind, markdown(labels), family.documentation])
    assert len(rows) == len(described)
    _table(["metric", "type", "labels", "what"], rows)


def buckets() -> None:
    """The upper bounds of each histogram's buckets."""
    rows = [
        ["`…_peak_memory_bytes`", ", ".join(size(int(one)) for one in prometheus.MEMORY_BUCKETS)],
        ["`…_startup_seconds`", ", ".join(f"{one:g}" for one in prometheus.STARTUP_BUCKETS)],
        ["`…_run_seconds`", ", ".join(f"{one:g}" for one in prometheus.RUN_BUCKETS)],
    ]
    _table(["histogram", "buckets"], rows)


def commands() -> None:
    """The commands of the `celery` program, with their options."""
    context = click.Context(isolated, info_name="celery isolated")
    for name in isolated.list_commands(context):
        command = isolated.get_command(context, name)
        assert command is not None
        _out(f"\n## celery isolated {name}\n\n{markdown(inspect.cleandoc(command.help or ''))}")
        _table(["option", "meaning"], _options(command))
    _out("\n## celery worker\n\nHas one option more where this package is installed:")
    _table(["option", "meaning"], (row for row in _options(worker) if "--memory-audit" in row[0]))


def _options(command: click.Command) -> Iterable[Sequence[str]]:
    for option in command.params:
        if isinstance(option, click.Option) and option.help:
            names = ", ".join(f"`{name}`" for name in option.opts)
            default = option.default if option.show_default is True else None
            text = markdown(option.help)
            yield names, f"{text} Default: {default:g}." if default is not None else text


def inspect_isolated() -> None:
    """What `inspect isolated` answers."""
    from isolated_tasks import remote

    text = inspect.cleandoc(remote.isolated.__doc__ or "").split("Returns:\n")[1]
    _out("\n" + markdown(inspect.cleandoc(text)) + "\n")


def states() -> None:
    """The states of a child, the events, and what follows what: a list, and the table."""
    _enum("isolated_tasks.process.lifecycle", lifecycle.State, "state")
    _enum("isolated_tasks.process.lifecycle", lifecycle.Event, "event")


def diagram() -> None:
    """Each state with its ways out, as text."""
    _out("\n```text")
    for state, ways in lifecycle.TRANSITIONS.items():
        by_target: dict[lifecycle.State, list[str]] = {}
        for event, target in ways.items():
            by_target.setdefault(target, []).append(event.value)
        for number, (target, events) in enumerate(by_target.items()):
            left = state.value if number == 0 else ""
            to = "(stays)" if target is state else target.value
            _out(f"{left:8} ── {', '.join(events)} ──► {to}")
    _out("```\n")


def specification() -> None:
    """The docstring of the protocol."""
    text = inspect.cleandoc(protocol.__doc__ or "").split("\n\n", 1)[1]
    _out("\n```text\n" + text.replace("::\n", ":\n") + "\n```\n")


def messages() -> None:
    """Each message with its fields."""
    for cls, kind in sorted(protocol._KIND_OF.items(), key=lambda item: item[1]):
        words = comments("isolated_tasks.process.protocol", cls.__name__)
        _out(f"\n### {cls.__name__}\n\nKind {int(kind)}. {markdown(cls.__doc__ or '')}")
        rows = [
            [f"`{field.name}`", f"`{field.type}`".replace("|", "\\|"), words.get(field.name, "")]
            for field in dataclasses.fields(cls)
        ]
        if rows:
            _table(["field", "type", "meaning"], rows)


def fixtures() -> None:
    """The fixtures of the testing aid, with the first line of their docstrings."""
    from isolated_tasks.testing import plugin

    functions = ast.parse(inspect.getsource(plugin)).body
    words = {
        function.name: (ast.get_docstring(function) or "").splitlines()[0]
        for function in functions
        if isinstance(function, ast.FunctionDef) and function.name in plugin.__all__
    }
    _table(["fixture", "what"], ([f"`{name}`", markdown(words[name])] for name in plugin.__all__))
