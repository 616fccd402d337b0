"""A closed pipe or terminal ends no work."""

import io
import os
import shlex
import signal
import subprocess
import sys

import pytest

from mmtard.distributed.console import LastingStream, printable
from mmtard.distributed.interruption import Interruption
from mmtard.errors import RunError
from mmtard.runs import history


def test_a_process_whose_pipe_is_closed_goes_on_and_ends_well():
    code = (
        "from mmtard.distributed.console import *; from mmtard.distributed.processes import exit_process; import sys\n"
    )
    code += "outlive_reader(); [print('x' * 9999) for _ in range(99)]; sys.stdout.flush()\n"
    code += "print(is_unread(), file=sys.stderr); exit_process(0)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "True\n" and process.wait(20) == 0


def _program(redirection: str) -> subprocess.CompletedProcess:
    words = f"{shlex.quote(sys.executable)} -m mmtard config --explain train.lr {redirection}"
    return subprocess.run(["sh", "-c", words], stderr=subprocess.PIPE, text=True, timeout=60)


def test_output_that_a_full_disk_did_not_take_is_a_failure_that_says_so():
    ended = _program("> /dev/full")
    assert ended.returncode == 120
    assert ended.stderr == "standard output could not be written whole: No space left on device\n"


def test_a_program_that_was_started_without_an_output_does_its_work():
    ended = _program(">&-")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_word_that_the_locale_cannot_write_is_written_in_its_letters():
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("Lauf mit Ü")
    stream.flush()
    assert raw.getvalue() == rb"Lauf mit \xdc"


def test_control_characters_are_not_printed():
    assert printable("a\x1b[2J\tb\n中 Ü") == "a?[2J?b?中 Ü"


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in Interruption.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "own, on_others, status",
    [("SIGUSR2", None, 75), ("SIGINT", None, 130), (None, "SIGINT", 130), (None, "SIGTERM", 75)],
)
def test_work_that_a_person_stops_on_any_rank_ends_for_good_and_other_signals_ask_for_another_start(
    own, on_others, status
):
    interruption = Interruption()
    interruption.signal = own
    others = iter([on_others is not None, on_others == "SIGINT"])  # the answers that the other ranks give

    class Ranks:
        def any(self, flag):
            return next(others) or flag

    with pytest.raises(RunError, match="; all is kept, start it again") as end:
        interruption.stop(Ranks(), kept="all is kept")
    assert end.value.status == status


def test_a_closed_terminal_is_a_persons_stop(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests themselves may run under nohup
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert interruption.name == "SIGHUP" and history.kind_of_stop(interruption.signal) == history.STOPPED


def test_under_nohup_a_closed_terminal_means_nothing(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interruption
