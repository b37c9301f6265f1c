"""What `celery isolated top` shows, drawn with rich.

Names and ids come from whoever has sent a task: nothing in them is markup, or a command to the
terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

__all__ = ["Draw", "screen", "show", "view"]

_UNKNOWN = "?"


class Draw(Protocol):
    """Shows what has been found in the place of what was shown before."""

    def __call__(self, answers: dict[str, dict[str, Any]], *, trouble: str = "") -> None:
        """Show it.

        Args:
            answers: Of each worker, see `isolated_tasks.remote.isolated`.
            trouble: Why there are no others.
        """


def show(answers: dict[str, dict[str, Any]], *, no_color: bool) -> None:
    """Print it once."""
    Console(no_color=no_color or None).print(view(answers))


@contextmanager
def screen(*, no_color: bool) -> Iterator[Draw]:
    """Take the whole terminal, and give it back as it was."""
    console = Console(no_color=no_color or None)
    with Live(console=console, screen=True, auto_refresh=False) as live:

        def draw(answers: dict[str, dict[str, Any]], *, trouble: str = "") -> None:
            keys = Text("q quits", style="dim")
            live.update(Group(view(answers, trouble=trouble), keys), refresh=True)

        yield draw


def view(answers: dict[str, dict[str, Any]], *, trouble: str = "") -> RenderableType:
    """A line for each worker and forkserver, what is missing, and a table of all children."""
    lines: list[RenderableType] = []
    for worker in sorted(answers):
        lines.extend(_head(worker, answers[worker]))
    if trouble:
        lines.append(_text(trouble, "yellow"))
    return Group(*lines, _table(answers))


def _head(worker: str, answer: dict[str, Any]) -> Iterator[Text]:
    if "error" in answer:
        yield _text(f"{worker}: {answer['error']}", "red")
        return
    yield _text(f"{worker}  pid {answer['pid']}  RSS {_size(answer['rss_bytes'])}", "bold")
    for forkserver in answer["forkservers"]:
        yield _text(f"  {_forkserver(forkserver)}")
    for problem in answer["problems"]:
        yield _text(f"  {problem}", "yellow")


def _forkserver(one: dict[str, Any]) -> str:
    state = one["state"] + (f" ({one['reason']})" if one["reason"] else "")
    parts = [
        f"forkserver pid {one['pid']}",
        state,
        f"up {_duration(one['seconds'])}",
        f"RSS {_size(one['rss_bytes'])}",
        f"{_count(one['starts'])} starts",
        f"{_count(one['failures'])} failures",
    ]
    if one["budget_bytes"] is not None:
        parts.append(f"budget {_size(one['taken_bytes'])} of {_size(one['budget_bytes'])}")
    failed = [entry["name"] for entry in one["preloaded"] if entry["error"]]
    if failed:
        parts.append(f"failed to load {', '.join(failed)}")
    return "  ".join(parts)


def _table(answers: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold reverse", expand=True)
    for name in ("RSS", "LIMIT", "AGE", "CALL", "BATCH", "PID"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("STATE", no_wrap=True)
    table.add_column("TASK", overflow="fold")
    table.add_column("ID", overflow="fold")
    table.add_column("WORKER", overflow="fold")
    for worker, child in _largest_first(answers):
        table.add_row(*map(_text, _child(worker, child)))
    for worker, call in _of_all(answers, "waiting"):
        table.add_row(*map(_text, _waiting(worker, call)), style="yellow")
    return table


def _of_all(answers: dict[str, dict[str, Any]], what: str) -> list[tuple[str, dict[str, Any]]]:
    return [(worker, one) for worker in sorted(answers) for one in answers[worker].get(what, ())]


def _largest_first(answers: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    children = _of_all(answers, "children")
    return sorted(children, key=lambda one: one[1]["rss_bytes"] or 0, reverse=True)


def _child(worker: str, one: dict[str, Any]) -> tuple[str, ...]:
    size = one["batch_size"]
    return (
        _size(one["rss_bytes"]),
        "" if one["memory_limit_bytes"] is None else _size(one["memory_limit_bytes"]),
        _duration(one["seconds"]),
        "" if one["state"] not in ("running", None) else _duration(one["call_seconds"]),
        "" if size == 1 else f"{_count(one['position'])}/{_count(size)}",
        str(one["pid"]),
        one["state"] or _UNKNOWN,
        one["task"] or _UNKNOWN,
        one["id"] or "",
        worker,
    )


def _waiting(worker: str, one: dict[str, Any]) -> tuple[str, ...]:
    needed, age = _size(one["needed_bytes"]), _duration(one["seconds"])
    return ("", needed, age, "", "", "", "waits", one["task"], one["id"] or "", worker)


def _text(text: str, style: str = "") -> Text:
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), style)


def _count(number: int | None) -> str:
    return _UNKNOWN if number is None else str(number)


def _size(size: int | None) -> str:
    if size is None:
        return _UNKNOWN
    return f"{size / 2**30:.1f} GiB" if size >= 10 << 30 else f"{size / 2**20:.0f} MiB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours < 24:
        return f"{hours}:{minutes % 60:02}:{int(seconds % 60):02}"
    return f"{hours // 24} d {hours % 24} h"
