"""Random numbers that differ from child to child.

All children are copies of one forkserver, so each would draw the numbers that its siblings draw.
The standard library gives its own global generator a new seed at a fork; for all others that a
preload has made, this does.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from typing import Any

__all__ = ["remember", "reseed"]

#: Generators that were made before the fork, beside the global ones.
_made: list[Any] = []


def remember() -> None:
    """Find the generators that modules have made; in the forkserver, before it freezes its heap."""
    numpy_random = sys.modules.get("numpy.random")
    types = {random.Random}
    if numpy_random is not None:
        types |= {numpy_random.Generator, numpy_random.RandomState}
    # The standard library's own is one of them, and does it by itself.
    own = getattr(random, "_inst", None)
    _made[:] = [one for one in gc.get_objects() if type(one) in types and one is not own]


def reseed() -> None:
    """Give each generator a seed of its own, from the system; in the child."""
    for generator in _made:
        if type(generator) is random.Random:
            generator.seed()
        elif hasattr(generator, "bit_generator"):
            bits = generator.bit_generator
            bits.state = type(bits)().state
        else:
            generator.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        # Not torch.seed(), which asks CUDA for its devices; this leaves CUDA, where nobody has
        # used it, a note for later.
        torch.manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))
