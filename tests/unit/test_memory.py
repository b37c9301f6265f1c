"""How much memory a tree of real processes holds, how much there is, and who counts its want."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from harness.families import FAMILY, HOLDER, MiB, running
from isolated_tasks.process import memory

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


# ── a tree of processes ─────────────────────────────────────────────────────────────────────────


def test_a_process_that_is_gone_has_no_memory() -> None:
    with running(HOLDER, MiB) as (pid, _):
        pass

    assert memory.tree_bytes(pid) == 0


@ON_LINUX
def test_a_zombie_counts_nothing() -> None:
    # Not reaped: waitid(2) with WNOWAIT only waits for the end.
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert memory.tree_bytes(pid) == 0
    finally:
        os.waitpid(pid, 0)


@ON_LINUX
def test_shared_pages_count_once_where_it_matters() -> None:
    held = 64 * MiB
    with running(FAMILY, held) as (pid, others):
        rss = memory.tree_bytes(pid, above=1 << 50)
        exact = memory.tree_bytes(pid, above=held)

        # Four processes map the same pages: RSS says so four times.
        assert len(others) == 3
        assert rss > 4 * held
        assert held < exact < 2 * held
        assert memory.tree_bytes(pid) == pytest.approx(exact, rel=0.1)


@ON_LINUX
def test_rss_will_do_up_to_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    read = memory._pss_bytes

    def note(pid: int) -> int | None:
        asked.append(pid)
        return read(pid)

    monkeypatch.setattr(memory, "_pss_bytes", note)
    with running(HOLDER, 16 * MiB) as (pid, _):
        rss = memory.tree_bytes(pid, above=1 << 50)
        assert memory.tree_bytes(pid, above=rss) <= rss
        assert asked == []

        memory.tree_bytes(pid, above=rss - 1)

    assert asked == [pid]


@ON_LINUX
def test_where_there_is_no_pss_rss_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_pss_bytes", lambda pid: None)
    with running(HOLDER, 16 * MiB) as (pid, _):
        assert memory.tree_bytes(pid) == memory.tree_bytes(pid, above=1 << 50) > 16 * MiB


@ON_LINUX
def test_what_ends_between_two_looks_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    read = memory._pss_bytes

    def end_first(pid: int) -> int | None:
        processes[pid].communicate()
        return read(pid)

    monkeypatch.setattr(memory, "_pss_bytes", end_first)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(16 * MiB)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        processes = {process.pid: process}
        assert process.stdout is not None
        process.stdout.readline()

        assert memory.tree_bytes(process.pid, above=MiB) == 0


@ON_LINUX
def test_looking_leaves_no_descriptor_open() -> None:
    before = os.listdir("/proc/self/fd")
    memory.tree_bytes(os.getpid())
    memory.oom_kills()

    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("headroom", "seconds"),
    [
        (-1, 0.02),
        (0, 0.02),
        (80_000_000, 0.02),
        (400_000_000, 0.1),
        (800_000_000, 0.2),
        (1 << 40, 0.2),
    ],
)
def test_the_next_look_is_before_half_of_what_is_left_is_taken(
    headroom: int, seconds: float
) -> None:
    assert memory.next_look(headroom) == pytest.approx(seconds)


# ── what there is ───────────────────────────────────────────────────────────────────────────────


def test_what_is_there_is_part_of_the_machine() -> None:
    machine = psutil.virtual_memory().total

    assert 0 < memory.total_bytes() <= machine
    assert 0 <= memory.available_bytes() <= memory.total_bytes()


@ON_LINUX
def test_the_groups_of_this_process_are_those_that_list_it() -> None:
    for version in (1, 2):
        group = next((one for one in memory.control_groups() if one.version == version), None)
        if group is not None:
            pids = (group.folder / "cgroup.procs").read_text().split()
            assert str(os.getpid()) in pids


@ON_LINUX
def test_the_kernel_counts_whom_it_kills() -> None:
    if "oom_kill " not in Path("/proc/vmstat").read_text():
        pytest.skip("this kernel counts since Linux 4.13")
    count = memory.oom_kills()

    assert count is not None
    assert count >= 0


#: Mounts as systems have them: of version 2, of version 1, and of a container that sees its part.
UNIFIED = "30 23 0:26 / {} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
LEGACY = (
    "33 25 0:29 / {}/cpuset rw shared:9 - cgroup cgroup rw,cpuset\n"
    "35 31 0:32 / {} rw,relatime - cgroup cgroup rw,memory"
)
CONTAINER = "35 31 0:32 /docker/1a2b {} ro,nosuid master:9 - cgroup cgroup rw,memory"


def make_group(folder: Path, **files: object) -> Path:
    """The folder of a group with its files; ``memory_max`` is ``memory.max``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")
    return folder


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    """What stands for a mounted hierarchy, with files as the kernel fills them."""
    return make_group(tmp_path / "cgroup")


def folders(listing: str, mountinfo: str) -> list[Path]:
    return [group.folder for group in memory.find_control_groups(listing, mountinfo)]


