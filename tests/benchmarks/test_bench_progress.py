"""What `mmtard bench` says while it measures."""

import pytest
import torch

from mmtard.benchmarks.timing import alternately
from mmtard.distributed.progress import WorkProgress

CPU = torch.device("cpu")
NOTHING = {name: lambda: None for name in ("mmtard", "mmtard, clean stored")}


def measure(shown=True):
    with WorkProgress(shown) as progress:
        alternately(NOTHING, 2, CPU, 1, progress, {"mmtard": 3.0, "mmtard, clean stored": 1.0})
    return progress


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


def test_a_terminal_is_told_variant_round_and_time_left(terminal, capsys):
    measure()
    out, said = capsys.readouterr()
    assert not out, "the table alone goes there"
    for line in ("mmtard: warm-up 1 of 1", "mmtard, clean stored: round 1 of 2", "mmtard: round 2 of 2", " left "):
        assert line in said


def test_a_file_and_other_ranks_are_told_nothing(terminal, monkeypatch, capsys):
    measure(shown=False)
    monkeypatch.delenv("FORCE_COLOR")
    measure()
    assert capsys.readouterr() == ("", "")


def test_the_time_left_counts_the_work_of_a_variant_and_not_its_turn(monkeypatch):
    done = []
    monkeypatch.setattr(WorkProgress, "part", lambda self, words, total=None: done.append(total))
    monkeypatch.setattr(WorkProgress, "advance", lambda self, amount=1.0: done.append(amount))
    measure()
    assert done == [12.0, 3.0, 1.0, 3.0, 1.0, 1.0, 3.0]


def test_work_that_ends_early_or_takes_more_counts_as_foreseen(monkeypatch):
    done = []
    monkeypatch.setattr(WorkProgress, "advance", lambda self, amount=1.0: done.append(amount))
    progress = WorkProgress()
    for heard in (3, 20):
        with progress.running_at_most("fare", 10) as advance:
            advance(heard)
    assert done == [3, 7, 10, 0]
