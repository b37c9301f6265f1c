"""What a call that has no outcome has failed with: one error, from all that is known."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass

from isolated_tasks.errors import (
    ChildLostError,
    CPUTimeLimitExceeded,
    ForkserverError,
    IsolationError,
    MemoryLimitExceeded,
    OptionError,
)
from isolated_tasks.process import cgroup, protocol, system
from isolated_tasks.process.options import CallOptions, ProcessOptions
from isolated_tasks.process.usage import ProcessUsage

__all__ = [
    "HANDS_OFF",
    "Facts",
    "lost",
    "memory_limit",
    "only_theirs",
    "refused",
    "stillborn",
    "too_late",
]


#: What a body is told that has meddled with our socket.
HANDS_OFF = "A body must not touch descriptors that it has not opened"


@dataclass(frozen=True)
class Facts:
    """What is known about a child at its end."""

    options: ProcessOptions
    call: CallOptions
    pid: int | None
    #: Whether the body had begun.
    started: bool
    #: A status of 0 or more, or minus the signal; None where nobody could tell.
    exit_code: int | None
    usage: ProcessUsage | None
    #: Whether the kernel's out-of-memory killer has been at work; None where nobody tells.
    oom_killed: bool | None
    oom_evidence: str
    #: Memory of the child and its descendants, as last seen and at most, in bytes.
    last_bytes: int | None
    peak_bytes: int | None
    #: What faulthandler wrote, and the last lines on stderr.
    crash_traceback: str
    stderr: str
    #: Of an outcome that has begun to arrive: bytes that are here, and all.
    progress: tuple[int, int] | None
    #: Whether the kernel has killed for the memory limit, which a control group kept, and the most
    #: that was held in there, in bytes.
    memory_limit_hit: bool = False
    #: It was killed, since it had closed the socket that its outcome would have come by, or had
    #: sent by it what is no message; in words.
    offence: str = ""
    group_peak_bytes: int | None = None

    @property
    def who(self) -> str:
        """The beginning of every message."""
        return f"{self.title}: child pid={self.pid}"

    @property
    def title(self) -> str:
        """The task, and its id if it has one."""
        task_id = f"[{self.call.title}]" if self.call.title else ""
        return f"task {self.options.name!r}{task_id}"

    @property
    def highest_bytes(self) -> int | None:
        """The most memory that is known of, of the tree or of the process alone."""
        known = [self.peak_bytes, self.usage.peak_rss_bytes if self.usage else None]
        return max((one for one in known if one is not None), default=None)


def memory_limit(facts: Facts) -> MemoryLimitExceeded:
    """The tree held more than it may, or was about to, and was killed."""
    limit, peak = facts.options.memory_limit_bytes or 0, facts.highest_bytes
    if facts.memory_limit_hit or cgroup.is_full(facts.group_peak_bytes, limit):
        # Looks count what is shared with the forkserver as well, which the group does not.
        peak = limit if facts.group_peak_bytes is None else facts.group_peak_bytes
        held = f"held {_mib(peak)} and needed more, with memory_limit={_mib(limit)}"
    else:
        held = f"held {_mib(peak)}, above memory_limit={_mib(limit)}"
    return MemoryLimitExceeded(
        _message(
            f"{facts.who} and its descendants {held}, and were killed",
            "Raise the limit, or make it a ladder, which retries with more: "
            "memory_limit=(low, higher, …)",
            facts,
        ),
        {**_ending_data(facts), "limit": limit, "peak": peak},
    )


def refused(options: ProcessOptions, message: protocol.Refused, address: str) -> IsolationError:
    """The forkserver did not start a child."""
    if message.budget_bytes is not None:
        limit = options.memory_limit_bytes or 0
        return OptionError(
            f"task {options.name!r}: memory_limit={limit}: can never fit into "
            f"isolated_memory_budget, which is {message.budget_bytes} bytes here",
            {"task": options.name, "option": "memory_limit", "value": repr(limit)},
        )
    return ForkserverError(
        f"task {options.name!r}: the forkserver could not start a child: {message.reason}. "
        f"{_WHAT_IS_SHORT.get(message.errno or 0, 'Nothing of the call has run')}.",
        {"address": address, "errno": message.errno},
    )


#: What to do about a refusal, by the system's error number.
_WHAT_IS_SHORT = {
    errno.EAGAIN: "Raise the number of processes that may be (RLIMIT_NPROC, pids.max)",
    errno.EMFILE: "Raise the number of files that a process may have open (ulimit -n)",
    errno.ENFILE: "Raise the number of files that may be open (fs.file-max)",
    errno.ENOMEM: "The system is out of memory: fewer slots, or isolated_memory_budget, may help",
}


def too_late(facts: Facts, address: str, *, accepted: bool) -> ForkserverError:
    """No child, or no body, within the time for it; the child, if there is one, is killed."""
    if accepted:
        what = f"child pid={facts.pid} has not begun the body"
        advice = "What runs before it, isolated_process_init and worker_process_init, takes long"
    elif facts.pid is not None:
        what = f"child pid={facts.pid} has not come to accept the call"
        advice = "It hangs in what its forkserver has loaded: a lock that was held at the fork, say"
    else:
        what = "no child was started"
        advice = f"The forkserver at {address} is busy, stopped, or about to be replaced"
    return ForkserverError(
        _message(
            f"{facts.title}: {what} within {facts.options.start_timeout:g} s "
            "(isolated_start_timeout)",
            advice,
            facts,
        ),
        {"address": address, "pid": facts.pid},
    )


def stillborn(facts: Facts, failures: int, reason: str, pause: float) -> ChildLostError:
    """Several children in a row have gone before they accepted the call; this is the last."""
    return ChildLostError(
        _message(
            f"{facts.title}: {failures} children in a row went before they had begun a body; the "
            f"next one is tried in {pause:.2g} s. The last one: {reason.rstrip('.')}",
            "Look at what runs before any body: isolated_preload, hooks of fork "
            "(os.register_at_fork), with start_method='spawn' the app's import",
            facts,
        ),
        {**_ending_data(facts), "oom_killed": facts.oom_killed, "oom_evidence": facts.oom_evidence},
    )


def lost(facts: Facts) -> IsolationError:
    """The child exited without an outcome."""
    if facts.memory_limit_hit:
        return memory_limit(facts)
    if facts.exit_code == -signal.SIGXCPU and facts.options.cpu_time_limit is not None:
        return _cpu_time_limit(facts)
    sentences = [f"{facts.who} {_ending(facts)}"]
    if facts.progress is None:
        when = "after the body had begun" if facts.started else "before the body had begun"
        sentences.append(f"without an outcome, {when}")
    else:
        here, whole = facts.progress
        sentences.append(f"while it sent its outcome ({here} of {whole} bytes)")
    if facts.usage is not None:
        sentences.append(f"({_used(facts, facts.usage)})")
    return ChildLostError(
        _message(" ".join(sentences), _advice(facts), facts),
        {
            **_ending_data(facts),
            "oom_killed": facts.oom_killed,
            "oom_evidence": facts.oom_evidence,
            "memory_limit": facts.options.memory_limit_bytes,
            "last_bytes": facts.last_bytes,
        },
    )


def _cpu_time_limit(facts: Facts) -> CPUTimeLimitExceeded:
    limit = facts.options.cpu_time_limit
    return CPUTimeLimitExceeded(
        _message(
            f"{facts.who} used more CPU time than cpu_time_limit={limit} s, and was killed",
            "Raise the limit, or look at the frames below, where the time was spent",
            facts,
        ),
        {**_ending_data(facts), "limit": limit},
    )


def _ending_data(facts: Facts) -> dict[str, object]:
    usage = facts.usage
    return {
        "task": facts.options.name,
        "task_id": facts.call.title or None,
        "pid": facts.pid,
        "exit_code": facts.exit_code,
        "signal": system.signal_name(facts.exit_code),
        "started": facts.started,
        "peak_rss_bytes": usage.peak_rss_bytes if usage else None,
        "user_seconds": usage.user_seconds if usage else None,
        "system_seconds": usage.system_seconds if usage else None,
        "crash_traceback": facts.crash_traceback,
        "stderr": facts.stderr,
    }


def _message(what: str, advice: str, facts: Facts) -> str:
    """What has happened, what to do about it, and what was found."""
    message = f"{what}. {advice}."
    if facts.crash_traceback:
        message += "\n" + facts.crash_traceback
    if facts.stderr:
        message += "\nThe last lines on stderr:\n" + facts.stderr
    return message


#: Signals by which native code ends, and not somebody else.
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGSYS)


def _advice(facts: Facts) -> str:
    """What to do about a lost child."""
    code = facts.exit_code
    if facts.offence:
        return HANDS_OFF
    if code is None:
        return (
            "Its forkserver died meanwhile, so nobody saw its exit; if that was for want of "
            "memory, the kernel's log (dmesg) has both"
        )
    if code >= 0 and not facts.started:
        return "What runs before it is where to look: isolated_process_init, worker_process_init"
    if code >= 0:
        return (
            "A body has to return or raise: look for os._exit, exec, or a library in C that calls "
            "exit()"
        )
    if -code in _CRASHES:
        return (
            "That is a fault of native code, as a rule of the library in the innermost frame "
            "below: another version of it may help"
        )
    if -code == signal.SIGABRT:
        return "A library in C has given up; what it said, if anything, is on stderr"
    if -code == signal.SIGKILL and facts.oom_killed:
        return "Give the task a memory_limit, with a ladder if some calls need more than others"
    if -code == signal.SIGKILL:
        advice = "If it was for want of memory, the kernel's log (dmesg) says so"
        limited = facts.options.memory_limit_bytes is not None
        return advice if limited else f"{advice}; with a memory_limit the error would"
    return "Somebody has sent that signal: an operator, a service manager, or the body itself"


def _ending(facts: Facts) -> str:
    if facts.offence:
        return f"{facts.offence}, and was killed,"
    if facts.exit_code == -signal.SIGKILL and facts.oom_killed:
        return f"was killed by the kernel's out-of-memory killer ({facts.oom_evidence})"
    return system.describe_exit(facts.exit_code)


def _used(facts: Facts, usage: ProcessUsage) -> str:
    parts = [f"peak RSS {_mib(usage.peak_rss_bytes)}"]
    if facts.last_bytes is not None:
        parts.append(f"with its descendants {_mib(facts.last_bytes)} when last seen")
    if facts.options.memory_limit_bytes is not None:
        parts.append(f"memory_limit {_mib(facts.options.memory_limit_bytes)}")
    parts.append(f"CPU {usage.user_seconds + usage.system_seconds:.1f} s")
    return ", ".join(parts)


def _mib(size: int | None) -> str:
    return "an unknown size" if size is None else f"{size / 2**20:.0f} MiB"


def only_theirs(crash_traceback: str) -> str:
    """Leave out our own frames, which stand below those of every body."""
    ours = f'  File "{os.path.dirname(__file__)}{os.sep}'
    return "".join(
        line
        for line in crash_traceback.splitlines(keepends=True)
        if not line.startswith((ours, '  File "<frozen runpy>"'))
    )
