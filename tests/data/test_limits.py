"""What loader processes need is tested before they start, and told in one line."""

import os
import resource
from types import SimpleNamespace

import pytest

from mmtard.config import Data
from mmtard.data import limits
from mmtard.data.dataset import open_dataset
from mmtard.data.images import Transform
from mmtard.data.reader import Reader
from mmtard.data.samples import SampleReader
from mmtard.data.stream import eval_batches
from mmtard.errors import UserError


def test_a_small_limit_of_files_is_raised_where_allowed_and_told_where_not(dataset, monkeypatch):
    set_to = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: set_to.append(both))
    assert limits.raise_file_limit() == 4096 and set_to == [(4096, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    with pytest.raises(UserError, match=r"data.workers: this process may have 40 files open, and 2 .*ulimit -n"):
        next(eval_batches(SampleReader(dataset, Transform(16)), [0, 1], 2, workers=2))
    samples = SampleReader(dataset, Transform(16))
    assert len(next(eval_batches(samples, [0, 1], 2))) == 2, "without processes it goes on"
    assert samples.reader.max_open == 10


def test_few_files_are_enough_to_read_many_shards(folder, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 4))
    reader = Reader(open_dataset(Data(shards=str(folder))))
    before = len(os.listdir("/proc/self/fd"))
    for sample in (0, 12, 20, 1, 13):
        assert reader.image(sample)
        assert len(os.listdir("/proc/self/fd")) == before + 1


def test_shared_memory_that_does_not_hold_the_batches_is_told_at_the_start(dataset, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=16, f_frsize=4096))
    samples = SampleReader(dataset, Transform(64))
    with pytest.raises(
        UserError, match=r"/dev/shm has 0.0625 MiB free, and 2 loader processes need about 0.117 MiB.*--shm-size"
    ):
        next(eval_batches(samples, [0, 1], 2, workers=2))
    assert len(next(eval_batches(SampleReader(dataset, Transform(32)), [0, 1], 2, workers=2))) == 2
