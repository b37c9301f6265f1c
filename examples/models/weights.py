"""A model that a fork shares: `LAYERS` are arrays, loaded when this module is imported.

What is drawn here at random an app would read from a file.
"""

from __future__ import annotations

import math
import os

import numpy as np
from numpy.typing import NDArray

LAYER_COUNT = 10

#: Set by the command.
MEGABYTES = int(os.environ.get("SHARED_MODEL_MEGABYTES", "500"))


def load(megabytes: int) -> list[NDArray[np.float32]]:
    """Square layers that weigh so much together."""
    width = math.isqrt(megabytes * 1_000_000 // LAYER_COUNT // 4)
    random = np.random.default_rng(1)
    return [random.standard_normal((width, width), dtype=np.float32) for _ in range(LAYER_COUNT)]


LAYERS = load(MEGABYTES)


def predict(question: int) -> float:
    """Send a number through all layers: reads each byte of them, and writes none."""
    vector = np.full(len(LAYERS[0]), question, dtype=np.float32)
    for layer in LAYERS:
        vector = np.tanh(layer @ vector)
    return float(vector.sum())
