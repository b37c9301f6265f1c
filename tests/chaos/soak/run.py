"""One soak, from the first worker's start to the last one's end."""

import contextlib
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness import marks
from harness.app import Settings, close_app, make_app
from harness.services import delete_amqp_entities, delete_redis_keys, find_amqp, redis_service
from soak import accounts, growth
from soak.book import Worker
from soak.kinds import PLAIN_VARIABLE
from soak.load import Load, Queue
from soak.members import Member, census, kill_everything
from soak.monkey import ATTACKS, Monkey
from soak.orphans import Orphans
from soak.report import Report

#: After this long Redis gives a message that was not acknowledged to another worker, in seconds.
VISIBILITY_TIMEOUT = 10.0
START_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0
DRAIN_TIMEOUT = 60.0
#: A batch process that nobody needs has gone after this long, and all others long before.
REST_TIMEOUT = 10.0
#: A forkserver that was killed has a successor that serves after this long, in seconds.
SUCCESSION_SECONDS = 15.0

Say = Callable[[str], object]


@dataclass(frozen=True)
class Options:
    """What soak to run."""

    seed: int
    #: Of load and chaos, in seconds.
    seconds: float
    brokers: Sequence[str] = ("redis", "amqp")
    #: Of each queue's workers, one for each.
    pools: Sequence[str] = ("prefork", "threads")
    #: Calls a second, and how many may be under way.
    rate: float = 28.0
    limit: int = 50
    #: Load without chaos before the first rest, in seconds.
    warm_up: float = 5.0
    #: Seconds between two attacks, on average.
    every: float = 0.5
    #: Seconds from one rest to the next.
    rest_every: float = 300.0
    #: With Celery's own tasks, to see whose fault something is.
    plain: bool = False


def run(options: Options, folder: Path, say: Say = print) -> Report:
    """Run a soak.

    Args:
        options: which.
        folder: for the ledger and the workers' logs.
        say: told how far it is.
    """
    with contextlib.ExitStack() as stack:
        return _Soak(options, folder, say, stack).run()


