"""Random kills, again and again: the end has the bits of an undisturbed one. `bash tests/soak.sh [KILLS] [SEED]` for
long.

Four in ten kills meet a training: one rank, all of them, a loader process, a rank within a checkpoint's write, a start
in its set-up, the probe, the launcher of the ranks; or the run is told to stop. The others meet evaluate, cache, export
and shards. The seed is printed, so that a failure can be repeated as far as time itself can be. With a ledger, kills
whose end was seen to have the same bits count for good, and a soak that was cut goes on where it was.
"""

import json
import os
import random
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import processes_where

from mmtard.evaluation import results

from .launch import start_ranks
from .test_interruptions import REQUEUE, digest, metrics, steps_done, until
from .test_probing import background

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("MMTARD_SOAK_KILLS", 3))
SEED = int(os.environ.get("MMTARD_SOAK_SEED", time.time_ns() % 10**6))
LEDGER = os.environ.get("MMTARD_SOAK_LEDGER")  # a file of JSON lines: kills of a soak in parts that ended well
A_ROUND = 5  # kills of a command between two looks at its bytes
OF_COMMANDS = 15 * KILLS // 100  # kills that meet each command which is no training
COMMANDS = ("evaluate", "cache", "export", "shards")
# As often as it takes; a rank that waits for one that is gone is not waited for.
RESUME = {"max_losses": None, "max_preemptions": None, "max_starts_without_progress": 10**6, "watchdog_minutes": 5}
PATIENCE_S = 120.0 if KILLS < 10 else 900.0  # a long soak goes on beside other work
OTHERS_TURN_S = 30.0 if KILLS < 10 else 100.0  # after a rank has ended badly; longer than the rest need to notice
ENDS = {0, 1, REQUEUE, -signal.SIGKILL, -signal.SIGTERM}
KINDS = ("rank", "all", "loader", "write", "set-up", "stop", "probe", "launcher")
LAUNCHER = """
import sys
from pathlib import Path
from mmtard.launch import local
sys.exit(local.run(sys.executable, ("train", sys.argv[1]), Path(sys.argv[2]), 2))
"""


def ended_well(of, kills):
    """Count kills, after which all bits were the same; a ledger keeps them for the parts of the soak that follow."""
    if LEDGER:
        with open(LEDGER, "a") as file:
            file.write(json.dumps({"of": of, "kills": kills}) + "\n")
        print(f"soak: {sum(noted().values())} of {KILLS} kills have ended with the same bits: {dict(noted())}")


def noted(of=None):
    """{kind: kills} of the ledger, of one training or command or of all."""
    found = Counter()
    for line in Path(LEDGER).read_text().splitlines() if LEDGER and Path(LEDGER).exists() else ():
        row = json.loads(line)
        for kind, n in row["kills"].items():
            found[kind if of else f"{row['of']} {kind}"] += n if of in (None, row["of"]) else 0
    return found


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


def kill(*pids):
    """Kill these processes; how many of them were there."""
    killed = 0
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            killed += 1
        except ProcessLookupError:
            pass
    return killed


def disturb(kind, ranks, rng, run, before):
    """Let a start come to a moment of its own, and do it harm; whether the moment came."""
    if kind == "set-up":
        time.sleep(rng.random())
    elif kind == "write":
        if not until(
            lambda: any((run / "checkpoints").glob(".writing-*")) if run.exists() else False, ranks, PATIENCE_S
        ):
            return False
    elif kind == "probe":
        return bool(until(lambda: run.exists() and background(run), ranks, PATIENCE_S) and kill(*background(run)))
    elif not until(lambda: steps_done(run) > before + rng.randrange(3), ranks, PATIENCE_S):
        return False
    if kind == "stop":
        for rank in ranks:
            rank.send_signal(rng.choice([signal.SIGTERM, signal.SIGUSR2]))
        return True
    if kind == "loader":
        loaders = children(rng.choice(ranks).pid)
        return bool(loaders and kill(rng.choice(loaders)))
    victims = [rng.choice(ranks)] if kind in ("rank", "write") else ranks
    return bool(kill(*(rank.pid for rank in victims)))


