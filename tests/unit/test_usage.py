"""What a process used, in the units that we promise."""

import resource
import sys

from isolated_tasks.process.usage import ProcessUsage


def test_usage_is_in_bytes_and_seconds() -> None:
    rusage = resource.getrusage(resource.RUSAGE_SELF)

    usage = ProcessUsage.from_rusage(rusage)

    unit = 1 if sys.platform == "darwin" else 1024
    assert usage.peak_rss_bytes == rusage.ru_maxrss * unit
    assert usage.user_seconds == rusage.ru_utime
    assert usage.system_seconds == rusage.ru_stime
    # A Python process holds some megabytes: a mistaken unit shows.
    assert 4 << 20 < usage.peak_rss_bytes < 64 << 30
