"""Ranks that meet: who is missing is told soon, and a rank that never comes is not waited for long."""

import socket
import threading
import time
from datetime import timedelta

import pytest

from mmtard.distributed import meeting
from mmtard.errors import RunError


@pytest.fixture(params=["file", "env"])
def place(request, tmp_path, monkeypatch):
    """A meeting point: a shared file, or an address and port."""
    for name in ("TORCHELASTIC_USE_AGENT_STORE", *meeting.LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    if request.param == "file":
        return f"file://{tmp_path}/store"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return "env://"


def test_ranks_that_all_come_meet_without_a_word_also_one_that_comes_late(place, capsys):
    stores = {}

    def come(rank, after):
        time.sleep(after)
        stores[rank] = meeting.meet(place, rank, 3, timedelta(seconds=30))

    threads = [threading.Thread(target=come, args=(rank, after)) for rank, after in ((0, 0), (1, 0), (2, 0.5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stores[0].set("said", "by the first")
    assert stores[2].get("said") == b"by the first" and capsys.readouterr().err == ""


def test_a_rank_that_was_killed_before_they_met_is_named_and_not_waited_for(place, capsys, monkeypatch):
    monkeypatch.setattr(meeting, "QUIET_S", 0.2)
    began = time.monotonic()
    with pytest.raises(
        RunError, match=r"rank 0 of 12 waited 1 seconds at .* for ranks 1, 2, .*8 and 3 more; start all"
    ):
        meeting.meet(place, 0, 12, timedelta(seconds=1))
    assert time.monotonic() - began < 10
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("mmtard: rank 0 of 12 waits at ") and "ranks 1, 2" in told[0]


def test_where_the_first_rank_is_missing_the_others_say_so(place, capsys, monkeypatch):
    monkeypatch.setattr(meeting, "QUIET_S", 0.2)
    with pytest.raises(RunError, match="rank 1 of 2 waited 1 seconds at .* for rank 0; start all ranks again"):
        meeting.meet(place, 1, 2, timedelta(seconds=1))
    assert "rank 0" in capsys.readouterr().err


def test_a_rank_that_gave_up_waiting_is_not_taken_for_one_that_is_there(tmp_path):
    place = f"file://{tmp_path}/store"
    with pytest.raises(RunError, match="for rank 1; start all"):
        meeting.meet(place, 0, 2, timedelta(seconds=0.2))
    with pytest.raises(RunError, match="for rank 0; start all"):
        meeting.meet(place, 1, 2, timedelta(seconds=0.2))


def test_what_answers_at_the_address_and_is_no_first_rank_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(silent.getsockname()[1]))
        with pytest.raises(RunError, match="rank 1 of 2 waited 1 seconds at 127.0.0.1:.* for rank 0; start all"):
            meeting.meet("env://", 1, 2, timedelta(seconds=1))


def test_the_patience_follows_the_watchdog_and_is_longer_under_a_launcher_that_ends_all(monkeypatch):
    for name in meeting.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    assert meeting.patience_of(10) == timedelta(minutes=2) and meeting.patience_of(5) == timedelta(minutes=1)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert meeting.patience_of(10) == timedelta(minutes=10)


def test_a_training_waits_for_its_ranks_by_its_own_watchdog(monkeypatch):
    from mmtard.distributed import ranks

    asked = []

    def meet(place, rank, world, patience):
        asked.append((rank, world, patience))
        raise RunError("nobody")

    for name in meeting.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MMTARD_INIT_FILE": "/tmp/none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "meet", meet)
    with pytest.raises(RunError, match="nobody"):
        ranks.start("cpu", watchdog_minutes=1)
    assert asked == [(1, 2, timedelta(seconds=12))]
