"""What is known of each call and each worker, put together from the ledger."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

FINAL = ("SUCCESS", "FAILURE", "REVOKED")

Event = Mapping[str, Any]


@dataclass(frozen=True)
class End:
    """What the result backend says of a call that has ended."""

    state: str
    #: Of a success: whether it is the result of this very call.
    is_right: bool = True
    #: Of a failure: the class of the error, its words, and those of its attributes that it has.
    error: str = ""
    text: str = ""
    pid: int | None = None
    started: bool | None = None
    redeliveries: int | None = None


@dataclass
class Call:
    """One call, by its id."""

    id: str
    kind: str = ""
    promise: str = ""
    broker: str = ""
    token: str = ""
    #: Of the call whose body, or whose slot, has sent it.
    parent: str | None = None
    events: list[Event] = field(default_factory=list)
    end: End | None = None
    #: Where a second look some time later saw another one.
    later_end: End | None = None

    def all(self, *names: str) -> Iterator[Event]:
        """Its events of these names, in order."""
        return (event for event in self.events if event["event"] in names)

    def count(self, name: str, **values: Any) -> int:
        """How many events of a name have these values."""
        return sum(
            all(event.get(key) == value for key, value in values.items())
            for event in self.all(name)
        )

    @property
    def was_sent(self) -> bool:
        """Whether its message has been given to the broker, as far as anybody could tell."""
        return any(self.all("sent", "published"))


@dataclass
class Worker:
    """One worker, from its start to its end."""

    name: str
    broker: str = ""
    pool: str = ""
    ready_at: float | None = None
    #: Where its forkserver's socket is.
    folder: str = ""
    #: Time, role and pid of each process of it that was killed.
    kills: list[tuple[float, str, int]] = field(default_factory=list)
    #: Its exit code, and when that was seen, where its main process has ended by itself.
    exit_code: int | None = None
    exited_at: float | None = None

    @property
    def killed_at(self) -> float | None:
        """When its main process was killed; None where it was not."""
        return next((at for at, role, _ in self.kills if role == "main process"), None)

    @property
    def ended_at(self) -> float | None:
        """When its main process was killed or has ended by itself."""
        return self.exited_at if self.killed_at is None else self.killed_at

    def killed(self, role: str) -> set[int]:
        """The pids of all processes of a role that were killed."""
        return {pid for _, one, pid in self.kills if one == role}


class Book:
    """Every call and every worker."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        self.workers: dict[str, Worker] = {}

    def feed(self, event: Event) -> None:
        """Take note of one event."""
        name = event["event"]
        if "worker" in event and event["worker"] not in self.workers:
            self.workers[event["worker"]] = Worker(event["worker"])
        if "id" in event:
            call = self.calls.setdefault(event["id"], Call(event["id"]))
            call.events.append(event)
            if name == "sent":
                for key in ("kind", "promise", "broker", "token", "parent"):
                    setattr(call, key, event[key])
            elif name == "published" and not call.kind:
                self._know_launched(call, event)
        elif name == "started":
            worker = self.workers[event["worker"]]
            worker.broker, worker.pool = event["broker"], event["pool"]
        elif name == "ready":
            worker = self.workers[event["worker"]]
            worker.ready_at, worker.folder = event["t"], event["folder"]
        elif name == "exited":
            worker = self.workers[event["worker"]]
            worker.exit_code, worker.exited_at = event["code"], event["t"]
        elif name == "killed":
            self.workers[event["worker"]].kills.append((event["t"], event["role"], event["pid"]))

    def _know_launched(self, call: Call, event: Event) -> None:
        """One that a body has sent: nobody else has told of it."""
        parent = self.calls.get(event["parent"])
        if parent is not None and parent.kind == "launch":
            call.kind, _, call.promise = event["name"].partition(".")
            call.broker, call.parent = parent.broker, parent.id
            call.token = f"{parent.token}/launched"
