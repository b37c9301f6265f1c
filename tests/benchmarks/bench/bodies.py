"""What is run: it does nothing, or hands data to and fro."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

MB = 1_000_000


def nothing(value: object = None) -> object:
    """The lightest body there is."""
    return value


def answer(connection: Any) -> None:
    """Send the result of the lightest body, where there is nobody else to do so."""
    # Here, and not beside its caller: a child of the peers' imports the module that this is in.
    connection.send(nothing())
    connection.close()


def make(kind: str, size: int) -> Any:
    """So many bytes, as ``bytes``, as an array of NumPy, or as a frame of pandas."""
    if kind == "bytes":
        return b"x" * size
    import numpy as np

    array = np.ones(max(1, size // 8))
    if kind == "array":
        return array
    import pandas as pd

    columns = 8 if len(array) >= 8 else 1
    rows = len(array) // columns
    return pd.DataFrame(array[: rows * columns].reshape(rows, columns))


_kept: list[Any] = []


def keep(argument: bytes) -> None:
    """Make data in a forkserver, so that a child has nothing to do but to send it."""
    kind, size = argument.decode().split()
    _kept.append(make(kind, int(size)))


def send() -> Any:
    """Return the data."""
    return _kept[0]


def take(data: object) -> int:
    """Be given data."""
    return sum(1 for _ in (data,))


def use_pandas() -> int:
    """Import what is heavy, unless it is there, and use it a little."""
    import pandas as pd

    return int(pd.DataFrame({"a": [1, 2, 3]})["a"].sum())


def wait_for(folder: str) -> None:
    """Say that it runs, and wait until there is the file ``go``."""
    Path(folder, f"runs-{os.urandom(6).hex()}").touch()
    go = Path(folder, "go")
    while not go.exists():
        time.sleep(0.02)
