"""A rank that is killed, hangs or fails ends the others in time, with one line that names it and a status that says
what next.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from mmtard import config as settings
from mmtard.errors import UserError
from mmtard.runs import history, lock

from .launch import start_ranks
from .test_interruptions import REQUEUE, metrics, starts, steps_done, train, until

pytestmark = pytest.mark.slow


@pytest.fixture
def two(job, tmp_path):
    """Call with a name and settings: two ranks of that run past their second step, and its folder; they are gone
    afterwards.
    """
    started = []

    def start(name, **changes):
        path, run = job(name, **changes)
        processes = start_ranks(train(path), 2, tmp_path / f"{len(started)}.meet", tmp_path / "log")
        started.extend(processes)
        assert until(lambda: steps_done(run) > 2, processes), (tmp_path / "log.0").read_text()
        return processes, run, path

    yield start
    for process in started:
        process.kill()
        process.wait()


def lines(path):
    """What a rank said itself, without the libraries' warnings."""
    return [line for line in path.read_text().splitlines() if line.startswith("mmtard")]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_other_with_one_line_and_the_run_goes_on(two, undisturbed, tmp_path, lost):
    processes, run, path = two(f"lost{lost}")
    processes[lost].kill()
    survivor = 1 - lost
    assert processes[survivor].wait(20) == REQUEUE
    log = tmp_path / f"log.{survivor}"
    (line,) = lines(log)
    assert (
        f"lost rank {lost} (" in line
        and f"process {processes[lost].pid}" in line
        and "Traceback" not in log.read_text()
    )
    (start,) = starts(run)
    assert start["end"]["kind"] == history.LOST and start["end"]["reason"] in line
    if not lost:
        return
    again = start_ranks(train(path), 2, tmp_path / "again.meet", tmp_path / "again")
    assert [p.wait(120) for p in again] == [0, 0]
    assert metrics(run) == metrics(undisturbed)
    assert [history.end_kind(s) for s in starts(run)] == [history.LOST, history.COMPLETE]


def test_a_second_start_is_refused_and_a_hang_ends_in_time_names_the_rank_and_past_its_bound_is_for_good(
    two, tmp_path, train_here, monkeypatch
):
    train = {"steps": 5000, "batch_size": 16, "lr": 1e-3}
    processes, run, path = two("hung", train=train, resume={"watchdog_minutes": 0.1, "max_losses": 0})
    monkeypatch.setattr(lock, "LOCK_WAIT_S", 0.6)
    with pytest.raises(
        UserError, match=f"is in use by {os.uname().nodename} process {processes[0].pid}; wait for it to end"
    ):
        train_here(path)
    assert all(p.poll() is None for p in processes) and len(starts(run)) == 1
    processes[1].send_signal(signal.SIGSTOP)
    assert processes[0].wait(6 + 6) == 1
    printed = (tmp_path / "log.0").read_text()
    assert "for 0.1 minutes, rank 1 (" in starts(run)[0]["end"]["reason"]
    assert f"process {processes[1].pid}, last heard of in the" in printed and "did not arrive" in printed
    assert 'train.py", line' in printed  # where this rank waited
    assert history.why_not_restart(run, settings.Resume(max_losses=5)) is None
    assert (
        history.why_not_restart(run, settings.Resume(max_losses=0))
        and "resume.max_losses allows 0" in lines(tmp_path / "log.0")[-1]
    )


def test_a_rank_that_fails_is_no_loss_and_is_not_started_again(job, tmp_path):
    """An error nobody foresaw: the next start would end there, too."""
    path, run = job("failed", train={"steps": 24, "batch_size": 16, "lr": 1e-3})
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys\n"
        "from mmtard.cli import main\n"
        "from mmtard.training import train\n"
        "update = train.Trainer._optimizer_step\n"
        "def fail(self, batch, lr):\n"
        "    if self.step == 3 and os.environ['RANK'] == '1':\n"
        "        raise LookupError('no kernel image')\n"
        "    return update(self, batch, lr)\n"
        "train.Trainer._optimizer_step = fail\n"
        "raise SystemExit(main.main(['train', sys.argv[1]]))\n"
    )
    processes = start_ranks([script, path], 2, tmp_path / "meet", tmp_path / "log")
    assert [p.wait(120) for p in processes] == [1, 1]
    (line,) = lines(tmp_path / "log.0")
    assert line == "mmtard: rank 1: LookupError: no kernel image"
    assert starts(run)[0]["end"]["kind"] == history.FAILED and "Traceback" in (tmp_path / "log.1").read_text()


