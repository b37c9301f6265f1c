"""What a side has shown of each row, in a form in which two sides can be compared.

The observation of a row is a tree of plain values:

    sent      what its `send` returned or raised
    followed, looked   the same of its `follow` and `look`
    results   for a result that was sent: state, value, and the tree of its children
    tasks     by the symbol of a task, `module.function(args)`:
        meta      what the result backend holds, raw
        runs      how often its body began
        signals   signals, hooks and notes in order, for each attempt and kind of process
        events    Celery's events
        log       what the worker has logged about it, by process
        left      how many of its messages were still in the broker at the end

Ids, process ids, times, addresses and names of machines are replaced by symbols.
"""

import json
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from celery.result import AsyncResult, GroupResult, ResultBase

from contract.features import reports_all
from contract.recorder import describe
from contract.side import Side
from contract.table import Row, Seen
from isolated_tasks.usage import EVENT

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_ENTRY = re.compile(r"(?m)^\[\d{4}-\d\d-\d\d [\d:,]+: (\w+)/([\w:-]+)\] ?")

_PRINTED = re.compile(r"\n*worker: \w+ shutdown \(MainProcess\)\n")

_SCRUBBED = (
    (re.compile(r"0x[0-9a-f]{6,}"), "<address>"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?([+-]\d\d:\d\d|Z)?"), "<time>"),
    (re.compile(r"datetime\.datetime\(\d{4}, [^()]*(\([^()]*\))?\)"), "<time>"),
    (re.compile(r"(succeeded in )[\d.e-]+s"), r"\1<time>s"),
    # What an isolated call used, which a plain one does not know.
    (re.compile(r", peak [\d.]+ \w+(, cpu [\d.e+-]+s)?, pid \d+(?=: )"), ""),
    (re.compile(r" \(peak [\d.]+ \w+(, cpu [\d.e+-]+s)?, pid \d+\)"), ""),
    (re.compile(r"'pid': \d+"), "'pid': <pid>"),
    (re.compile(r"gen\d+@[\w.-]+"), "<client>"),
)

#: A chord that fails: what the slot of the member that ended last was handling meanwhile, which is
#: the failure of another one or nothing, as it happens.
_BEFORE_CHORD_ERROR = re.compile(
    r"Traceback \(most recent call last\):\n(?:(?!Traceback).*\n)+?\n"
    r"During handling of the above exception, another exception occurred:\n\n"
    r"(?=Traceback \(most recent call last\):\n(?:  .*\n)*celery\.exceptions\.ChordError)"
)

#: Two greenlets that both wait for their worker's first result both start Celery's drainer, and the
#: second one's trips over the first (celery/backends/asynchronous.py, `greenletDrainer.start`).
#: eventlet prints that on stderr, each line an entry of its own, and everything goes on.
_DRAINER_STARTED_TWICE = re.compile(
    r"WARNING/main: (Traceback \(most recent call last\):$"
    r"|AssertionError: Trying to re-send"
    r"|  File \".*/(celery/backends/asynchronous|eventlet/\w+|eventlet/hubs/\w+)\.py\", line )"
)

#: Of an event; what differs from run to run.
_NOT_COMPARED = {
    "timestamp",
    "local_received",
    "clock",
    "pid",
    "hostname",
    "utcoffset",
    "runtime",
    "uuid",
}

#: Events of the worker itself, which come in order.
_OWN_EVENTS = {
    f"task-{kind}"
    for kind in ("received", "started", "succeeded", "failed", "rejected", "revoked", "retried")
}


def observe(side: Side, rows: Iterable[Row]) -> dict[str, Seen]:
    """Return what a side has shown of each row, by the row's name."""
    return _Observer(side).observe(rows)


def unattributed(side: Side) -> list[str]:
    """What the worker has logged, from WARNING on, that is about no task."""
    return _Observer(side).other_log()


def notes_elsewhere(side: Side) -> int:
    """How many notes were made in a process other than their task's slot."""
    lines = side.lines()
    slots = {(line["id"], line["pid"]) for line in lines if line["name"] == "task_prerun"}
    ids = {id for id, _ in slots}
    return sum(
        line["kind"] == "note" and line["id"] in ids and (line["id"], line["pid"]) not in slots
        for line in lines
    )


class _Observer:
    def __init__(self, side: Side) -> None:
        self.side = side
        self.lines = side.lines()
        self.lines_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in self.lines:
            self.lines_of[line["id"]].append(line)
        self.events_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for event in side.events.seen:
            self.events_of[event.get("uuid", "")].append(event)
        self.rows, self.tasks = self._find_tasks()
        self.symbols = self._find_symbols()
        self.log, self._other_log = self._find_log()

    def observe(self, rows: Iterable[Row]) -> dict[str, Seen]:
        seen = {}
        for row in rows:
            ids = [id for id, name in self.rows.items() if name == row.name]
            values = {
                "sent": self._sent(row),
                "followed": self.side.followed.get(row.name),
                "looked": self.side.looked.get(row.name),
                "results": self._results(self.side.sent.get(row.name)),
                "client": self._client(row),
                "tasks": {self.symbols[id]: self._task(id) for id in ids},
            }
            seen[row.name] = _scrub(self.normal(values), row.scrub)
            first = self.normal(self.symbols[ids[0]]) if ids else None
            seen[row.name]["first"] = _scrub(first, row.scrub)
        return seen

    def other_log(self) -> list[str]:
        return sorted(
            self.normal(entry)
            for entry in self._other_log
            if not entry.startswith(("INFO", "DEBUG")) and not _DRAINER_STARTED_TWICE.match(entry)
        )

    # ── which tasks there were ──────────────────────────────────────────────────────────────────

    def _find_tasks(self) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """By id: the row to which a task belongs, and the first line about it."""
        rows: dict[str, str] = {}
        tasks: dict[str, dict[str, Any]] = {}
        for line in self.lines:
            id = line["id"]
            if id is None:
                continue
            tasks.setdefault(id, line)
            row = line["row"] or rows.get(line["root"])
            if row is not None:
                rows.setdefault(id, row)
        for id, line in tasks.items():
            rows.setdefault(id, rows.get(line["root"]) or "(none)")
        return rows, tasks

    def _find_symbols(self) -> dict[str, str]:
        """By id: task and arguments, and a number where several have the same."""
        symbols: dict[str, str] = {}
        names: dict[tuple[str, str], list[str]] = defaultdict(list)
        for id, line in self.tasks.items():
            headers = line["data"].get("headers", {})
            args = [_unquoted(headers.get(key, "")) for key in ("argsrepr", "kwargsrepr")]
            short = _UUID.sub("<id>", f"{line['task']}{args[0]}{args[1].replace('{}', '')}")
            names[self.rows[id], short].append(id)
        for (_, short), ids in names.items():
            for number, id in enumerate(ids):
                symbols[id] = f"{short}#{number}" if len(ids) > 1 else short
        return symbols

    # ── one task ────────────────────────────────────────────────────────────────────────────────

    def _task(self, id: str) -> Seen:
        lines = self.lines_of[id]
        runs = sum(line["name"] == "task_prerun" for line in lines)
        return {
            "meta": self._meta(id),
            "runs": runs,
            "signals": self._signals(lines),
            "events": self._events(id, in_order=runs <= 1),
            "log": {
                # The consumer receives an attempt while the last one is still at its end.
                process: entries if runs <= 1 else sorted(map(self.normal, entries))
                for process, entries in sorted(self.log.get(id, {}).items())
            },
            "left": self.side.left.count(id),
        }

    def _meta(self, id: str) -> Any:
        backend = self.side.app.backend
        raw = backend.get(backend.get_key_for_task(id))
        if raw is None:
            return None
        # A task may have a backend of its own.
        meta = pickle.loads(raw) if raw[:1] == b"\x80" else json.loads(raw)
        del meta["date_done"]
        if meta["status"] == "STARTED":
            # Of the slot: the tracer stores this before it calls the task.
            assert isinstance(meta["result"].pop("pid"), int)
        return meta

    def _place(self, line: Mapping[str, Any]) -> str:
        if line["row"] is not None:
            return "client"
        # The consumer's own signals come from a thread of the main process in some pools, and
        # have no order among those of the slots.
        if line["name"] in ("task_received", "task_revoked", "task_rejected", "task_unknown"):
            return "consumer"
        is_main = line["pid"] == self.side.worker.pid
        place = "main" if is_main and self.side.pool.startswith("prefork") else "task"
        # The message of the next attempt is published by this one.
        return f"{place} publishes" if "publish" in line["name"] else place

    def _signals(self, lines: list[dict[str, Any]]) -> Seen:
        # An attempt may begin while the epilogue of the last one still runs, in another slot.
        found: Seen = defaultdict(list)
        for line in lines:
            where = f"{self._place(line)}, attempt {line['retries']}, {line['task']}"
            found[where].append([line["name"], line["data"]])
        return dict(sorted(found.items()))

    def _events(self, id: str, *, in_order: bool) -> Seen | None:
        if not reports_all(self.side.pool):
            return None
        found: Seen = defaultdict(list)
        for event in self.events_of[id]:
            if event["type"] == EVENT:
                # Ours, which a plain task has not; tests/celery/test_usage.py is about it.
                continue
            values = self.normal({k: v for k, v in event.items() if k not in _NOT_COMPARED})
            # What a body sends comes from another process, and has no order among these.
            is_own = event["type"] in _OWN_EVENTS
            is_main = is_own and event["hostname"] == self.side.worker.name
            group = "main" if is_main else "others"
            found[group].append(values)
        for group in found:
            if not in_order or group != "main":
                found[group].sort(key=lambda event: json.dumps(event, sort_keys=True, default=str))
        return dict(sorted(found.items()))

    def _client(self, row: Row) -> list[Any]:
        """What was recorded in the client of calls that have no id."""
        return [
            [line["name"], line["data"]]
            for line in self.lines
            if line["row"] == row.name and line["id"] is None
        ]

    # ── the log ─────────────────────────────────────────────────────────────────────────────────

    def _find_log(self) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
        """Entries by task and process, and those about no task."""
        log: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        others = []
        # What the main process prints, and does not log, may stand below anybody's entry.
        parts = _ENTRY.split(_PRINTED.sub("", self.side.worker.log()))
        for level, process, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            place = "main" if process == "MainProcess" else "pool"
            entry = f"{level}/{place}: {text.rstrip()}"
            id = next((found for found in _UUID.findall(text) if found in self.symbols), None)
            # It mentions the task that has failed, but is logged by the one that has ended last.
            if id is None or text.startswith("Chord "):
                others.append(entry)
            else:
                log[id][place].append(entry)
        return log, others

    # ── results ─────────────────────────────────────────────────────────────────────────────────

    def _sent(self, row: Row) -> Any:
        if row.name in self.side.raised:
            return f"raised {describe(self.side.raised[row.name])}"
        sent = self.side.sent[row.name]
        return "a result" if isinstance(sent, ResultBase) else describe(sent)

    def _results(self, result: Any, above: tuple[str, ...] = ()) -> Any:
        """The tree below a result, by what a client sees of it."""
        if isinstance(result, GroupResult):
            return [self._results(member, above) for member in result.results]
        if not isinstance(result, AsyncResult):
            return None
        if result.id in above:
            return f"{result.id} again"  # a retried task is a child of itself
        below = (*above, result.id)
        return {
            "id": result.id,
            "state": result.state,
            "result": describe(result.result),
            "traceback": result.traceback,
            "children": [self._results(child, below) for child in result.children or ()],
            "parent": result.parent.id if result.parent is not None else None,
        }

    # ── without what differs from run to run ────────────────────────────────────────────────────

    def normal(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._normal_text(value)
        if isinstance(value, Mapping):
            return {self.normal(key): self.normal(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.normal(one) for one in value]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        return self._normal_text(describe(value))

    def _normal_text(self, text: str) -> str:
        text = _UUID.sub(lambda match: f"<{self.symbols.get(match[0], 'id')}>", text)
        text = text.replace(self.side.worker.name, "<worker>")
        text = text.replace(self.side.queue, "<queue>")
        for pattern, replacement in _SCRUBBED:
            text = pattern.sub(replacement, text)
        text = own_frames(text) if 'File "' in text else text
        return _BEFORE_CHORD_ERROR.sub("", text)


def _unquoted(text: str) -> str:
    """The string whose repr this is."""
    return text[1:-1] if text[:1] in "'\"" else text


def own_frames(text: str) -> str:
    """Leave out the frames of a traceback that are not of the rows: Celery's, and ours.

    What is left is all that a user knows: the frames of the body with their source, and every
    exception of the chain.
    """
    kept = []
    keep, indent = True, -1
    for line in text.splitlines():
        bare = line.lstrip(" |")
        depth = len(line) - len(bare)
        if bare.startswith('File "'):
            keep, indent = "/contract/rows/" in bare, depth
        elif depth <= indent:
            keep, indent = True, -1
        if keep:
            kept.append(line)
    return "\n".join(kept)


def _scrub(value: Any, patterns: Iterable[tuple[str, str]]) -> Any:
    if isinstance(value, str):
        for pattern, replacement in patterns:
            value = re.sub(pattern, replacement, value)
        return value
    if isinstance(value, dict):
        return {_scrub(key, patterns): _scrub(one, patterns) for key, one in value.items()}
    if isinstance(value, list):
        return [_scrub(one, patterns) for one in value]
    return value


# ── what a row expects ──────────────────────────────────────────────────────────────────────────


def check(seen: Seen, expects: Mapping[str, Any]) -> list[str]:
    """Return one line for each thing that is not as a row expects it.

    What a row may expect, of the first task that its `send` published unless it says otherwise:

        state, result     as the backend holds them; None where it holds nothing
        error             the name of the exception's class
        message           a pattern that is found in the exception's message
        runs, left        see above
        children          how many
        signals           names of signals and hooks in the worker, all attempts, in order
        events            names of events, sorted
        log               a pattern that is found in what was logged about the row
        trace             a pattern that is found in the stored traceback
        notes             all that bodies of this row have noted, sorted
        tasks             how many tasks the row has
        states            the states of all tasks of the row, sorted
        sent, followed, looked   a pattern that is found in them
        check             a function of all that was seen, which returns whether it is right
    """
    return [
        f"{key}: expected {expected!r}, saw {_value(seen, key)!r}"
        for key, expected in expects.items()
        if not _is_unseen(seen, key) and not _is_met(seen, key, expected)
    ]


def _is_unseen(seen: Seen, key: str) -> bool:
    return key == "events" and first_task(seen)["events"] is None


_PATTERNS = frozenset({"message", "log", "trace", "sent", "followed", "looked"})


def _is_met(seen: Seen, key: str, expected: Any) -> bool:
    if key == "check":
        return bool(expected(seen))
    value = _value(seen, key)
    if key in _PATTERNS:
        return value is not None and re.search(expected, str(value)) is not None
    return bool(value == expected)


def first_task(seen: Seen) -> Seen:
    """The first task that the row's `send` published."""
    found: Seen = seen["tasks"][seen["first"]]
    return found


def all_notes(seen: Seen) -> list[str]:
    """What bodies have noted, sorted."""
    noted = [
        value
        for task in seen["tasks"].values()
        for lines in task["signals"].values()
        for name, data in lines
        if name == "note"
        for value in data["values"]
    ]
    noted += [value for name, data in seen["client"] if name == "note" for value in data["values"]]
    return sorted(noted)


def _value(seen: Seen, key: str) -> Any:
    if key == "check":
        return seen
    if key in ("sent", "followed", "looked"):
        return seen[key]
    if key == "notes":
        return all_notes(seen)
    if key == "tasks":
        return len(seen["tasks"])
    if key == "states":
        metas = [task["meta"] for task in seen["tasks"].values()]
        return sorted(meta["status"] if meta else "PENDING" for meta in metas)
    if key == "log":
        return "\n".join(
            entry
            for task in seen["tasks"].values()
            for entries in task["log"].values()
            for entry in entries
        )
    return _of_first(first_task(seen), key)


def _of_first(task: Seen, key: str) -> Any:
    meta = task["meta"] or {}
    if key in ("runs", "left"):
        return task[key]
    if key == "state":
        return meta.get("status")
    if key == "result":
        return meta.get("result")
    if key == "error":
        return meta["result"]["exc_type"] if meta.get("status") in ("FAILURE", "RETRY") else None
    if key == "message":
        return str(meta["result"]["exc_message"]) if meta else None
    if key == "trace":
        return meta.get("traceback")
    if key == "children":
        return len(meta.get("children") or ())
    if key == "signals":
        return [
            name
            for where, lines in task["signals"].items()
            if not where.startswith("client")
            for name, _ in lines
            if name != "note"
        ]
    if key == "events":
        events = [event["type"] for group in task["events"].values() for event in group]
        return sorted(events)
    raise KeyError(f"a row cannot expect {key!r}")


def count_names(seen: Seen) -> Counter[str]:
    """How often each signal, hook and note was recorded, over all tasks of the row."""
    return Counter(
        name
        for task in seen["tasks"].values()
        for lines in task["signals"].values()
        for name, _ in lines
    )
