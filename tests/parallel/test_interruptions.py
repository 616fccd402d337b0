"""A run that is killed, preempted or moved to another number of ranks ends as one that was never disturbed."""

import hashlib
import json
import random
import signal
import time

import pytest
from safetensors.torch import load_file

from mmtard.runs.metrics import TIMINGS

from .launch import run_ranks, start_ranks

pytestmark = pytest.mark.slow
REQUEUE = 75


def train(config):
    return ["-m", "mmtard", "train", config]


def metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def digest(run):
    return hashlib.sha256((run / "checkpoints" / "latest" / "weights.safetensors").read_bytes()).hexdigest()


def starts(run):
    return [json.loads(line) for line in (run / "resume.jsonl").read_text().splitlines()]


def steps_done(run):
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def until(condition, processes, limit=120.0):
    """Wait for the condition or the end of a process; whether the condition came."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if condition():
            return True
        if any(p.poll() is not None for p in processes):
            return False
        time.sleep(0.0005)
    raise AssertionError("neither the awaited moment nor the end of the run came")


def test_sigkill_at_any_moment_changes_neither_weights_nor_metrics(job, undisturbed, tmp_path):
    """Killed in a checkpoint's write, then at a random moment, and then the newest checkpoint is damaged."""
    config, run = job("killed")
    rng = random.Random()

    def in_a_checkpoint_write():
        return any((run / "checkpoints").glob(".writing-*")) if run.exists() else False

    def at_a_random_moment():
        # Two checkpoints, so that there is one to fall back to, and the scratch folder that the first kill left is
        # gone.
        return steps_done(run) > 8 + more and not in_a_checkpoint_write()

    more = rng.randint(1, 6)
    for moment in (in_a_checkpoint_write, at_a_random_moment):
        processes = start_ranks(train(config), 2, tmp_path / "meet", tmp_path / "log")
        try:
            assert until(moment, processes), (tmp_path / "log.0").read_text()
            time.sleep(rng.uniform(0, 0.05) if moment is at_a_random_moment else 0)
        finally:
            for p in processes:
                p.send_signal(signal.SIGKILL)
            for p in processes:
                p.wait()
    newest = (run / "checkpoints" / "latest").resolve()
    weights = bytearray((newest / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "weights.safetensors").write_bytes(weights)
    run_ranks(train(config), 2, tmp_path, "last")
    assert metrics(run) == metrics(undisturbed)
    assert digest(run) == digest(undisturbed)
    assert not list((run / "checkpoints").glob(".writing-*"))
    assert [s["passed_over"] for s in starts(run)] == [
        [],
        [],
        [f"{newest.name}: weights.safetensors does not match its checksum"],
    ]
    assert starts(run)[2]["step"] >= 4


def test_moving_between_two_ranks_and_one_keeps_the_samples_and_the_training(job, undisturbed, tmp_path):
    config, run = job("moved")
    for world, stop_after, signal_number in ((2, 5, signal.SIGTERM), (1, 13, signal.SIGUSR2)):
        processes = start_ranks(train(config), world, tmp_path / "meet", tmp_path / f"log{world}")
        assert until(lambda: steps_done(run) >= stop_after, processes)
        processes[-1].send_signal(signal_number)  # any one rank may be told: all agree
        assert [p.wait(60) for p in processes] == [REQUEUE] * world
    run_ranks(train(config), 2, tmp_path, "last")
    assert [s["world_size"] for s in starts(run)] == [2, 1, 2]
    assert all(s["step"] > 0 for s in starts(run)[1:])
    ours, theirs = metrics(run), metrics(undisturbed)
    assert [row["batch"] for row in ours] == [row["batch"] for row in theirs]
    # One rank sums a batch in another order than two: the last bits of the loss differ.
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-4)
    a, b = (load_file(r / "checkpoints" / "latest" / "weights.safetensors") for r in (run, undisturbed))
    for name, weight in a.items():
        if not name.endswith("in_proj_bias"):  # its part for the keys has no gradient but rounding noise
            assert (weight - b[name]).abs().max() < 1e-4, name


def test_a_second_start_of_a_complete_run_does_nothing(undisturbed, job, train_here, capfd):
    config, run = job("undisturbed")
    before = digest(run), metrics(run)
    assert train_here(config) == 0
    assert "complete, 24 steps done" in capfd.readouterr().out
    assert (digest(run), metrics(run)) == before
