"""Kills and stops processes of the workers, and starts workers again that have ended."""

import heapq
import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from harness import marks
from soak import ledger
from soak.members import Member, census, children_of, send_signal
from soak.orphans import ORPHAN_SECONDS, Orphans

#: What is done to whom, and how often in comparison.
ATTACKS = {
    ("kill", "child"): 40,
    ("kill", "grandchild"): 4,
    ("kill", "pool process"): 10,
    ("kill", "forkserver"): 10,
    ("kill", "main process"): 5,
    ("stop", "child"): 14,
    ("stop", "pool process"): 6,
    ("stop", "forkserver"): 6,
    ("stop", "main process"): 5,
}

#: For how long processes are stopped, in seconds: well below the visibility timeout, after which
#: Redis gives the messages of a worker that lives to another.
STOP_SECONDS = (0.05, 1.5)
#: How often it is looked for what has ended and what is left, in seconds.
LOOK_SECONDS = 0.25
#: How long a place stays empty, in seconds.
EMPTY_SECONDS = (0.2, 1.5)


@dataclass(order=True)
class _Due:
    at: float
    number: int
    act: Callable[[], None] = field(compare=False)


class Monkey:
    """A thread that does so while the ``with`` block runs.

    Args:
        members: whose workers.
        orphans: told of what is killed, and asked what was left.
        rng: says what is done, to whom, and when.
        every: seconds between two attacks, on average.
        path: of the ledger.
        spared: pids that are not killed, only stopped.
    """

    def __init__(
        self,
        members: Sequence[Member],
        orphans: Orphans,
        *,
        rng: random.Random,
        every: float,
        path: str,
        spared: Callable[[], set[int]] = set,
    ) -> None:
        #: How often what was done to whom.
        self.attacks: dict[tuple[str, str], int] = dict.fromkeys(ATTACKS, 0)
        #: What has gone wrong here, if anything has.
        self.error: BaseException | None = None
        self._members = members
        self._orphans = orphans
        self._rng = rng
        self._every = every
        self._path = path
        self._spared = spared
        self._due: list[_Due] = []
        self._numbers = itertools.count()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monkey")
        self._stopped: dict[int, psutil.Process] = {}
        #: When a process of a worker, by its mark, was last sent on.
        self._awake_since: dict[str, float] = {}
        #: Whose place stays empty for a while.
        self._absent: set[Member] = set()

    def __enter__(self) -> "Monkey":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop attacking; see to the end of what has been begun."""
        self._stopping.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            self._after(LOOK_SECONDS, self._look)
            next_attack = time.monotonic()
            while self._due:
                now = time.monotonic()
                if now >= next_attack and not self._stopping.is_set():
                    next_attack = now + self._attack()
                elif now >= self._due[0].at:
                    heapq.heappop(self._due).act()
                else:
                    time.sleep(0.01)
        except BaseException as exc:
            self.error = exc
        finally:
            for process in list(self._stopped.values()):
                send_signal(process, signal.SIGCONT)

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, _Due(time.monotonic() + seconds, next(self._numbers), act))

    def _note(self, event: str, member: Member, role: str, pid: int) -> None:
        ledger.append(self._path, event, worker=member.worker, role=role, pid=pid)

    def _look(self) -> None:
        """Look for what bodies have left; start workers again that have ended by themselves."""
        if not self._stopping.is_set():
            self._after(LOOK_SECONDS, self._look)
        self._orphans.look_for_bereaved(
            self._members,
            stopped=self._stopped,
            awake_since=lambda mark: self._awake_since.get(mark, 0.0),
        )
        for member in self._members:
            if member.has_ended and member not in self._absent:
                member.start_again()

    # ── attacks ─────────────────────────────────────────────────────────────────────────────────

    def _attack(self) -> float:
        """Attack somebody; in how many seconds to do so again."""
        # Drawn before anything is looked at, so that the sequence depends on the seed alone.
        ((verb, role),) = self._rng.choices(list(ATTACKS), list(ATTACKS.values()))
        share, pause = self._rng.random(), self._rng.uniform(*STOP_SECONDS)
        empty, wait = self._rng.uniform(*EMPTY_SECONDS), self._rng.expovariate(1 / self._every)
        victims = self._victims(verb, role)
        if victims:
            member, victim = victims[int(share * len(victims))]
            if verb == "stop":
                self._stop(member, role, victim, pause)
            elif role == "main process":
                self._kill_worker(member, victim, empty)
            else:
                self._kill(member, role, victim)
        return wait

    def _victims(self, verb: str, role: str) -> list[tuple[Member, psutil.Process]]:
        families = census(self._members)
        spared = self._spared() if verb == "kill" else set()
        victims = [
            (member, process)
            for member in self._members
            for process in families[member.mark].by_role[role]
            if process.pid not in spared
        ]
        if verb == "kill" and role == "main process":
            # Somebody has to serve each queue.
            up = [member.broker for member in self._members if member.is_up]
            victims = [one for one in victims if up.count(one[0].broker) > 1]
        return victims

    def _stop(self, member: Member, role: str, victim: psutil.Process, pause: float) -> None:
        if victim.pid in self._stopped or not send_signal(victim, signal.SIGSTOP):
            return
        self.attacks["stop", role] += 1
        self._note("stopped", member, role, victim.pid)
        self._stopped[victim.pid] = victim
        mark = member.mark

        def go_on() -> None:
            if self._stopped.pop(victim.pid, None) is not None:
                send_signal(victim, signal.SIGCONT)
                self._note("continued", member, role, victim.pid)
            self._awake_since[mark] = time.monotonic()

        self._after(pause, go_on)

    def _kill(self, member: Member, role: str, victim: psutil.Process) -> None:
        doomed = [victim] if role == "child" else []
        if role == "pool process":
            doomed = children_of(victim.pid)
        elif role == "forkserver":
            self._orphans.note_without_forkserver(victim)
        self._orphans.note_killed(doomed)
        # Before: whatever comes of it comes after this in the ledger.
        self._note("killed", member, role, victim.pid)
        if not send_signal(victim, signal.SIGKILL):
            return
        self.attacks["kill", role] += 1
        self._stopped.pop(victim.pid, None)
        if role == "pool process":
            self._expect_gone(f"pool process {victim.pid} of {member.name}", lambda: doomed)

    def _kill_worker(self, member: Member, victim: psutil.Process, empty: float) -> None:
        mark = member.mark
        self._orphans.note_killed(census([member])[mark].by_role["child"])
        self._note("killed", member, "main process", victim.pid)
        if not send_signal(victim, signal.SIGKILL):
            return
        self.attacks["kill", "main process"] += 1
        member.reap()
        # A stopped forkserver could not know.
        for process in marks.marked_processes(mark):
            if self._stopped.pop(process.pid, None) is not None:
                send_signal(process, signal.SIGCONT)
        text = f"main process {victim.pid} of {member.name}"
        self._expect_gone(text, lambda: marks.marked_processes(mark))
        self._absent.add(member)

        def start() -> None:
            self._absent.discard(member)
            member.start()

        self._after(empty, start)

    def _expect_gone(self, of: str, find: Callable[[], Sequence[psutil.Process]]) -> None:
        killed_at = time.monotonic()
        self._after(
            ORPHAN_SECONDS,
            lambda: self._orphans.look_at(of, find(), time.monotonic() - killed_at),
        )
