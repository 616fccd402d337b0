"""What `data.shards` may say: folders, patterns, openers, and lists of them."""

import pytest

from mmtard.data.paths import expand_shards
from mmtard.errors import UserError


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [str(folder / name) for name in names]


def test_shards_of_folders_patterns_and_openers(tmp_path):
    numbered = touch(tmp_path / "n", "2.tar", "10.tar", "1.tar")
    named = touch(tmp_path / "set" / "train", "b-0001.tar", "b-0000.tar", "x.txt")
    n, set_ = str(tmp_path / "n"), str(tmp_path / "set")
    assert expand_shards(n) == [numbered[2], numbered[0], numbered[1]]  # 1, 2, 10
    assert expand_shards(set_) == [named[1], named[0]]  # of train/, no other file
    assert expand_shards([n + "/{1,10}.tar", set_]) == [numbered[2], numbered[1], named[1], named[0]]
    assert expand_shards("s3://bucket/{08..10}.tar") == [
        "s3://bucket/08.tar",
        "s3://bucket/09.tar",
        "s3://bucket/10.tar",
    ]
    assert expand_shards("pipe:cat {a,b}.tar") == ["pipe:cat a.tar", "pipe:cat b.tar"]


@pytest.mark.parametrize(
    "shards, words",
    [
        ("empty", "no .tar in 'empty'; write shards with `mmtard shards"),
        ("n/{0..2}.tar", "missing shard 'n/2.tar'; correct the pattern or restore the file"),
        ("gone", "missing shard 'gone'; no such folder: correct the path, or write it with `mmtard shards`"),
        ("n/{0..1.tar", "is not a brace pattern|write it like train-{0000..0099}.tar"),
        ([], "names no shard"),
    ],
)
def test_shards_that_are_not_there(tmp_path, monkeypatch, shards, words):
    touch(tmp_path / "n", "0.tar", "1.tar")
    touch(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        expand_shards(shards)
    assert str(error.value).startswith("data.shards: ") and all(word in str(error.value) for word in words.split("|"))