def test_the_groups_are_the_own_one_and_those_above_it(mount: Path) -> None:
    inner = make_group(mount / "system.slice" / "celery.service")
    expected = [inner, inner.parent, mount]

    assert folders("0::/system.slice/celery.service", UNIFIED.format(mount)) == expected
    listing = "9:name=systemd:/\n4:cpu,memory:/system.slice/celery.service\n1:cpuset:/\n"
    assert folders(listing, LEGACY.format(mount, mount)) == expected


def test_in_a_container_the_own_group_is_at_the_mount(mount: Path) -> None:
    inner = make_group(mount / "worker")

    assert folders("4:memory:/docker/1a2b", CONTAINER.format(mount)) == [mount]
    assert folders("4:memory:/docker/1a2b/worker", CONTAINER.format(mount)) == [inner, mount]
    # The path is that of the host, of which nothing is to be seen.
    assert folders("0::/kubepods/pod1/1a2b", UNIFIED.format(mount)) == [mount]
    assert folders("4:memory:/elsewhere", CONTAINER.format(mount)) == [mount]


def test_a_group_outside_of_the_own_namespace_is_not_followed(mount: Path) -> None:
    make_group(mount.parent / "sibling")

    assert folders("0::/../sibling", UNIFIED.format(mount)) == [mount]


def test_without_a_mount_there_are_no_groups(mount: Path) -> None:
    assert folders("4:memory:/a\n0::/a", "22 1 0:20 / / rw - ext4 /dev/vda rw") == []
    assert folders("4:memory:/a", UNIFIED.format(mount)) == []


def find(mount: Path, version: int) -> tuple[memory.ControlGroup, ...]:
    if version == 2:
        return memory.find_control_groups("0::/a/b", UNIFIED.format(mount))
    return memory.find_control_groups("4:memory:/a/b", LEGACY.format(mount, mount))


def test_the_smallest_limit_counts(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_group(
        mount / "a",
        memory_max=96 * MiB,
        memory_current=64 * MiB,
        memory_stat=f"anon 1\ninactive_file {16 * MiB}\nactive_file 7",
    )
    make_group(mount / "a" / "b", memory_max="max", memory_current=8 * MiB)
    monkeypatch.setattr(memory, "control_groups", lambda: find(mount, 2))

    assert memory.total_bytes() == 96 * MiB
    assert memory.available_bytes() == (96 - 64 + 16) * MiB

    make_group(mount / "a" / "b", memory_max=40 * MiB)
    assert memory.total_bytes() == 40 * MiB
    assert memory.available_bytes() == (40 - 8) * MiB

    # A limit may be set below what is used already.
    make_group(mount / "a" / "b", memory_max=4 * MiB)
    assert memory.available_bytes() == 0


def test_limits_of_version_1_too(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = 9223372036854771712
    make_group(
        mount / "a" / "b",
        memory_limit_in_bytes=none,
        memory_usage_in_bytes=48 * MiB,
        memory_stat=f"inactive_file 1\nhierarchical_memory_limit {none}\ntotal_inactive_file {MiB}",
    )
    monkeypatch.setattr(memory, "control_groups", lambda: find(mount, 1))

    assert memory.total_bytes() == psutil.virtual_memory().total

    # Of a group further up, which this container does not see.
    stat = f"hierarchical_memory_limit {80 * MiB}\ntotal_inactive_file {MiB}"
    make_group(mount / "a" / "b", memory_stat=stat)
    assert memory.total_bytes() == 80 * MiB
    assert memory.available_bytes() == (80 - 48 + 1) * MiB

    make_group(mount / "a" / "b", memory_limit_in_bytes=64 * MiB)
    assert memory.total_bytes() == 64 * MiB


@pytest.mark.fault(47)
def test_kills_are_counted_by_the_innermost_group_that_does(
    mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_group(mount / "a" / "b")
    make_group(mount / "a", memory_events="low 0\noom 9\noom_kill 3\noom_group_kill 1")
    monkeypatch.setattr(memory, "control_groups", lambda: find(mount, 2))
    assert memory.oom_kills() == 3

    make_group(mount / "a" / "b", memory_events="oom 1\noom_kill 0")
    assert memory.oom_kills() == 0


def test_kills_are_counted_in_version_1(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = "oom_kill_disable 0\nunder_oom 0\noom_kill 2"
    make_group(mount / "a" / "b", memory_oom_control=events)
    monkeypatch.setattr(memory, "control_groups", lambda: find(mount, 1))

    assert memory.oom_kills() == 2


def test_where_no_group_counts_the_machine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "control_groups", lambda: ())
    vmstat = Path("/proc/vmstat")
    lines = vmstat.read_text().splitlines() if vmstat.exists() else []
    before = [int(line.split()[1]) for line in lines if line.startswith("oom_kill ")]
    count = memory.oom_kills()

    # Somebody may be killed in between.
    assert count is None if not before else count is not None and count >= before[0]


def test_what_a_group_does_not_tell_is_none(mount: Path) -> None:
    for version in (1, 2):
        group = memory.ControlGroup(mount, version)
        assert group.limit_bytes() is None
        assert group.used_bytes() is None
        assert group.peak_bytes() is None
        assert group.oom_kills() is None
