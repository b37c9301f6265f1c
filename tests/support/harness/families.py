"""Programs that start processes of their own, for tests of what is seen of them."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

MiB = 1 << 20

#: Holds memory of its own, says so, and stays until its input ends.
HOLDER = """
import mmap, sys
held = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held.write(b"x" * len(held))
print("held", flush=True)
sys.stdin.read()
"""

#: Two forked children share its memory, and one of them has a child itself; it tells their pids.
FAMILY = """
import mmap, os, sys
held = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held.write(b"x" * len(held))
for index in range(3):
    reader, writer = os.pipe()
    if os.fork() == 0:
        # Those who read it have its pages mapped as well.
        assert held.find(b"y") == -1
        if index == 0 and os.fork() == 0:
            os.write(1, b"%d " % os.getpid())
            os.write(writer, b"x")
            sys.stdin.read()
            os._exit(0)
        if index < 2:
            os.write(1, b"%d " % os.getpid())
            os.write(writer, b"x")
            sys.stdin.read()
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    if index == 0:
        os.read(reader, 1)
os.write(1, b"\\n")
sys.stdin.read()
os._exit(0)
"""


@contextlib.contextmanager
def running(source: str, *arguments: object) -> Iterator[tuple[int, list[int]]]:
    """A process that has said what it has to say: its pid, and the numbers that it has said."""
    with subprocess.Popen(
        [sys.executable, "-c", source, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words, "it has ended"
        yield process.pid, [int(word) for word in words if word.isdigit()]