def end(ranks):
    """The exit statuses of ranks that come to an end, as a launcher would have it.

    Those that still wait, a while after one has ended badly, wait for a rank that they never met, and are ended.
    """
    until_, bad = time.monotonic() + PATIENCE_S, None
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < until_:
        if bad is None and any(rank.poll() for rank in ranks):
            bad = time.monotonic()
        if bad is not None and time.monotonic() > bad + OTHERS_TURN_S:
            break
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
    return [rank.wait(10) for rank in ranks]


def ranks_of(config):
    """Processes of a training that a launcher started."""
    return processes_where(lambda words: "train" in words and str(config) in words)


def own_tracebacks(printed):
    """Tracebacks through mmtard's files. Python's own threads may print one when their parent is killed."""
    found, lines = [], None
    for line in (re.sub(r"^\[rank\d\]: ", "", line) for line in printed.splitlines()):
        if line.startswith("Traceback"):
            lines = [line]
        elif lines is not None and line.startswith(" "):
            lines.append(line)
        elif lines is not None:
            if any("/mmtard/" in one for one in lines):
                found.append("\n".join([*lines, line]))
            lines = None
    return found


def start(kind, config, folder):
    """The ranks of a training, or the one process that starts them."""
    if kind == "launcher":
        code = Path(__file__).parents[2]
        return start_ranks(["-c", LAUNCHER, config, code], 1, folder / "meet", folder / "log")
    return start_ranks(["-m", "mmtard", "train", config], 2, folder / "meet", folder / "log")


def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bits(job, undisturbed, tmp_path):
    rng = random.Random(SEED)
    shards = str(job("unused")[0].with_name("shards"))
    # The last probe is not waited for: it is killed like the others, and no bit of the training depends on it.
    probe = {"data": shards, "every": 8, "n_samples": 12, "steps": 1, "threads": 1, "wait_minutes": 0}
    settings = {"resume": RESUME, "probe": probe}
    config, run = job("soaked", **settings)
    kills, runs, done = max(3, KILLS - OF_COMMANDS * len(COMMANDS)) - sum(noted("training").values()), 1, Counter()
    if kills <= 0:
        pytest.skip("all of its kills are in the ledger")
    counted = Counter()
    plan = [kind for _ in range(kills) for kind in rng.sample(KINDS, len(KINDS))][:kills]
    print(f"soak: seed {SEED}, {kills} kills of a training: {' '.join(plan)}", flush=True)
    while True:
        # A run that came to its end under the kills left is begun anew.
        if steps_done(run) == 24 and plan:
            config, run = job(f"soaked{runs}", **settings)
            runs += 1
        kind = plan[0] if plan else None
        ranks = start(kind, config, tmp_path)
        if kind is not None:
            plan.pop(0)
            if disturb(kind, ranks, rng, run, steps_done(run)):
                done[kind] += 1
                print(f"soak: {sum(done.values())}: {kind}, at step {steps_done(run)} of training {runs}", flush=True)
            else:
                plan.append(kind)  # the moment did not come in this start
        statuses = end(ranks)
        # The ranks of a launcher that was killed save their state and end by themselves.
        until(lambda: not ranks_of(config), [], PATIENCE_S)
        log = tmp_path / "log.0"
        printed = log.read_text() if log.exists() else ""  # the very first start may be killed before it opens it
        assert not set(statuses) & {2} and not own_tracebacks(printed), printed
        if set(statuses) == {0}:
            assert digest(run) == digest(undisturbed) and metrics(run) == metrics(undisturbed), f"seed {SEED}"
            print(f"soak: training {runs} ended with the same bits", flush=True)
            ended_well("training", done - counted)
            counted = done.copy()
            if not plan:
                print(f"soak: {sum(done.values())} kills of {runs} trainings: {dict(done)}; each with the same bits")
                return


@dataclass
class Command:
    """A command of one or two ranks: its words for a folder `out`, and what of that folder must be the same."""

    words: list
    world: int
    flag: str | None = None  # before `out`; None: it is the last argument as it is

    def start(self, out, folder):
        last = [f"{self.flag}{out}"] if self.flag and self.flag.endswith("=") else [*filter(None, [self.flag]), out]
        return start_ranks(["-m", "mmtard", *self.words, *last], self.world, folder / "meet", folder / "log")


