"""Exit codes of commands: 2 with one line for bad input, 128 + signal when stopped, a traceback for our own faults."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from backends.pipeline.runs.exit_codes import Interrupts, command
from edm2_core.errors import InputError


def ends_with(error):
    @command
    def main():
        raise error

    return main


def test_a_status_is_passed_on_and_none_is_0():
    assert command(lambda: None)() == 0
    assert command(lambda: 130)() == 130


def test_bad_input_is_one_line_on_stderr_and_status_2(capsys):
    assert ends_with(InputError("batch must be even,\n got 3"))() == 2
    assert capsys.readouterr() == ("", "error: batch must be even, got 3\n")


def test_names_that_are_no_text_are_shown_and_command_no_terminal(capsys):
    assert ends_with(InputError("no \x1b[31mred\x07 or \udcff.png, but größer"))() == 2
    assert capsys.readouterr().err == "error: no \\x1b[31mred\\x07 or \\udcff.png, but größer\n"


def test_a_full_disk_is_one_line_and_status_2(capsys):
    assert ends_with(OSError(errno.ENOSPC, "No space left on device", "runs/x"))() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_package_of_an_extra_that_is_missing_is_one_line(capsys):
    for name in ("tyro", "numkong", "matplotlib"):
        assert ends_with(ModuleNotFoundError(f"No module named '{name}'", name=name))() == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: this command needs {name}, which is not installed: pip install 'edm2[torch]'")
        assert told.count("\n") == 1
    with pytest.raises(ModuleNotFoundError):
        ends_with(ModuleNotFoundError("No module named 'ours'", name="ours"))()


def test_other_faults_keep_their_traceback():
    with pytest.raises(PermissionError):
        ends_with(PermissionError(errno.EACCES, "no"))()
    with pytest.raises(ValueError, match="ours"):
        ends_with(ValueError("ours"))()


def test_ctrl_c_outside_the_loop_is_status_130():
    assert ends_with(KeyboardInterrupt())() == 130


ENDING = """
import atexit, sys
from backends.pipeline.runs.exit_codes import command, end_at_once, leave

class Watched:
    def __del__(self):
        print("taken down")

watched = Watched()

@command
def main():
    {act}
    atexit.register(print, "tidied")
    print("returned")
    return 143

leave(main())
"""


def test_a_process_of_several_ends_before_the_interpreter_is_finalized():
    """Its last words are out, the handlers of the exit were called, and the status is the command's."""
    for act, taken_down in (("end_at_once()", []), ("pass", ["taken down"])):
        done = subprocess.run([sys.executable, "-c", ENDING.format(act=act)], capture_output=True, text=True)
        assert (done.returncode, done.stdout.split("\n")[:-1]) == (143, ["returned", "tidied", *taken_down]), (
            done.stderr
        )


def test_an_unexpected_error_is_told_before_the_end():
    failing = ENDING.format(act="end_at_once()").replace("return 143", "raise ValueError('ours')")
    done = subprocess.run([sys.executable, "-c", failing], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ValueError: ours" in done.stderr
    assert done.stdout.startswith("returned\ntidied\n")


@pytest.mark.parametrize(("then", "status"), [("raise ValueError('ours')", 1), ("sys.exit(3)", 3), ("pass", 0)])
def test_what_a_script_does_after_a_command_decides_its_status(then, status):
    script = ENDING.format(act="end_at_once()").replace("leave(main())", f"main()\n{then}")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == status


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "QUIT", "USR1", "USR2"])
def test_a_signal_is_noted_and_the_handler_restored(name):
    signum = getattr(signal, f"SIG{name}")
    before = signal.getsignal(signum)
    with Interrupts() as interrupts:
        assert interrupts.status == 0
        os.kill(os.getpid(), signum)
        assert interrupts.signum == signum
        assert interrupts.status == 128 + signum
    assert signal.getsignal(signum) is before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.signum is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_is_not_ignored():
    with Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
