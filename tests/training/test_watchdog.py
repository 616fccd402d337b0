"""How the watch of a rank ends it when a step comes no further, from what the other ranks' heartbeats say."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from mmtard import config
from mmtard.errors import ProcessLostError, RunError
from mmtard.files import write_text
from mmtard.runs import history, layout
from mmtard.training import heartbeat, watchdog

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # a thread that exits as the process would


@pytest.fixture
def hang(tree, write, tmp_path, monkeypatch):
    """Call with how the only other rank goes on: this rank, in the update of step 3, until its watch ends it.

    said: what the other met; beats: its heartbeat goes on; more: of its report. The exit status, and the noted end.
    """
    run, ended = tmp_path / "run", threading.Event()
    statuses = []

    def exit(status):
        statuses.append(status)
        ended.set()
        raise SystemExit  # of the watching thread

    monkeypatch.setattr(watchdog.os, "_exit", exit)

    def call(said=None, beats=False, silent=60.0, note=None, **more):
        run.mkdir()
        history.record_start(run, {"step": 0})
        settings = config.load(write(tree), ["resume.watchdog_minutes=0.01"])
        with watchdog.Watchdog(settings, SimpleNamespace(rank=0, world_size=2)) as watch:
            watch.silent = silent
            watch.at(3, "set-up")
            other = {"rank": 1, "host": "node2", "pid": 7, "step": 3, "phase": "update", "beat": 5, "said": said} | more
            path = run / layout.HEARTBEATS / "rank-1.json"
            path.write_text(json.dumps(other))
            watch.at(3, "update")
            if note:
                history.record_end(run, *note)
            while not ended.wait(0.01):
                if beats:
                    other["beat"] += 1
                    write_text(path, json.dumps(other))
        (start,) = history.read(run)
        return statuses, history.end_kind(start), history.end_reason(start)

    return call


@pytest.mark.parametrize("kind", [history.FAILED, history.STOPPED])
def test_a_rank_that_waits_for_one_that_failed_or_was_stopped_ends_for_good(hang, capfd, kind):
    assert hang([kind, "rank 1: out of memory"]) == ([1], kind, "rank 1: out of memory")
    assert capfd.readouterr().err.endswith("\nmmtard (rank 0): rank 1: out of memory\n")


def test_a_rank_that_waits_for_one_that_was_lost_says_what_that_met_and_asks_for_another_start(hang):
    assert hang([history.LOST, "step 3: lost rank 2"]) == ([75], history.LOST, "step 3: lost rank 2")


OTHER = "rank 1 (node2, process 7, last heard of in the {} of step 3)"


def test_a_rank_whose_heartbeat_stands_still_is_lost_long_before_the_limit_of_a_step(hang):
    statuses, kind, reason = hang(silent=0.1)
    assert (statuses, kind) == ([75], history.LOST)
    assert re.fullmatch(re.escape(f"step 3: lost {OTHER.format('update')}: silent for ") + r"\d+ seconds", reason)


def test_a_rank_whose_process_is_gone_is_lost_at_once(hang):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = {"host": socket.gethostname(), "pid_space": os.readlink("/proc/self/ns/pid"), "pid": gone.pid}
    statuses, kind, reason = hang(**here)
    assert (statuses, kind) == ([75], history.LOST)
    assert reason.startswith("step 3: lost rank 1") and reason.endswith("step 3): its process is gone")


@pytest.mark.parametrize("more", [{"pid_space": "pid:[1]"}, {"host": "node2"}, {"pid_space": None}])
def test_a_process_number_of_another_host_or_container_says_nothing(more):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = {"host": socket.gethostname(), "pid_space": os.readlink("/proc/self/ns/pid"), "pid": gone.pid}
    assert (
        heartbeat.is_gone(here)
        and not heartbeat.is_gone(here | more)
        and not heartbeat.is_gone(here | {"pid": os.getpid()})
    )


def test_a_rank_that_is_behind_is_named_when_the_limit_is_reached(hang):
    statuses, kind, reason = hang(beats=True, phase="data")
    assert (statuses, kind) == ([75], history.LOST)
    assert reason == f"step 3: no progress in its update for 0.01 minutes, {OTHER.format('data')} did not arrive"


@pytest.mark.parametrize("kind, status", [(history.FAILED, 1), (history.LOST, 75)])
def test_an_end_that_another_rank_noted_ends_this_one_too(hang, kind, status):
    """One that waits inside a kernel for a rank that is gone sees no closed connection."""
    assert hang(beats=True, note=(kind, "rank 5: what it met", 3)) == ([status], kind, "rank 5: what it met")


def test_a_rank_that_left_after_its_work_is_not_taken_for_lost(tmp_path):
    for rank in (0, 1):
        own = heartbeat.Heartbeat(tmp_path, rank, 2)
        own.left = rank == 1
        own.write()
    neighbour = watchdog._Neighbour(heartbeat.Heartbeat(tmp_path, 0, 2), silent=0.0)
    assert [neighbour.why_lost() for _ in range(3)] == [None] * 3


def test_process_groups_wait_longer_than_the_watchdog_does():
    for minutes in (1, 10, 30):
        limit = watchdog.group_timeout(SimpleNamespace(resume=SimpleNamespace(watchdog_minutes=minutes)))
        assert limit >= timedelta(minutes=30) and limit > timedelta(minutes=1.2 * minutes) + timedelta(seconds=10)


CUDA = "CUDA error: {}\nCUDA kernel errors might be asynchronously reported at some other call"


@pytest.mark.parametrize(
    "words, kind, status",
    [
        ("uncorrectable ECC error encountered", history.LOST, 75),
        ("unspecified launch failure", history.LOST, 75),
        ("GPU is lost", history.LOST, 75),
        ("all CUDA-capable devices are busy or unavailable", history.LOST, 75),
        ("uncorrectable NVLink error detected during the execution", history.LOST, 75),
        ("device-side assert triggered", history.FAILED, None),
        ("an illegal memory access was encountered", history.FAILED, None),
        ("out of memory", history.FAILED, None),
        ("no kernel image is available for execution on the device", history.FAILED, None),
    ],
)
def test_a_gpu_that_fails_is_a_loss_and_a_wrong_index_is_a_failure(tree, write, tmp_path, words, kind, status):
    run = tmp_path / "run"
    run.mkdir()
    history.record_start(run, {"step": 0})
    with pytest.raises(RuntimeError if status is None else RunError) as error:
        with watchdog.Watchdog(config.load(write(tree)), SimpleNamespace(rank=2, world_size=1)) as watch:
            watch.at(3, "set-up")
            raise torch.AcceleratorError(CUDA.format(words))
    (start,) = history.read(run)
    assert history.end_kind(start) == kind and words in history.end_reason(start)
    if status is not None:
        assert error.value.status == status
        assert str(error.value).startswith(
            f"rank 2, step 3: a GPU of {socket.gethostname()} failed: CUDA error: {words}"
        )


def test_a_loader_process_that_was_killed_counts_as_a_loss_and_the_run_may_go_on(tree, write, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for status in (75, 1):
        history.record_start(run, {"step": 0})
        with pytest.raises(RunError, match="rank 0, step 3: a loader process was lost") as error:
            with watchdog.Watchdog(
                config.load(write(tree), ["resume.max_losses=1"]), SimpleNamespace(rank=0, world_size=1)
            ) as watch:
                watch.at(3, "set-up")
                raise ProcessLostError("a loader process was lost")
        assert error.value.status == status and history.end_kind(history.read(run)[-1]) == history.LOST
    assert "resume.max_losses" in str(error.value)
