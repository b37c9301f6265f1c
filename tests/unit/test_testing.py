"""What looks at a process come to; the rest of isolated_tasks.testing is tested in real suites."""

from collections.abc import Sequence

import pytest

from isolated_tasks import testing
from isolated_tasks.testing.growth import Growth, judge

MIB = 1 << 20


def judged(looks: Sequence[tuple[int, int, int | None, int | None]]) -> Growth:
    return judge("t", looks, warm_up=5, process="it")


def test_what_is_in_use_at_the_end_and_was_not_at_the_beginning_is_kept() -> None:
    growth = judged([(n, 90 * MIB, 50 * MIB + n * 1000, 0) for n in range(21)])

    assert (growth.kept_bytes, growth.calls, growth.rss_bytes) == (20_000, 20, 0)
    assert growth.first_half_bytes == 10_000
    assert growth.kept_per_call_bytes == 1000


def test_what_was_given_back_is_no_growth_below_zero() -> None:
    assert judged([(n, 90 * MIB, 50 * MIB - n * 1000, 0) for n in range(21)]).kept_bytes == 0


def test_rss_that_grows_idle_is_kept_if_it_goes_on() -> None:
    looks = [(n, (90 + n) * MIB, 50 * MIB, (40 + n) * MIB) for n in range(21)]

    assert judged(looks).kept_bytes == 20 * MIB
    assert judged(looks).first_half_bytes is None


def test_rss_that_grows_once_is_not() -> None:
    growth = judged(
        [
            (n, (110 if n > 3 else 90) * MIB, 50 * MIB, (60 if n > 3 else 40) * MIB)
            for n in range(21)
        ]
    )

    assert (growth.kept_bytes, growth.rss_bytes) == (0, 20 * MIB)


def test_where_no_allocator_tells_rss_is_all_there_is() -> None:
    assert judged([(n, (90 + n) * MIB, None, None) for n in range(21)]).kept_bytes == 20 * MIB
    assert judged([(n, 90 * MIB, None, None) for n in range(21)]).kept_bytes == 0


@pytest.mark.parametrize("name", testing.__all__)
def test_every_name_can_be_imported_and_is_described(name: str) -> None:
    assert getattr(testing, name).__doc__
    assert name in dir(testing)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"isolated_tasks\.testing.*nonesuch"):
        testing.nonesuch  # noqa: B018
