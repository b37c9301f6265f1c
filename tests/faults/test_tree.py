"""Faults of what bodies start: it goes with them, it counts with them, and it delays nobody."""

from collections.abc import Callable

import pytest

from harness import bodies, faulty
from harness.faults import IN_FULL, fault
from harness.processes import PATIENCE, Background, Mailbox, Slot, survivors
from isolated_tasks.errors import ChildLostError
from isolated_tasks.process import pickling
from isolated_tasks.process.launcher import Launcher
from isolated_tasks.process.options import CallOptions, ProcessOptions, StartMethod
from isolated_tasks.process.protocol import Stop
from isolated_tasks.process.supervisor import StoppedError, Supervisor, TimeIsUpError

MakeSlot = Callable[..., Slot]
NewLauncher = Callable[..., Launcher]

#: What comes of a call, by how its body ends.
ENDINGS = {
    "it returns": None,
    "it raises": LookupError,
    "it crashes": ChildLostError,
    "its time is up": TimeIsUpError,
    "it is stopped": StoppedError,
}


@fault(25, 26)
@pytest.mark.parametrize("ending", ENDINGS)
def test_programs_that_a_body_has_started_go_with_it_however_it_ends(
    *,
    forkserver: Launcher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    start_method: str,
    ending: str,
) -> None:
    slot = make_slot(start_method=start_method, term_grace=0.1)
    call_id = f"programs-{start_method}-{ending}"
    options = CallOptions(
        "test", "id", call_id=call_id, time_limit=0.1 if ending == "its time is up" else None
    )
    pickled = pickling.dumps((faulty.start_programs, (mailbox.path, ending), {}))
    error = ENDINGS[ending]

    def call() -> object:
        return slot.children.call(pickled, slot.options, lambda: slot.address, options).result()

    with Background(call) as running:
        pids = mailbox.read()
        assert len(pids) == 4
        if ending == "it is stopped":
            forkserver.stop_call(Stop(call_id, 15, "revoked"))
        if error is None:
            assert running.result() == pids[0]
        else:
            with pytest.raises(error):
                running.result()

    assert survivors(pids) == set()


@fault(25)
def test_programs_go_before_their_requester_does_anything(
    forkserver: Launcher, mailbox: Mailbox, start_method: StartMethod
) -> None:
    supervisor = Supervisor(forkserver.address, ProcessOptions("test", start_method))
    supervisor.call(pickling.dumps((faulty.start_programs, (mailbox.path, "it returns"), {})))

    # Its lifeline, which would end those of the group, is not cut before.
    assert supervisor.wait_exited(PATIENCE)
    assert survivors(mailbox.read()) == set()

    supervisor.close()


@fault(26)
def test_a_program_that_a_script_has_left_in_the_background_goes(
    either: Slot, mailbox: Mailbox
) -> None:
    either.run(faulty.leave_a_program_with_nohup, mailbox.path)

    assert survivors(mailbox.read()) == set()


# ── the dead ────────────────────────────────────────────────────────────────────────────────────

MANY = 10_000 if IN_FULL else 500


@fault(28)
def test_those_that_a_body_has_not_reaped_are_reaped(
    new_launcher: NewLauncher, make_slot: MakeSlot, start_method: str
) -> None:
    launcher = new_launcher(preload=["harness.faulty"])
    slot = make_slot(address=launcher.address, start_method=start_method)

    child = slot.run(faulty.leave_many_dead, MANY)
    slot.close()

    assert survivors([child], timeout=0) == set()
    # They became the forkserver's, which hears of each end in its turn. That there are none left
    # after this test is seen by the fixtures.
    assert slot.run(bodies.siblings) == 1


@fault(28)
def test_a_body_may_have_many_children_one_after_the_other(either: Slot) -> None:
    assert either.run(faulty.fork_and_reap, MANY) == MANY


@fault(28)
def test_a_body_that_is_killed_among_its_dead_leaves_none(either: Slot) -> None:
    with pytest.raises(ChildLostError):
        either.run(faulty.leave_many_dead_and_die, 50)

    assert either.run(bodies.siblings) >= 1
