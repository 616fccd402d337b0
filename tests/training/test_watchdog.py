"""How the watch of a rank ends it when a step comes no further, from what the other ranks' heartbeats say."""

import json
import threading
from types import SimpleNamespace

import pytest

from mmtard import config
from mmtard.errors import ProcessLostError, RunError
from mmtard.runs import history, layout
from mmtard.training import watchdog

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # a thread that exits as the process would


@pytest.fixture
def hang(tree, write, tmp_path, monkeypatch):
    """Call with what the only other rank said it met: this rank, past its limit in the update of step 3; its exit status."""
    run, ended = tmp_path / "run", threading.Event()
    statuses = []

    def exit(status):
        statuses.append(status)
        ended.set()
        raise SystemExit  # of the watching thread

    monkeypatch.setattr(watchdog.os, "_exit", exit)

    def call(said):
        run.mkdir()
        history.record_start(run, {"step": 0})
        with watchdog.Watchdog(
            config.load(write(tree), ["resume.watchdog_minutes=0.01"]), SimpleNamespace(rank=0, world_size=2)
        ) as watch:
            watch.at(3, "set-up")
            other = {"rank": 1, "host": "node2", "pid": 7, "step": 3, "phase": "update", "beat": 5, "said": said}
            (run / layout.HEARTBEATS / "rank-1.json").write_text(json.dumps(other))
            watch.at(3, "update")
            assert ended.wait(10)
        (start,) = history.read(run)
        return statuses, history.end_kind(start), history.end_reason(start)

    return call


@pytest.mark.parametrize("kind", [history.FAILED, history.STOPPED])
def test_a_rank_that_waits_for_one_that_failed_or_was_stopped_ends_for_good(hang, capfd, kind):
    assert hang([kind, "rank 1: out of memory"]) == ([1], kind, "rank 1: out of memory")
    assert capfd.readouterr().err.endswith("\nmmtard (rank 0): rank 1: out of memory\n")


def test_a_rank_that_waits_for_one_that_was_lost_says_what_that_met_and_asks_for_another_start(hang):
    assert hang([history.LOST, "step 3: lost rank 2"]) == ([75], history.LOST, "step 3: lost rank 2")


def test_a_silent_rank_is_named(hang):
    statuses, kind, reason = hang(None)
    assert (statuses, kind) == ([75], history.LOST)
    assert (
        reason
        == "step 3: no progress in its update for 0.01 minutes, rank 1 (node2, process 7, last heard of in the update of step 3) did not arrive"
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
