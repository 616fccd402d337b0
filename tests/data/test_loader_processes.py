"""Loader processes that are killed, forked in vain, signalled, or left alone."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import alive
from streams import stream

from mmtard.cli import main as cli
from mmtard.errors import ProcessLostError


def test_a_killed_loader_process_is_told_in_one_line(dataset):
    others = set(multiprocessing.active_children())
    batches = iter(stream(dataset, workers=1, stop=1000))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    with pytest.raises(
        ProcessLostError, match=r"a loader process was lost: DataLoader worker .pid.* lower data.workers \(now 1\)"
    ):
        list(batches)


def test_a_loader_process_killed_while_the_model_computes_is_a_lost_process_there(dataset):
    """torch tells it by a signal: the error comes out of whatever the main thread is doing."""
    others = set(multiprocessing.active_children())
    batches = iter(stream(dataset, workers=2, stop=1000))
    next(batches)
    worker = (set(multiprocessing.active_children()) - others).pop()
    with pytest.raises(ProcessLostError, match=r"a loader process was lost: DataLoader worker .*now 2"):
        worker.kill()
        for _ in range(100):
            time.sleep(0.05)
    batches.close()


def test_a_command_that_lost_a_process_asks_to_be_started_again(folder, monkeypatch, capsys):
    """Evaluation and caching keep what is done; a training's watchdog decides by its history."""

    def lost(*_, **__):
        raise ProcessLostError("a loader process was lost: DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr("mmtard.data.indexing.build_index", lost)
    assert cli.main(["index", str(folder)]) == 75
    assert capsys.readouterr().err.startswith("mmtard: a loader process was lost: DataLoader worker")


LOADER = """
import os, signal, sys, time
from mmtard.config import Data
from mmtard.data.dataset import open_dataset
from mmtard.data.images import Transform
from mmtard.data.order import Order
from mmtard.data.samples import SampleReader
from mmtard.data.stream import TrainStream
import multiprocessing
data = Data(shards=sys.argv[1], workers=2)
dataset = open_dataset(data)
def run(stop):
    samples, order = SampleReader(dataset, Transform(16), seed=1), Order(dataset.shard_counts, 1, 4, 5)
    return TrainStream(samples, order, data, batch_size=8, steps=range(stop))
"""


@pytest.fixture
def launch(folder, dataset):
    """Runs a body after LOADER in a session of its own, so that a signal to its group spares the test."""
    started = []

    def start(body):
        command = [sys.executable, "-c", LOADER + body, str(folder)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_signals_to_the_group_reach_the_parent_and_spare_the_workers(launch):
    body = """
got = []
for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
    signal.signal(s, lambda number, frame: got.append(signal.Signals(number).name))
seen, workers = 0, None
for batch in run(200):
    now = sorted(p.pid for p in multiprocessing.active_children())
    assert workers in (None, now) and len(now) == 2, (workers, now)
    workers = now
    seen += len(batch)
    if seen in (8, 80, 160, 400):
        os.killpg(0, [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGUSR1][(8, 80, 160, 400).index(seen)])
        time.sleep(0.05)
print(seen, got, flush=True)
"""
    out = launch(body).communicate(timeout=60)[0]
    assert out.strip() == "1600 ['SIGTERM', 'SIGUSR2', 'SIGINT', 'SIGUSR1']"


@pytest.mark.slow
def test_signal_while_workers_start_is_kept_for_the_parent(launch):
    body = """
got = []
signal.signal(signal.SIGUSR2, lambda *_: got.append(len(multiprocessing.active_children())))
import mmtard.data.loader as module
start = module._start_worker
def slow(*given):
    os.kill(os.getppid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)  # here torch has made it fatal
    start(*given)
module._start_worker = slow
before = os.fork
def fork():
    os.kill(os.getpid(), signal.SIGUSR2)
    return before()
os.fork = fork
print(sum(len(b) for b in run(20)), bool(got), flush=True)
"""
    out = launch(body).communicate(timeout=60)[0]
    assert out.strip() == "160 True"


STUCK = """
import mmtard.data.loader as module
module.BEGUN_WITHIN_S = 1.0
forks, before = [], os.fork
def fork():
    forks.append(1)
    child = before()
    if not child and len(forks) {which}:
        time.sleep(1000)  # as one that waits for another thread's lock
    return child
os.fork = fork
try:
    seen = [i for b in run(20) for i in b.sample_ids.tolist()]
    print(len(seen), len(set(seen)), len(forks), flush=True)
except module.ProcessLostError as error:
    print(error, len(forks), flush=True)
"""


@pytest.mark.slow
def test_a_worker_that_is_forked_and_never_begins_is_forked_again(launch):
    out = launch(STUCK.format(which="== 2")).communicate(timeout=60)[0]
    assert out.split()[0] == "160" and out.split()[2] == "4", out
    plain = launch(STUCK.format(which="< 0")).communicate(timeout=60)[0]
    assert plain.split() == [*out.split()[:2], "2"]


@pytest.mark.slow
def test_workers_that_never_begin_are_a_lost_process(launch):
    out = launch(STUCK.format(which="% 2 == 0")).communicate(timeout=60)[0]
    assert out.strip() == "a loader process did not begin within 1 s, 3 times; lower data.workers (now 2) 6"


@pytest.mark.slow
def test_leaving_in_the_middle_ends_the_workers(launch):
    body = """
kept = run(1000)
batches = iter(kept)
next(batches)
print(len(multiprocessing.active_children()), flush=True)
raise SystemExit(3)
"""
    process = launch(body)
    assert process.communicate(timeout=60)[0].strip() == "2" and process.returncode == 3


@pytest.mark.slow
def test_workers_die_with_a_killed_parent(launch):
    body = """
batches = iter(run(10**6))
next(batches)
print(*[p.pid for p in multiprocessing.active_children()], flush=True)
time.sleep(1000)
"""
    process = launch(body)
    workers = [int(p) for p in process.stdout.readline().split()]
    assert len(workers) == 2 and all(alive(p) for p in workers)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(alive(p) for p in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(alive(p) for p in workers)
