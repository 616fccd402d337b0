"""The ranks of a launch open a data set: the first looks at the shards, the others take its word."""

import os
from pathlib import Path

import pytest
from tiny_shards import samples, write_tar

from mmtard.config import Data
from mmtard.data.dataset import open_dataset, open_dataset_on_all_ranks
from mmtard.data.paths import expand_shards
from mmtard.errors import UserError


class Rank:
    """The first of two ranks, or the other one after it."""

    def __init__(self, is_first, shared):
        self.is_first, self.shared = is_first, shared

    def run_on_first(self, make, patience=None):
        if self.is_first:
            self.shared["made"] = make()
        return self.shared["made"]


@pytest.fixture
def looked(monkeypatch):
    """The shards whose size and time were asked for, one after another."""
    names, stat = [], os.stat

    def noted(path, *args, **kwargs):
        if Path(str(path)).suffix == ".tar" and Path(str(path)).stem.isdigit():  # no pattern
            names.append(Path(path).name)
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", noted)
    return names


def test_the_first_rank_alone_looks_at_the_shards(folder, looked):
    settings, shared = Data(shards=str(folder)), {}
    first = open_dataset_on_all_ranks(settings, Rank(True, shared))
    assert {"0.tar", "1.tar", "2.tar"} <= set(looked)
    looked.clear()
    other = open_dataset_on_all_ranks(settings, Rank(False, shared))
    assert looked == []
    assert (other.paths, other.fingerprint) == (first.paths, first.fingerprint)
    assert other.labels.tolist() == first.labels.tolist()


def test_a_node_with_an_index_of_its_own_makes_and_reads_it(folder, tmp_path, monkeypatch):
    """Where the shards' folder cannot be written, the index is in the user's cache, which a node may not share."""
    folder.chmod(0o555)
    shared, settings = {}, Data(shards=str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node1"))
    first = open_dataset_on_all_ranks(settings, Rank(True, shared))
    shards, path, fingerprint = shared["made"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node2"))
    gone = (shards, Path(str(path).replace("node1", "nowhere")), fingerprint)
    other = open_dataset_on_all_ranks(settings, Rank(False, {"made": gone}))
    folder.chmod(0o755)
    assert other.fingerprint == first.fingerprint and len(list((tmp_path / "node2").rglob("index-*.npz"))) == 1


def test_shards_that_a_node_has_otherwise_are_refused_there(folder, tmp_path):
    write_tar(tmp_path / "others" / "0.tar", samples(50, 3))
    shared = {}
    open_dataset_on_all_ranks(Data(shards=str(folder)), Rank(True, shared))
    shards, path, fingerprint = shared["made"]
    wrong = {"made": (shards, path, "0" * 64)}
    path.unlink()
    (folder / "0.tar").write_bytes((tmp_path / "others" / "0.tar").read_bytes())
    other = open_dataset_on_all_ranks(Data(shards=str(folder)), Rank(False, wrong))
    assert other.fingerprint == open_dataset(Data(shards=str(folder))).fingerprint != fingerprint


@pytest.mark.parametrize("spec", ["{folder}", "{folder}/{{00..19}}.tar", "{folder}/*.tar"])
def test_a_folder_of_many_shards_is_listed_and_each_is_not_asked_for(tmp_path, looked, spec):
    for number in range(20):
        (tmp_path / f"{number:02d}.tar").touch()
    assert len(expand_shards(spec.format(folder=tmp_path))) == 20
    assert looked == []


def test_of_many_shards_the_one_that_is_no_file_is_named(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02d}.tar").touch()
    (tmp_path / "07.tar").unlink()
    for there in (lambda path: None, Path.mkdir):  # absent, then a folder
        there(tmp_path / "07.tar")
        with pytest.raises(UserError, match=r"missing shard '.*/07.tar'; correct the pattern or restore the file"):
            expand_shards(f"{tmp_path}/{{00..19}}.tar")
    (tmp_path / "07.tar").rmdir()
    (tmp_path / "07.tar").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"missing shard '.*/07.tar'"):
        expand_shards(str(tmp_path))
