"""A heavy body, isolated and plain."""

from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)

#: What a library's cache would keep. It weighs little and stands between what is freed.
kept: list[bytes] = []

#: Below glibc's threshold for memory that is mapped, and unmapped, by itself (mallopt(3)).
PIECE = 100_000


def work(size: int) -> int:
    """Hold `size` bytes for a while, and give all back but 600 in a million."""
    data = []
    for number in range(size // PIECE):
        data.append(b"x" * PIECE)
        if number % 10 == 0:
            kept.append(bytes(600))
    return sum(map(len, data))


@app.task(base=IsolatedTask)
def isolated(size: int) -> int:
    return work(size)


@app.task
def plain(size: int) -> int:
    return work(size)
