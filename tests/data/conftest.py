import itertools

import pytest
from tiny_shards import samples, write_tar

from mmtard.config import Data
from mmtard.data.dataset import open_dataset


@pytest.fixture
def folder(tmp_path):
    """Three shards of 11, 7 and 14 samples; sample i has label i mod 7."""
    first = 0
    for number, count in enumerate((11, 7, 14)):
        write_tar(tmp_path / "shards" / f"{number}.tar", samples(first, count))
        first += count
    return tmp_path / "shards"


@pytest.fixture
def dataset(folder):
    return open_dataset(Data(shards=str(folder)))


@pytest.fixture
def open_members(tmp_path):
    """Call with the members of one shard: the data set of it."""

    folders = itertools.count()

    def make(members):
        path = write_tar(tmp_path / f"one{next(folders)}" / "0.tar", members)
        return open_dataset(Data(shards=str(path)))

    return make
