"""Random kills, again and again: the end has the bits of an undisturbed one. `bash tests/soak.sh [KILLS] [SEED]` for
long.

Killed are one rank, all of them, a loader process, a rank within a checkpoint's write, a start in its set-up; or the
run is told to stop. The seed is printed, so that a failure can be repeated as far as time itself can be.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from mmtard.evaluation import results

from .launch import run_ranks, start_ranks
from .test_interruptions import REQUEUE, digest, metrics, steps_done, until

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("MMTARD_SOAK_KILLS", 3))
SEED = int(os.environ.get("MMTARD_SOAK_SEED", time.time_ns() % 10**6))
# As often as it takes; a rank that waits for one that is gone is not waited for.
RESUME = {"max_losses": None, "max_preemptions": None, "max_starts_without_progress": 10**6, "watchdog_minutes": 1}


def children(pid):
    """The processes that a rank started: its loaders."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def disturb(kind, ranks, rng, run, before):
    """Let a start come to a moment of its own, and do it harm."""
    if kind == "set-up":
        time.sleep(rng.random())
    elif kind == "write":
        until(lambda: any((run / "checkpoints").glob(".writing-*")) if run.exists() else False, ranks)
    else:
        until(lambda: steps_done(run) > before + rng.randrange(3), ranks)
    if kind == "stop":
        for rank in ranks:
            rank.send_signal(rng.choice([signal.SIGTERM, signal.SIGUSR2]))
    elif kind == "loader":
        loaders = children(rng.choice(ranks).pid)
        if loaders:
            kill(rng.choice(loaders))
    elif kind in ("rank", "write"):
        rng.choice(ranks).kill()
    else:
        for rank in ranks:
            rank.kill()


def end(ranks):
    """The exit statuses, of ranks that all come to an end; those that wait for a dead one in vain are ended, too."""
    statuses = [rank.wait(120) for rank in ranks]
    for rank in ranks:
        rank.kill()
    return statuses


def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bits(job, undisturbed, tmp_path):
    rng = random.Random(SEED)
    config, run = job("soaked", resume=RESUME)
    kinds = ["rank", "all", "loader", "write", "set-up", "stop"]
    plan, runs = [kind for _ in range(KILLS) for kind in rng.sample(kinds, len(kinds))][:KILLS], 1
    print(f"soak: seed {SEED}, {KILLS} kills: {' '.join(plan)}")
    while True:
        # A run that came to its end under the kills left is begun anew.
        if steps_done(run) == 24 and plan:
            config, run = job(f"soaked{runs}", resume=RESUME)
            runs += 1
        ranks = start_ranks(["-m", "mmtard", "train", config], 2, tmp_path / "meet", tmp_path / "log")
        if plan:
            disturb(plan.pop(0), ranks, rng, run, steps_done(run))
        statuses = end(ranks)
        if statuses == [0, 0]:
            assert digest(run) == digest(undisturbed) and metrics(run) == metrics(undisturbed), f"seed {SEED}"
            if not plan:
                return
        assert not set(statuses) & {2}, (tmp_path / "log.0").read_text()


def test_an_evaluation_that_is_killed_again_and_again_ends_with_the_same_numbers(undisturbed, tmp_path):
    rng = random.Random(SEED + 1)
    data = json.loads(json.dumps(str(undisturbed.parents[1] / "shards")))
    words = [
        "-m",
        "mmtard",
        "evaluate",
        undisturbed,
        "--data",
        data,
        "--eps",
        "8/255",
        "--attacks",
        "pgd",
        "--iters",
        "3",
    ]
    words += ["--batch-size", "4", "--device", "cpu", "--workers", "1", "--out"]
    run_ranks([*words, tmp_path / "plain"], 2, tmp_path, "plain")
    for left in range(max(1, KILLS // 3), -1, -1):
        ranks = start_ranks([*words, tmp_path / "killed"], 2, tmp_path / "meet", tmp_path / "log")
        if left:
            time.sleep(2 * rng.random())
            for rank in ranks if rng.random() < 0.5 else [rng.choice(ranks)]:
                rank.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        statuses = end(ranks)
        assert left or statuses == [0, 0], (statuses, (tmp_path / "log.0").read_text())
        assert set(statuses) <= {0, 1, REQUEUE, -signal.SIGKILL}
    plain, killed = (results.read(tmp_path / name)["datasets"][0]["samples"] for name in ("plain", "killed"))
    assert plain == killed, f"seed {SEED}"
