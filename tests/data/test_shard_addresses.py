"""Where shards lie: patterns, openers, and commands that run only where they are allowed."""

import importlib
import shutil

import pytest
from braceexpand import braceexpand

from mmtard.cli import main as cli
from mmtard.config import Data
from mmtard.data import paths
from mmtard.data.class_names import classnames
from mmtard.data.dataset import open_dataset
from mmtard.data.indexing import build_index
from mmtard.data.paths import expand_shards
from mmtard.data.reader import Reader
from mmtard.data.shard_scan import scan_shard, shard_name
from mmtard.errors import UserError


@pytest.mark.parametrize("spec", ["pipe:cat {}", "file:{}", "file://{}"])
def test_remote_shards_are_indexed_through_their_opener(folder, tmp_path, spec):
    remote, local = ([form.format(folder / f"{i}.tar") for i in range(3)] for form in (spec, "{}"))
    with pytest.raises(UserError, match="mmtard index SHARDS --out FILE"):
        open_dataset(Data(shards=remote, index=str(tmp_path / "i.npz"), allow_pipe=True))
    assert (
        build_index(remote, tmp_path / "i.npz", 2, False).fingerprint
        == build_index(local, tmp_path / "l.npz", 1, False).fingerprint
    )
    assert len(open_dataset(Data(shards=remote, index=str(tmp_path / "i.npz"), allow_pipe=True))) == 32


@pytest.mark.parametrize(
    "spec, words",
    [
        ("pipe:cat {}/none.tar", "cannot be read: its opener ended with status 1"),
        ("s3://bucket/none.tar", "pipe:aws s3 cp"),
        ("pipe:head -c 3000 {}/0.tar", "is truncated or damaged|is truncated, damaged"),
        ("pipe:cat /dev/urandom", "not a plain tar"),
    ],
)
def test_openers_that_fail(folder, tmp_path, spec, words, capfd):
    with pytest.raises(UserError, match=words):
        build_index([spec.format(folder)], tmp_path / "i.npz", 1, False)


@pytest.mark.parametrize(
    "shard, name",
    [
        ("/a/b/0001.tar", "0001.tar"),
        ("pipe:aws s3 cp s3://b/x-0001.tar -", "x-0001.tar"),
        ("https://h/p/0.tar?token=1.2", "0.tar"),
        ("pipe:curl -s 'https://h/a.tar/0.tar'", "0.tar"),
        ("file:rel.tar", "rel.tar"),
    ],
)
def test_shard_names(shard, name):
    assert shard_name(shard) == name


def test_a_file_found_in_a_folder_is_a_file_whatever_its_name(folder, tmp_path, monkeypatch):
    """`pipe:COMMAND.tar` among downloaded shards would run the command of a stranger."""
    planted = folder / "pipe:touch PLANTED; cat 0.tar"
    shutil.copy(folder / "0.tar", planted)
    monkeypatch.chdir(folder)
    for shards in (".", "*.tar", "./", str(folder)):
        build_index(expand_shards(shards), tmp_path / "i.npz", 1, False)
        dataset = open_dataset(Data(shards=shards, index=str(tmp_path / "i.npz"), allow_pipe=True))
        assert dataset.name(len(dataset) - 1).startswith("pipe:touch") and not dataset.remote
        assert Reader(dataset).image(len(dataset) - 1)
    assert not (folder / "PLANTED").exists()


@pytest.mark.parametrize(
    "shards", ["pipe:touch RAN; cat 0.tar", ["0.tar", "pipe:touch RAN; cat 0.tar"], "{pip,pip}e:touch RAN"]
)
def test_a_command_runs_only_where_it_is_allowed(folder, dataset, monkeypatch, shards):
    monkeypatch.chdir(folder)
    index = str(folder / "mmtard-index.npz")
    with pytest.raises(UserError, match="runs a command on this machine.*data.allow_pipe=true.*--allow-pipe"):
        open_dataset(Data(shards=shards, index=index))
    with pytest.raises(UserError, match="runs a command"):
        classnames(Data(shards=shards), dataset)
    assert not (folder / "RAN").exists()
    assert cli.main(["index", *([shards] if isinstance(shards, str) else shards), "--out", "i.npz"]) == 2
    assert not (folder / "RAN").exists() and not (folder / "i.npz").exists()


def test_patterns_of_other_programs_are_taken(folder, tmp_path):
    """`*.tar` in quotes, and open_clip's `::` between several."""
    shards = [str(folder / f"{i}.tar") for i in range(3)]
    assert expand_shards(f"{folder}/*.tar") == expand_shards("::".join(shards)) == shards
    assert expand_shards(f"{folder}/[01].tar::{folder}/{{2..2}}.tar") == shards
    with pytest.raises(UserError, match="data.shards: no file matches '.*/z.*tar'"):
        expand_shards(f"{folder}/z*.tar")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "0.tar.gz").touch()
    with pytest.raises(UserError, match="no .tar in .*packed' but '0.tar.gz'; unpack it"):
        expand_shards(str(tmp_path / "packed"))


@pytest.mark.parametrize(
    "shard", ["https://h/';touch RAN;'0.tar", "gs://b/`touch RAN`0.tar", 's3://b/"0.tar', "hf://a/x y.tar"]
)
def test_an_address_that_a_shell_could_take_for_a_command_is_refused(shard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module("webdataset.gopen"), "gopen", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(UserError, match="cannot be read: its address holds .*, which no address has; write it as %"):
        scan_shard(shard)


@pytest.mark.parametrize(
    "pattern",
    [
        "x-{00000000..99999999}.tar",
        "{0..9999}{0..9999}.tar",
        "{5..-9999999999999999999999}",
        "{0..999999999}{0..999999999}",
        "{0..999999}" * 30,
        "{{0..999},{0..999}}" * 3,
        "{" + "{a,b}" * 40 + ",x}",
        "{" + "{a,b}" * 40 + "}",
        "{%s..999999}" % ("0" * 4000),
    ],
)
def test_braces_that_name_more_shards_than_there_can_be_are_refused_at_once(pattern):
    with pytest.raises(UserError, match="names more than 1,000,000 shards; correct its braces"):
        expand_shards(pattern)


def test_braces_are_counted_before_they_are_laid_out():
    nested = r"a{0..10..5}{b,c{d,e}}\{x,y\}{{1,2}}{z}.tar"
    assert paths._count(nested) >= len(list(braceexpand(nested)))
    for pattern in ("x", "{00..11}", "{9..-1..2}{a,b}", "{a,{b,c}{d,e}}", "{{1..3}}"):
        assert paths._count(pattern) == len(list(braceexpand(pattern)))