@pytest.fixture(scope="module")
def command(job, undisturbed, tmp_path_factory):
    """`command(name)`: a `Command` of that name on the job's data."""
    shards = undisturbed.parents[1] / "shards"

    def evaluate():
        attack = ["--eps", "8/255", "--attacks", "pgd", "--iters", "3", "--batch-size", "4"]
        where = ["--device", "cpu", "--workers", "1"]
        return Command(["evaluate", undisturbed, "--data", shards, *attack, *where], 2, "--out")

    def cache():
        path, _ = job("soaked-cache")
        path.write_text(path.read_text().replace("flip: true", "flip: false"))
        return Command(["cache", path], 2, "data.embeddings=")

    def shards_():
        images, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
        for label in ("cat", "dog"):
            (images / label).mkdir()
            for i in range(120):
                pixels = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / label / f"{i}.png")
        return Command(["shards", images, "--samples-per-shard", "20", "--resize", "64", "--jobs", "2"], 1)

    made = {"evaluate": evaluate, "cache": cache, "shards": shards_}
    return lambda name: Command(["export", undisturbed], 1) if name == "export" else made[name]()


def seen(name, out):
    """What of a command's folder does not depend on when it was made."""
    if name == "evaluate":
        return results.read(out)["datasets"][0]["samples"]
    kept = {"cache": ("*.safetensors",), "shards": ("*.tar", "*.txt"), "export": ("*",)}[name]
    files = sorted(path for pattern in kept for path in out.rglob(pattern) if path.is_file())
    assert files
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.parametrize("which", range(len(COMMANDS) if KILLS >= 10 else 2))
def test_a_command_that_is_killed_again_and_again_ends_with_the_same_bytes(which, command, tmp_path):
    # Drawn here: what is collected must not depend on a seed, which differs between workers.
    name = random.Random(SEED).sample(COMMANDS, len(COMMANDS))[which]
    kills = max(1, OF_COMMANDS) - sum(noted(name).values())
    if kills <= 0:
        pytest.skip("all of its kills are in the ledger")
    rng, kind, done = random.Random(f"{SEED} {name}"), command(name), Counter()
    began = time.monotonic()
    assert end(kind.start(tmp_path / "plain", tmp_path)) == [0] * kind.world, (tmp_path / "log.0").read_text()
    took = time.monotonic() - began
    for first in range(0, kills, A_ROUND):
        out = tmp_path / f"killed{first}"
        met = killed_again_and_again(name, kind, out, min(A_ROUND, kills - first), took, rng)
        assert seen(name, out) == seen(name, tmp_path / "plain"), f"seed {SEED}"
        left_over = [path.name for path in tmp_path.iterdir() if path.name.startswith((f".{out.name}", f"{out.name}."))]
        assert not left_over, left_over
        ended_well(name, met)
        done += met
    print(f"soak: {sum(done.values())} kills of {name}: {dict(done)}; the same bytes")


def killed_again_and_again(name, kind, out, kills, took, rng):
    """Start a command that takes `took` seconds until it ends by itself, after so many kills; {victim: kills}."""
    done = Counter()
    for left in range(kills, -1, -1):
        ranks = kind.start(out, out.parent)
        if left:
            time.sleep(took * rng.random())
            victim = rng.choice(["all", "rank", "child", "stop"])
            done[victim] += 1
            if victim == "child":
                kill(*rng.sample(mine := children(rng.choice(ranks).pid), min(1, len(mine))))
            elif victim == "stop":
                rng.choice(ranks).send_signal(signal.SIGTERM)
            else:
                kill(*(rank.pid for rank in (ranks if victim == "all" else [rng.choice(ranks)])))
        statuses, printed = end(ranks), (out.parent / "log.0").read_text()
        assert left or statuses == [0] * kind.world, (statuses, printed)
        if name == "shards" and "a worker process was killed" in printed:
            allowed = {*ENDS, 2}  # the user's to mend, who asked for more processes than there is memory
        else:
            allowed = ENDS
        assert set(statuses) <= allowed and not own_tracebacks(printed), printed
    return done