class _Soak:
    def __init__(
        self, options: Options, folder: Path, say: Say, stack: contextlib.ExitStack
    ) -> None:
        self._options = options
        self._say = say
        self._path = str(folder / "ledger.jsonl")
        self._began = time.monotonic()
        self._shared_memory = growth.shared_memory()
        # Not in the folder, whose name may be long: the path of a socket may have 107 bytes.
        self._temporary = Path(tempfile.mkdtemp(prefix="soak-"))
        stack.callback(shutil.rmtree, self._temporary, ignore_errors=True)
        redis_url = stack.enter_context(redis_service())
        self._members: list[Member] = []
        queues = []
        for broker in options.brokers:
            settings = self._settings(broker, redis_url, stack)
            app = make_app("client", settings)
            stack.callback(close_app, app)
            queues.append(Queue(broker, app))
            self._members += [
                self._member(broker, pool, settings, folder) for pool in options.pools
            ]
        stack.callback(kill_everything, self._members)
        self._load = Load(
            queues,
            rng=random.Random(f"load {options.seed}"),
            rate=options.rate,
            limit=options.limit,
            path=self._path,
            plain=options.plain,
        )
        stack.callback(self._load.close)
        self._rng = random.Random(f"monkey {options.seed}")
        self._scales = growth.Scales()
        self._left: list[str] = []
        self._files: dict[str, str] = {}
        self._orphans = Orphans()
        self._attacks = dict.fromkeys(ATTACKS, 0)
        self._spared: set[int] = set()

    def _settings(self, broker: str, redis_url: str, stack: contextlib.ExitStack) -> Settings:
        name = f"soak-{broker}-{random.SystemRandom().randbytes(4).hex()}"
        conf = {}
        if broker == "redis":
            conf["broker_transport_options"] = {
                "visibility_timeout": VISIBILITY_TIMEOUT,
                # Of our own: others may use this server, and wait for longer.
                **{key: f"{name}-{key}" for key in _REDIS_KEYS},
            }
        url = redis_url if broker == "redis" else find_amqp()
        settings = Settings(broker_url=url, result_backend=redis_url, name=name, conf=conf)
        if broker == "redis":
            stack.callback(delete_redis_keys, url, name)
        else:
            stack.callback(delete_amqp_entities, url, queue=name, exchanges=settings.exchanges)
        return settings

    def _member(self, broker: str, pool: str, settings: Settings, folder: Path) -> Member:
        environment = {"TMPDIR": str(self._temporary)}
        if self._options.plain:
            environment[PLAIN_VARIABLE] = "1"
        return Member(
            broker,
            pool=pool,
            settings=settings,
            folder=folder,
            path=self._path,
            environment=environment,
        )

    # ── the phases ──────────────────────────────────────────────────────────────────────────────

    def run(self) -> Report:
        for member in self._members:
            member.start()
        self._wait_ready()
        self._load.send_for(self._options.warm_up)
        self._rest()
        self._spared = self._choose_spared()
        left = self._options.seconds
        while left > 0:
            # No crumbs at the end.
            round_ = left if left < 1.5 * self._options.rest_every else self._options.rest_every
            self._chaos(round_)
            self._rest()
            left -= round_
        not_stopped = self._stop()
        self._load.finish()
        settled = accounts.settle(
            self._load.book,
            visibility_timeout=VISIBILITY_TIMEOUT,
            plain=self._options.plain,
        )
        if self._orphans.escaped:
            what = "process elsewhere of a killed child whose forkserver was dead"
            settled.admitted[what] = self._orphans.escaped
        return Report(
            seed=self._options.seed,
            seconds=self._options.seconds,
            accounts=settled,
            attacks=self._attacks,
            orphans=self._orphans.found,
            left=self._left,
            growths=self._scales.growths(),
            files=list(self._files.values()) + self._new_shared_memory(),
            crashes={one.log.name: growth.crashes(one.log) for one in self._members},
            not_stopped=not_stopped,
            notes={
                "workers": ", ".join(member.name for member in self._members),
                "took": f"{time.monotonic() - self._began:.0f} s",
            },
        )

    def _chaos(self, seconds: float) -> None:
        monkey = Monkey(
            self._members,
            self._orphans,
            rng=self._rng,
            every=self._options.every,
            path=self._path,
            spared=lambda: self._spared,
        )
        with monkey:
            self._load.send_for(seconds, until=lambda: monkey.error is not None)
        for attack, count in monkey.attacks.items():
            self._attacks[attack] += count
        self._wait_ready()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not self._load.wait_ready([one.worker for one in self._members], 1.0):
            for member in self._members:
                if member.has_ended:
                    member.start_again()
            if time.monotonic() > deadline:
                raise TimeoutError(f"not ready after {START_TIMEOUT:g} s: one of {self._members}")

    def _rest(self) -> None:
        """Wait until nothing runs; note what is there that should not be, and weigh the rest."""
        drained = self._load.drain(DRAIN_TIMEOUT)
        self._say(f"{self._now():6.0f} s  {len(self._load.book.calls)} calls")
        if not drained:
            waiting = ", ".join(f"{one.kind} {one.id}" for one in self._load.open.values())
            self._say(f"          without an end so far: {waiting}")
        for process in self._wait_for_rest():
            self._left.append(marks.describe(process))
            marks.kill([process])
        self._scales.weigh(self._members, self._now())
        self._look_for_files({member.worker for member in self._members})

    def _wait_for_rest(self) -> list[psutil.Process]:
        deadline = time.monotonic() + REST_TIMEOUT
        while True:
            busy = [
                process
                for family in census(self._members).values()
                for role, processes in family.by_role.items()
                if role not in growth.LASTING
                for process in processes
            ]
            if not busy or time.monotonic() > deadline:
                return busy
            time.sleep(0.2)

    def _choose_spared(self) -> set[int]:
        """Some that live from the first rest to the last: of each queue one main process.

        And of one the forkserver, of another one pool process.
        """
        spared = set()
        families = census(self._members)
        for index, broker in enumerate(self._options.brokers):
            members = [member for member in self._members if member.broker == broker]
            family = families[members[(self._options.seed + index) % len(members)].mark]
            others = family.by_role["pool process"] or family.by_role["forkserver"]
            spared |= {one.pid for one in (*family.by_role["main process"], *others[:1])}
        return spared

    def _stop(self) -> list[str]:
        late = [member.name for member in self._members if not member.stop(STOP_TIMEOUT)]
        marked = [process for one in self._members for process in marks.marked_processes(one.mark)]
        self._left += [marks.describe(one) for one in marks.wait(marked, timeout=2.0)]
        self._left += kill_everything(self._members)
        self._look_for_files(set())
        return late

    def _now(self) -> float:
        return time.monotonic() - self._began

    # ── files ───────────────────────────────────────────────────────────────────────────────────

    def _look_for_files(self, living: set[str]) -> None:
        workers = self._load.book.workers.values()
        found = growth.folders(self._temporary)
        nameless: list[str] = []
        for name in found["ours"]:
            owner = next((one for one in workers if Path(one.folder).name == name), None)
            if owner is None:
                nameless.append(name)
            elif owner.name not in living and not _was_without_forkserver(owner):
                self._files[name] = f"{name} of {owner.broker}-{owner.pool}, {owner.kills[-3:]}"
        # That of a worker that was killed before it was ready: its forkserver may still have been
        # loading, and nobody knows the folder's name.
        excused = sum(one.ready_at is None and one.killed_at is not None for one in workers)
        for name in nameless[excused:]:
            self._files[name] = f"{name}, of nobody"
        for name in found["others"]:
            self._files[name] = name

    def _new_shared_memory(self) -> list[str]:
        return sorted(growth.shared_memory() - self._shared_memory)


_REDIS_KEYS = ("unacked_key", "unacked_index_key", "unacked_mutex_key")


def _was_without_forkserver(worker: Worker) -> bool:
    """Whether the main process went when there was no forkserver to clear up after it."""
    killed_at = worker.killed_at
    return killed_at is not None and any(
        role == "forkserver" and 0 <= killed_at - at < SUCCESSION_SECONDS
        for at, role, _ in worker.kills
    )
