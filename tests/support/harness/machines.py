"""What state machines need: any message there is, and how hypothesis runs them."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from hypothesis import Phase, settings
from hypothesis import strategies as st

from harness.frames import SAMPLES
from isolated_tasks.process.options import MAX_INTEGER
from isolated_tasks.process.protocol import MAPPED_FROM, SCRATCH_SIZE, Bytes, Call, Message, Outcome

#: A machine that fails is made small within the time that a test has, so one failure at a time and
#: no search for an explanation.
MACHINE = settings(
    deadline=None,
    stateful_step_count=30,
    report_multiple_bugs=False,
    phases=[Phase.reuse, Phase.generate, Phase.shrink],
)

#: Where a reader begins to do something else with a piece.
_EDGES = st.sampled_from([SCRATCH_SIZE - 16, SCRATCH_SIZE, MAPPED_FROM - 1, MAPPED_FROM])

# Not two surrogates that would be one character (json makes one of them), but one that stands for a
# byte which is not UTF-8 (os.fsdecode).
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.just("\udc80"), max_size=10)
_BYTES = st.binary(max_size=50) | _EDGES.map(bytes)
_PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-MAX_INTEGER, MAX_INTEGER),
    float: st.floats(allow_nan=False),
    str: _TEXTS,
    bytes: st.binary(max_size=50),
    Bytes: _BYTES,
    Bytes | list[Bytes]: _BYTES | st.lists(_BYTES, max_size=3),
    Any: st.none() | st.booleans() | st.integers() | _TEXTS,
}


def messages() -> st.SearchStrategy[Message]:
    """All kinds, one as often as another."""
    return st.one_of([_messages(type(sample)) for sample in SAMPLES])


def received(message: Message) -> Message:
    """The message as it arrives: what was sent in pieces is in one."""
    if isinstance(message, Call | Outcome) and isinstance(message.pickled, list):
        return dataclasses.replace(message, pickled=b"".join(message.pickled))
    return message


def _messages(cls: type[Message]) -> st.SearchStrategy[Message]:
    return st.builds(cls, **{name: _values(hint) for name, hint in get_type_hints(cls).items()})


def _values(hint: Any) -> st.SearchStrategy[Any]:
    if hint in _PLAIN:
        return _PLAIN[hint]
    if isinstance(hint, types.UnionType):
        return st.one_of([_values(one) for one in get_args(hint)])
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (list, Sequence):
        return st.lists(_values(arguments[0]), max_size=3)
    if origin in (dict, Mapping):
        return st.dictionaries(_values(arguments[0]), _values(arguments[1]), max_size=3)
    return st.from_type(hint)  # bool, None