def test_starts_that_come_no_further_are_stopped_before_a_model_is_made(job, tmp_path):
    path, run = job("loops", resume={"max_starts_without_progress": 2})
    for attempt in range(2):
        processes = start_ranks(train(path), 1, tmp_path / "meet", tmp_path / "log")
        assert until(lambda: run.exists() and len(history.read(run)) > attempt, processes)
        for process in processes:
            process.kill()
            process.wait()
    processes = start_ranks(train(path), 2, tmp_path / "meet", tmp_path / "last")
    assert [p.wait(60) for p in processes] == [1, 1]
    (line,) = lines(tmp_path / "last.0")
    assert (
        "the last 2 starts began at step 0 and left no newer checkpoint" in line
        and "resume.max_starts_without_progress=3" in line
    )
    assert len(starts(run)) == 2


def test_a_killed_and_an_interrupted_evaluation_go_on_to_the_numbers_of_one_rank_alone(
    undisturbed, tmp_path, one_thread, command
):
    data, out = settings.load(undisturbed / "config.yaml").data.shards, tmp_path / "result"
    words = [
        "evaluate",
        undisturbed,
        "--data",
        data,
        "--eps",
        "2/255",
        "--attacks",
        "apgd-ce",
        "--iters",
        60,
        "--batch-size",
        5,
        "--device",
        "cpu",
        "--out",
    ]
    for number, told, statuses in (
        (signal.SIGKILL, (0, 1), [-signal.SIGKILL] * 2),
        (signal.SIGTERM, (1,), [REQUEUE] * 2),
    ):
        attacked = partial(out).count("broken_by")
        processes = start_ranks(["-m", "mmtard", *words, out], 2, tmp_path / "meet", tmp_path / f"log{number}")
        try:
            assert until(lambda: partial(out).count("broken_by") > attacked, processes)
            for rank in told:  # of a signal that can be heard, one rank is told and all agree
                processes[rank].send_signal(number)
            assert [p.wait(90) for p in processes] == statuses
        finally:
            for process in processes:
                process.kill()
        assert not (out / "results.json").exists()
    (line,) = lines(tmp_path / f"log{signal.SIGTERM}.1")
    assert line == f"mmtard (rank 1): stopped by SIGTERM; what is measured is kept in '{out}', start it again"
    assert "shards: goes on, " in (tmp_path / f"log{signal.SIGTERM}.0").read_text()
    done = partial(out).count("broken_by")
    assert command(*words, out) == command(*words, tmp_path / "alone") == 0
    (found,), (alone,) = (
        json.loads((folder / "results.json").read_text())["datasets"] for folder in (out, tmp_path / "alone")
    )
    assert found["samples"] == alone["samples"] and found["clean_all"] == alone["clean_all"]
    assert 2 <= done < sum(found["samples"]["clean"]) / 5 and not (out / "partial").exists()


@pytest.fixture
def one_thread():
    """As the ranks of a launch have: sums in another order would be other numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def partial(out):
    """The lines that say what an evaluation has measured so far."""
    return "".join(p.read_text() for p in sorted(out.glob("partial/*.jsonl")))


@pytest.mark.parametrize("where, ended", [("metrics", 6), ("checkpoint", 7)])
def test_a_full_disk_ends_every_rank_at_once_with_the_same_words_and_is_no_loss(job, tmp_path, where, ended):
    config, run = job(f"full-{where}", checkpoint={"every": 4 if where == "checkpoint" else 50, "keep_last": 2})
    script = Path(__file__).with_name("full_disk.py")
    ranks = start_ranks([script, where, 5, config], 2, tmp_path / "meet", tmp_path / "log")
    assert [rank.wait(120) for rank in ranks] == [2, 2]
    first, second = ((tmp_path / f"log.{rank}").read_text().splitlines()[-1] for rank in (0, 1))
    assert "No space left on device" in first and second == first.replace("mmtard:", "mmtard (rank 1):")
    (start,) = history.read(run)
    assert start["end"]["kind"] == history.FAILED and start["end"]["step"] <= ended < 8
    assert "No space left" in history.end_reason(start)
