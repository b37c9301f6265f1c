"""What others on the machine can see and reach: no secrets, no names to guess, nothing to read."""

import os
import secrets
import stat
import tempfile
from pathlib import Path

import psutil
import pytest

from harness import bodies, marks
from harness.process_fixtures import MakeSlot, NewLauncher
from harness.processes import Background, Mailbox, Word

both_start_methods = pytest.mark.parametrize("start_method", ["forkserver", "spawn"])


@pytest.fixture
def secret() -> str:
    return secrets.token_hex()


@both_start_methods
def test_a_secret_is_in_no_command_line_and_in_no_environment_but_the_child_s_own(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    secret: str,
    start_method: str,
) -> None:
    launcher = new_launcher(preload=["harness.bodies"])
    slot = make_slot(
        address=launcher.address, start_method=start_method, env={"TOKEN": f"env-{secret}"}
    )
    # The argument goes by the call socket.
    body = (bodies.report_and_wait_with, mailbox.path, word.path, f"argument-{secret}")
    with Background(slot.run, *body) as call:
        pid, token = mailbox.read()
        assert token == f"env-{secret}"
        processes = [
            psutil.Process(),
            *psutil.Process().children(recursive=True),
            *marks.marked_processes(os.environ[marks.VARIABLE]),
        ]
        assert pid in {process.pid for process in processes}
        for process in processes:
            assert secret not in " ".join(process.cmdline())
            seen = Path(f"/proc/{process.pid}/environ").read_bytes()
            # What a fresh interpreter is started with the kernel shows, to its own user alone.
            assert (secret.encode() in seen) == (process.pid == pid and start_method == "spawn")
        word.give("well")
        assert call.result() == (pid, "well")


@both_start_methods
def test_others_can_read_nothing_and_guess_no_name(
    *,
    new_launcher: NewLauncher,
    make_slot: MakeSlot,
    mailbox: Mailbox,
    word: Word,
    start_method: str,
) -> None:
    before = os.umask(0)
    try:
        launcher = new_launcher(preload=["harness.bodies"])
    finally:
        os.umask(before)
    slot = make_slot(address=launcher.address, start_method=start_method)
    with Background(slot.run, bodies.report_and_wait, mailbox.path, word.path) as call:
        mailbox.read()
        left = sorted(Path(tempfile.gettempdir()).rglob("*"))
        word.give("well")
        call.result()

    folder = Path(launcher.address).parent
    assert left == [folder, Path(launcher.address)]
    # mkdtemp(3): eight characters of 37 each.
    assert len(folder.name.removeprefix("isolated_tasks-")) == 8
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.stat().st_uid == os.geteuid()
