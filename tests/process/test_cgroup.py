"""The kernel holds the memory limit of a group of processes, and of each child.

Everything here needs a part of a real hierarchy to make groups in, of version 1 or of version 2; a
machine has the control of memory in one of them.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import bodies
from harness.processes import (
    PATIENCE,
    Background,
    Mailbox,
    Slot,
    Word,
    survivors,
    wait_gone,
)
from isolated_tasks.errors import ChildLostError, MemoryLimitExceeded
from isolated_tasks.process import cgroup, memory
from isolated_tasks.process.cgroup import Delegation, Group, NoPlaceError
from isolated_tasks.process.launcher import Launcher

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]

MiB = 1 << 20

#: Some user that is not root, and has no processes.
NOBODY = 65534

#: Allocates as told, a number of bytes a line, all at once, and says so.
BODY = """
import mmap, sys
held = []
print("ready", flush=True)
for line in sys.stdin:
    held.append(mmap.mmap(-1, int(line), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    held[-1][::4096] = b"x" * (len(held[-1]) // 4096)
    print("held", flush=True)
"""

#: Forks a child and tells its pid; the child stays, the parent allocates as it is told.
FAMILY = """
import mmap, os, signal, sys
pid = os.fork()
if pid == 0:
    signal.pause()
print(pid, flush=True)
held = mmap.mmap(-1, int(sys.stdin.readline()), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held[::4096] = b"x" * (len(held) // 4096)
"""

#: Looks for a place once it has been moved, as another user if it is told to.
FINDER = """
import ctypes, os, sys
from pathlib import Path
from isolated_tasks.process import cgroup
from isolated_tasks.process.cgroup import Delegation, NoPlaceError
print("ready", flush=True)
user, namespace, mount, systemd = sys.stdin.readline().split()
cgroup._SYSTEMD = Path("/" if systemd == "systemd" else "/nonesuch")
if namespace == "own":
    libc = ctypes.CDLL(None, use_errno=True)
    # CLONE_NEWNS and CLONE_NEWCGROUP: the group it is in now is the root that it sees.
    assert libc.unshare(0x00020000 | 0x02000000) == 0, ctypes.get_errno()
    assert libc.mount(None, b"/", None, (1 << 14) | (1 << 18), None) == 0, ctypes.get_errno()
    # MNT_DETACH: there is no mounting it over itself.
    assert libc.umount2(mount.encode(), 2) == 0, ctypes.get_errno()
    assert libc.mount(b"cgroup2", mount.encode(), b"cgroup2", 0, None) == 0, ctypes.get_errno()
    print("inside", flush=True)
    sys.stdin.readline()
if int(user):
    os.setgroups([])
    os.setgid(int(user))
    os.setuid(int(user))
try:
    found = Delegation.find()
except NoPlaceError as exc:
    print("nowhere", exc)
else:
    group = found.create("found", 64 << 20)
    try:
        group.add(os.getpid())
        moved = os.getpid() in group.pids()
    finally:
        for name in ("worker", "isolated_worker"):
            if (found.folder / name).exists():
                (found.folder / name / "cgroup.procs").write_text("0")
        group.remove()
    print(found.version, found.folder, moved, group.folder.exists())
"""

Start = Callable[..., subprocess.Popen[str]]


def purge(folder: Path) -> None:
    """Remove groups that a test has made, with whatever is in them."""
    group = Group(folder, 2)
    group.kill()
    wait_gone(group.pids())
    assert group.remove(), f"still there: {folder}"


def is_one_of(forkserver: int, name: str) -> bool:
    return re.fullmatch(rf"isolated-{forkserver}-\d+", name) is not None


def remains(folder: Path) -> list[Path]:
    return list(folder.glob(f"{cgroup.PREFIX}*"))


def ours(folder: Path) -> list[Path]:
    """Groups that this process has made; others may make theirs at the same place."""
    return list(folder.glob(f"{cgroup.PREFIX}{os.getpid()}-*"))


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts programs, which have said ``ready``; kills them after the test."""
    with contextlib.ExitStack() as stack:

        def run(source: str) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", source],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                )
            )
            stack.callback(process.kill)
            return process

        yield run


def tell(process: subprocess.Popen[str], *words: object) -> None:
    assert process.stdin is not None
    process.stdin.write(" ".join(map(str, words)) + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def is_counted(group: Group) -> bool:
    """Whether the kernel says that it has killed; it counts the first of a whole group twice."""
    count = group.oom_kills()
    assert count is not None
    return count > 0


@pytest.fixture
def unified() -> Iterator[Path]:
    """A new group of version 2 to which the control of memory is passed on."""
    mount = next((g.folder for g in reversed(memory.control_groups()) if g.version == 2), None)
    if mount is None:
        pytest.skip("control groups of version 2 are not mounted")
    if "memory" not in (mount / "cgroup.subtree_control").read_text().split():
        pytest.skip("the control of memory is not with version 2 here")
    folder = mount / f"it-test-{os.urandom(4).hex()}"
    try:
        folder.mkdir()
    except OSError as exc:
        pytest.skip(f"no right to make groups: {exc}")
    try:
        yield folder
    finally:
        purge(folder)


@pytest.fixture
def worker(unified: Path) -> Path:
    """A group for the worker in it, as ``DelegateSubgroup=worker`` makes one."""
    folder = unified / "worker"
    folder.mkdir()
    return folder


@pytest.fixture(params=[1, 2], ids=["version 1", "version 2"])
def delegation(request: pytest.FixtureRequest) -> Iterator[Delegation]:
    """A place to make groups in, where this machine has one; it has to be clean afterwards."""
    if request.param == 2:
        folder = request.getfixturevalue("unified")
        (folder / "cgroup.subtree_control").write_text("+memory")
        found = Delegation(folder, 2)
    else:
        own = [one.folder for one in memory.control_groups() if one.version == 1]
        if not own:
            pytest.skip("version 1 does not have the control of memory here")
        found = Delegation(own[0], 1)
        try:
            found._prepare(own[:1])
            found._try()
        except (NoPlaceError, OSError) as exc:
            pytest.skip(f"no place for groups of version 1 here: {exc}")
    try:
        yield found
    finally:
        left = ours(found.folder)
        for folder in left:
            purge(folder)
    assert left == [], "the test left groups behind"


@pytest.fixture
def group(delegation: Delegation) -> Iterator[Group]:
    """A group with a limit of 64 MiB."""
    group = delegation.create("test", 64 * MiB)
    yield group
    purge(group.folder)


# ── one group ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(47)
def test_a_process_beyond_the_limit_is_killed_by_the_kernel(group: Group, start: Start) -> None:
    process = start(BODY)
    assert hear(process) == "ready"
    group.add(process.pid)
    assert group.pids() == [process.pid]
    assert group.limit_bytes() == 64 * MiB

    tell(process, 32 * MiB)
    assert hear(process) == "held"
    assert group.oom_kills() == 0
    used = group.used_bytes()
    assert used is not None
    assert 32 * MiB <= used <= 64 * MiB

    tell(process, 96 * MiB)
    assert hear(process) == ""
    assert process.wait() == -signal.SIGKILL
    assert is_counted(group)
    peak = group.peak_bytes()
    if peak is None:
        assert not (group.folder / "memory.peak").exists()  # before Linux 5.19
    else:
        assert 56 * MiB <= peak <= 64 * MiB
    assert group.pids() == []
    assert group.remove()
    assert not group.folder.exists()


def test_a_process_outside_of_the_group_lives_on(group: Group, start: Start) -> None:
    inside, outside = start(BODY), start(BODY)
    assert hear(inside) == hear(outside) == "ready"
    group.add(inside.pid)

    tell(outside, 96 * MiB)
    assert hear(outside) == "held"
    tell(inside, 96 * MiB)
    assert inside.wait() == -signal.SIGKILL
    assert outside.poll() is None


def test_two_groups_have_a_limit_each(delegation: Delegation, start: Start) -> None:
    groups = [delegation.create("small", 32 * MiB), delegation.create("large", 256 * MiB)]
    try:
        processes = [start(BODY), start(BODY)]
        for one, process in zip(groups, processes, strict=True):
            assert hear(process) == "ready"
            one.add(process.pid)
            tell(process, 96 * MiB)

        assert processes[0].wait() == -signal.SIGKILL
        assert hear(processes[1]) == "held"
        assert [is_counted(one) for one in groups] == [True, False]
    finally:
        for one in groups:
            purge(one.folder)


@pytest.mark.fault(47)
def test_what_a_process_forks_is_in_its_group_and_is_killed_with_it(
    group: Group, start: Start
) -> None:
    process = start(FAMILY)
    # The child was forked before: it is moved by itself.
    child = int(hear(process))
    for pid in (process.pid, child):
        group.add(pid)
    assert sorted(group.pids()) == sorted([process.pid, child])

    tell(process, 96 * MiB)
    assert process.wait() == -signal.SIGKILL
    if (group.folder / "memory.oom.group").exists():
        wait_gone([child])
    else:
        # Version 1 takes the one with the most memory alone.
        assert group.pids() == [child]
    assert is_counted(group)


def test_all_in_the_group_are_killed(group: Group, start: Start) -> None:
    processes = [start(BODY) for _ in range(5)]
    for process in processes:
        assert hear(process) == "ready"
        group.add(process.pid)

    assert not group.remove(), "it has processes"
    group.kill()

    assert {process.wait() for process in processes} == {-signal.SIGKILL}
    assert group.oom_kills() == 0
    assert group.remove()


def test_killing_finds_who_forks_meanwhile(group: Group, start: Start) -> None:
    # Each process that it kills has been replaced by another one.
    process = start(
        "import os\n"
        "print('ready', flush=True)\n"
        "input()\n"
        "while True:\n"
        "    if os.fork():\n"
        "        os._exit(0)\n"
    )
    assert hear(process) == "ready"
    group.add(process.pid)
    tell(process, "go")
    process.wait()

    group.kill()

    wait_gone(group.pids())
    assert group.pids() == []


def test_killing_an_empty_group_kills_nobody(group: Group) -> None:
    group.kill()

    assert group.pids() == []


def test_groups_that_its_processes_have_made_go_with_it(group: Group, start: Start) -> None:
    process = start(BODY)
    assert hear(process) == "ready"
    below = group.folder / "made" / "below"
    below.mkdir(parents=True)
    (below / "cgroup.procs").write_text(str(process.pid))
    assert group.pids() == [process.pid]
    assert not group.remove()

    group.kill()

    assert process.wait() == -signal.SIGKILL
    assert group.remove()
    assert not group.folder.exists()


def test_a_zombie_is_not_in_the_way(group: Group) -> None:
    pid = os.fork()
    if pid == 0:
        group.add(0)
        os._exit(0)
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        assert ended.si_status == 0
        assert group.pids() == []
        assert group.remove()
    finally:
        os.waitpid(pid, 0)


def test_what_is_removed_stays_removed(group: Group) -> None:
    assert group.remove()
    assert group.remove()
    group.kill()

    assert group.pids() == []
    assert group.oom_kills() is None
    with pytest.raises(FileNotFoundError):
        group.add(os.getpid())


def test_a_process_that_is_gone_cannot_be_added(group: Group, start: Start) -> None:
    process = start("")
    process.wait()

    with pytest.raises(ProcessLookupError):
        group.add(process.pid)


def test_the_processes_of_a_namespace_that_is_not_seen_are_nobody(tmp_path: Path) -> None:
    # Signal 9 to pid 0 would go to our own process group.
    (tmp_path / "cgroup.procs").write_text("0\n0\n")

    assert Group(tmp_path, 1).pids() == []


# ── the place ───────────────────────────────────────────────────────────────────────────────────


def test_a_limit_that_the_kernel_refuses_leaves_no_group(delegation: Delegation) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        delegation.create("bad", -5)

    assert ours(delegation.folder) == []


def test_two_groups_of_one_name_are_refused(delegation: Delegation, group: Group) -> None:
    with pytest.raises(FileExistsError):
        delegation.create("test", MiB)

    assert group.limit_bytes() == 64 * MiB


def test_empty_groups_of_a_process_that_is_gone_are_removed(
    delegation: Delegation, start: Start
) -> None:
    gone = start("")
    gone.wait()
    body = start(BODY)
    assert hear(body) == "ready"
    names = [f"{gone.pid}-empty", f"{gone.pid}-busy", f"{os.getppid()}-new"]
    empty, busy, new = (delegation.folder / f"{cgroup.PREFIX}{name}" for name in names)
    try:
        for folder in (empty, busy, new):
            folder.mkdir()
        Group(busy, delegation.version).add(body.pid)

        delegation._sweep()

        assert not empty.exists()
        assert busy.exists(), "a call outlives its forkserver"
        assert new.exists(), "its process is there"
    finally:
        for folder in (busy, new):
            purge(folder)


def test_without_groups_there_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "control_groups", lambda: ())

    with pytest.raises(NoPlaceError, match="not mounted"):
        Delegation.find()


def test_where_the_files_of_the_kernel_are_missing_there_is_no_place(tmp_path: Path) -> None:
    for version in (1, 2):
        with pytest.raises(NoPlaceError):
            Delegation(tmp_path, version)._prepare([tmp_path])

    assert list(tmp_path.iterdir()) == []


def test_a_group_that_does_not_hold_this_process_is_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup.procs").write_text("1\n")
    for version in (1, 2):
        group = memory.ControlGroup(tmp_path, version)
        monkeypatch.setattr(memory, "control_groups", lambda group=group: (group,))

        with pytest.raises(NoPlaceError):
            Delegation.find()


# ── where version 2 has it ──────────────────────────────────────────────────────────────────────


def found_by(
    start: Start,
    worker: Path,
    *,
    user: int = 0,
    mount: Path | None = None,
    manager: str = "systemd",
) -> tuple[str, ...]:
    """What a process finds that is in the worker's group: version, folder, and that it works."""
    process = start(FINDER)
    assert hear(process) == "ready"
    if mount is not None:
        (worker.parent / "cgroup.procs").write_text(str(process.pid))
        tell(process, user, "own", mount, manager)
        assert hear(process) == "inside"
    (worker / "cgroup.procs").write_text(str(process.pid))
    tell(process, *(() if mount is not None else (user, "same", "-", manager)))
    answer = hear(process)
    assert process.wait() == 0
    return ("nowhere",) if answer.startswith("nowhere") else tuple(answer.split())


def give_away(*folders: Path) -> None:
    """What cgroups(7) says under "Delegation"."""
    for folder in folders:
        for name in (".", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
            os.chown(folder / name, NOBODY, NOBODY)


def test_a_group_that_is_owned_by_the_user_is_a_place(
    unified: Path, worker: Path, start: Start
) -> None:
    give_away(unified, worker)

    assert found_by(start, worker, user=NOBODY) == ("2", str(unified), "True", "False")
    assert remains(unified) == []


def test_a_group_that_is_the_user_s_below_another_one_is_not(
    unified: Path, worker: Path, start: Start
) -> None:
    inner = worker / "inner"
    inner.mkdir()
    give_away(unified, worker, inner)

    assert found_by(start, inner, user=NOBODY) == ("nowhere",)


def test_a_group_of_root_is_no_place_for_another_user(worker: Path, start: Start) -> None:
    assert found_by(start, worker, user=NOBODY) == ("nowhere",)


def test_that_root_may_write_makes_no_place(worker: Path, start: Start) -> None:
    assert found_by(start, worker) == ("nowhere",)


@pytest.mark.parametrize("attribute", ["user.delegate", "trusted.delegate"])
def test_what_systemd_has_delegated_is_a_place(
    attribute: str, unified: Path, worker: Path, start: Start
) -> None:
    try:
        os.setxattr(unified, attribute, b"1")
    except OSError as exc:
        pytest.skip(f"the kernel stores no {attribute}: {exc}")

    assert found_by(start, worker) == ("2", str(unified), "True", "False")


def test_a_group_with_processes_is_no_place(unified: Path, worker: Path, start: Start) -> None:
    other = start(BODY)
    assert hear(other) == "ready"
    os.setxattr(unified, "trusted.delegate", b"1")
    (unified / "cgroup.procs").write_text(str(other.pid))

    assert found_by(start, worker) == ("nowhere",)
    assert (unified / "cgroup.procs").read_text().split() == [str(other.pid)], "nobody is moved"


def test_our_own_group_is_a_place_where_there_is_nobody_but_us(
    unified: Path, worker: Path, start: Start
) -> None:
    (unified / "cgroup.subtree_control").write_text("+memory")

    assert found_by(start, worker, manager="-") == ("2", str(worker), "True", "False")
    assert (worker / "isolated_worker").is_dir()


def test_our_own_group_that_systemd_has_delegated_is_a_place(
    unified: Path, worker: Path, start: Start
) -> None:
    (unified / "cgroup.subtree_control").write_text("+memory")
    os.setxattr(worker, "trusted.delegate", b"1")

    assert found_by(start, worker) == ("2", str(worker), "True", "False")


def test_our_own_group_with_a_stranger_in_it_is_no_place(
    unified: Path, worker: Path, start: Start
) -> None:
    (unified / "cgroup.subtree_control").write_text("+memory")
    # An orphan, which has another parent by now.
    stranger = start(
        "import os\nif os.fork(): os._exit(0)\nprint(os.getpid(), flush=True)\ninput()"
    )
    pid = int(hear(stranger))
    stranger.wait()
    (worker / "cgroup.procs").write_text(str(pid))

    assert found_by(start, worker, manager="-") == ("nowhere",)
    assert (worker / "cgroup.procs").read_text().split() == [str(pid)], "nobody is moved"


def test_children_must_not_escape_a_limit_of_the_worker(
    unified: Path, worker: Path, start: Start
) -> None:
    os.setxattr(unified, "trusted.delegate", b"1")
    (unified / "cgroup.subtree_control").write_text("+memory")
    (worker / "memory.max").write_text(str(1 << 30))

    assert found_by(start, worker) == ("nowhere",)


def test_the_root_of_a_container_is_a_place(
    unified: Path, worker: Path, start: Start, tmp_path: Path
) -> None:
    # Seen from inside, its path is that of the mount.
    mount = next(g.folder for g in reversed(memory.control_groups()) if g.version == 2)

    assert found_by(start, worker, mount=mount) == ("2", str(mount), "True", "False")
    assert remains(unified) == []


def test_the_root_of_the_machine_is_a_place(unified: Path) -> None:
    own = next(group.folder for group in memory.control_groups() if group.version == 2)
    if (own / "cgroup.type").exists():
        pytest.skip("this process is in a group below the root")
    found = Delegation.find()

    assert found is not None
    assert (found.version, found.folder) == (2, own)
    assert remains(own) == []


@pytest.mark.parametrize("delegation", [2], indirect=True)
def test_where_the_kernel_kills_no_groups_each_process_is_signalled(
    group: Group, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str, *, optional: bool = False) -> None:
        raise FileNotFoundError(path)

    processes = [start(BODY) for _ in range(3)]
    for process in processes:
        assert hear(process) == "ready"
        group.add(process.pid)
    with monkeypatch.context() as patch:
        patch.setattr(cgroup, "_write", refuse)
        group.kill()

    assert {process.wait() for process in processes} == {-signal.SIGKILL}


# ── children ────────────────────────────────────────────────────────────────────────────────────

LIMIT = 256 * MiB
#: Far more than the limit, as fast as memory is.
ALLOCATE = "held = bytearray(b'x') * 2_000_000_000"
PROGRAM = [sys.executable, "-c", ALLOCATE]


@pytest.fixture
def place(forkserver: Launcher) -> Path:
    """Where forkservers make groups; each test has to leave it as it was."""
    return place_of(forkserver)


def place_of(launcher: Launcher) -> Path:
    how = launcher.loaded()[0].memory_limits
    if not how.startswith("cgroup"):
        pytest.skip(f"memory limits are kept {how}")
    return Path(how.partition(" below ")[2])


@pytest.fixture
def only_the_kernel(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """One look at the beginning of each call, and no other."""
    monkeypatch.setattr(memory, "next_look", lambda headroom: 1000.0)


def own_group(slot: Slot) -> str:
    """The name of the group that a child of this slot is in."""
    text = slot.run(Path.read_text, Path("/proc/self/cgroup"))
    line = next(line for line in text.splitlines() if re.match(r"\d+:(memory)?:", line))
    return line.rpartition("/")[2]


def wait_removed(place: Path, *forkservers: int) -> None:
    """Wait until there are no groups of these forkservers: they go when a child is reaped."""
    tick = threading.Event()
    for _ in range(int(PATIENCE / 0.005)):
        left = [
            folder.name
            for folder in remains(place)
            if any(is_one_of(pid, folder.name) for pid in forkservers)
        ]
        if not left:
            return
        tick.wait(0.005)
    raise AssertionError(f"still there: {left}")


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
@pytest.mark.usefixtures("only_the_kernel")
def test_a_body_that_allocates_at_full_speed_is_stopped_at_its_limit(
    *, place: Path, forkserver: Launcher, make_slot: MakeSlot, start_method: str
) -> None:
    slot = make_slot(memory_limit_bytes=LIMIT, start_method=start_method)

    with pytest.raises(MemoryLimitExceeded) as caught:
        slot.run(bodies.touch, 2_000_000_000)

    assert caught.value.limit == LIMIT
    assert caught.value.peak is not None
    assert LIMIT - MiB < caught.value.peak <= LIMIT
    assert caught.value.pid is not None
    assert survivors([caught.value.pid]) == set()
    wait_removed(place, *forkserver.pids())
    assert slot.run(abs, -1) == 1


@pytest.mark.usefixtures("place")
def test_with_looks_beside_it_the_peak_is_no_higher(make_slot: MakeSlot) -> None:
    with pytest.raises(MemoryLimitExceeded) as caught:
        make_slot(memory_limit_bytes=LIMIT).run(bodies.touch, 2_000_000_000)

    # Where a look has come first, it has counted what the child shares with its forkserver.
    assert caught.value.peak is not None
    assert caught.value.peak <= LIMIT + 64 * MiB


@pytest.mark.fault(47)
@pytest.mark.usefixtures("only_the_kernel")
def test_a_body_that_does_not_mind_the_death_of_its_program_fails_all_the_same(
    place: Path, forkserver: Launcher, make_slot: MakeSlot
) -> None:
    slot = make_slot(memory_limit_bytes=LIMIT)

    with pytest.raises(MemoryLimitExceeded) as caught:
        slot.run(subprocess.call, PROGRAM)

    assert caught.value.peak is not None
    assert caught.value.peak <= LIMIT
    wait_removed(place, *forkserver.pids())


def test_a_body_that_goes_on_without_its_program_is_stopped_and_nothing_survives(
    *, place: Path, forkserver: Launcher, make_slot: MakeSlot, mailbox: Mailbox
) -> None:
    slot = make_slot(memory_limit_bytes=LIMIT)
    # One of its processes has a session of its own, which no signal to the group reaches.
    script = 'setsid sleep 1000 & echo "[$$, $!]" > "$1"; shift; "$@"; sleep 1000'

    with Background(
        slot.run, subprocess.call, ["sh", "-c", script, "-", mailbox.path, *PROGRAM]
    ) as call:
        pids = mailbox.read()
        with pytest.raises(MemoryLimitExceeded):
            call.result()

    assert survivors(pids) == set()
    wait_removed(place, *forkserver.pids())


def test_a_child_with_a_limit_has_a_group_for_as_long_as_it_lives(
    *, place: Path, forkserver: Launcher, make_slot: MakeSlot
) -> None:
    (pid,) = forkserver.pids()
    for start_method in ("forkserver", "spawn"):
        name = own_group(make_slot(memory_limit_bytes=LIMIT, start_method=start_method))
        assert is_one_of(pid, name)
    assert not is_one_of(pid, own_group(make_slot()))

    wait_removed(place, pid)


def test_a_batch_has_one_group(place: Path, forkserver: Launcher, make_slot: MakeSlot) -> None:
    slot = make_slot(memory_limit_bytes=LIMIT, batch_size=3)

    first, second = own_group(slot), own_group(slot)
    with pytest.raises(MemoryLimitExceeded):
        slot.run(bodies.touch, 2_000_000_000)

    assert first == second
    (pid,) = forkserver.pids()
    assert is_one_of(pid, first)
    wait_removed(place, *forkserver.pids())


@pytest.mark.usefixtures("place")
def test_a_limit_in_which_no_child_can_be_born_is_told_as_one(make_slot: MakeSlot) -> None:
    with pytest.raises(MemoryLimitExceeded):
        make_slot(memory_limit_bytes=MiB // 4).run(abs, -1)


@pytest.mark.usefixtures("place")
def test_a_body_that_is_killed_by_somebody_else_is_lost(make_slot: MakeSlot) -> None:
    with pytest.raises(ChildLostError) as caught:
        make_slot(memory_limit_bytes=LIMIT).run(bodies.kill_myself, signal.SIGKILL)

    assert caught.value.oom_killed is False


# ── … whose forkserver dies ─────────────────────────────────────────────────────────────────────

WAIT = "from harness import bodies\nbodies.report_and_wait(mailbox, fifo)\n"


@pytest.mark.parametrize("allocate", [ALLOCATE, f"import subprocess; subprocess.call({PROGRAM!r})"])
@pytest.mark.usefixtures("only_the_kernel")
def test_the_limit_holds_while_the_forkserver_is_replaced(
    *,
    place: Path,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    allocate: str,
) -> None:
    launcher = new_launcher()
    (dead,) = launcher.pids()
    slot = make_slot(address=launcher.address, memory_limit_bytes=LIMIT)
    names = {"mailbox": mailbox.path, "fifo": word.path}
    with Background(slot.run, exec, WAIT + allocate, names) as call:
        (pid,) = mailbox.read()
        os.kill(dead, signal.SIGKILL)
        wait_gone([dead])
        word.give()

        with pytest.raises(MemoryLimitExceeded) as caught:
            call.result()

    assert caught.value.peak is not None
    assert caught.value.peak <= LIMIT
    assert survivors([pid]) == set()
    launcher.check()
    launcher.wait_loaded(PATIENCE)
    wait_removed(place, dead)


def test_the_group_of_a_dead_forkserver_s_child_is_removed_by_the_next_one(
    *,
    place: Path,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    launcher = new_launcher()
    (dead,) = launcher.pids()
    slot = make_slot(address=launcher.address, memory_limit_bytes=LIMIT)
    with Background(slot.run, bodies.report_and_wait, mailbox.path, word.path) as call:
        mailbox.read()
        os.kill(dead, signal.SIGKILL)
        wait_gone([dead])
        launcher.check()
        launcher.wait_loaded(PATIENCE)
        assert any(is_one_of(dead, folder.name) for folder in remains(place))
        word.give("done")

        assert call.result()[1] == "done"

    slot.close()
    wait_removed(place, dead)
    said = [record.getMessage() for record in caplog.records if "memory lim" in record.getMessage()]
    assert len(said) == 1, "once"
    assert re.fullmatch(rf"memory limits: cgroup v\d groups below {place}", said[0])


def test_a_forkserver_takes_its_groups_along(
    place: Path, new_launcher: NewLauncher, make_slot: MakeSlot, mailbox: Mailbox
) -> None:
    launcher = new_launcher()
    (pid,) = launcher.pids()
    slot = make_slot(address=launcher.address, memory_limit_bytes=LIMIT)
    with Background(slot.run, bodies.hang, mailbox.path, "asleep") as call:
        pids = mailbox.read()

        launcher.stop()

        with pytest.raises(ChildLostError):
            call.result()
    assert survivors(pids) == set()
    assert not any(is_one_of(pid, folder.name) for folder in remains(place))


# ── … for which none can be had ─────────────────────────────────────────────────────────────────

NOT_MADE = """
from isolated_tasks.process import cgroup
create = cgroup.Delegation.create
def refuse(self, name, limit_bytes):
    if name == "probe":
        return create(self, name, limit_bytes)
    raise OSError(12, "Cannot allocate memory")
cgroup.Delegation.create = refuse
"""
NOT_JOINED = """
from isolated_tasks.process import cgroup
cgroup.Group.join = lambda self: False
"""


@pytest.mark.parametrize(
    ("source", "complaint"), [(NOT_MADE, "cannot be made"), (NOT_JOINED, "cannot be joined")]
)
@pytest.mark.usefixtures("place")
def test_a_group_that_cannot_be_had_is_replaced_by_looks_and_that_is_said_once(
    *,
    source: str,
    complaint: str,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "no_groups.py").write_text(source)
    launcher = new_launcher(preload=["no_groups"])
    place = place_of(launcher)
    slot = make_slot(address=launcher.address, memory_limit_bytes=LIMIT)

    for _ in range(3):
        assert slot.run(abs, -1) == 1
    with pytest.raises(MemoryLimitExceeded):
        slot.run(exec, f"import time; held = bytearray(b'x') * {2 * LIMIT}; time.sleep(1000)")

    wait_removed(place, *launcher.pids())
    launcher.stop()
    assert capfd.readouterr().err.count(complaint) == 1


@pytest.mark.parametrize("delegation", [1], indirect=True)
def test_a_place_whose_groups_are_not_killed_is_none(delegation: Delegation, group: Group) -> None:
    inner = Delegation(group.folder, 1)
    (group.folder / "memory.oom_control").write_text("1")

    with pytest.raises(NoPlaceError, match="nobody is killed"):
        inner._prepare([group.folder])


def test_where_systemd_rules_version_1_is_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "_SYSTEMD", tmp_path)

    with pytest.raises(NoPlaceError, match="systemd"):
        Delegation(tmp_path, 1)._prepare([tmp_path])
