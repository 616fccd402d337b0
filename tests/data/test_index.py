import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tiny_shards import encode, picture, samples, write_tar

from mmtard.cli import main as cli
from mmtard.config import Data
from mmtard.data.class_names import classnames
from mmtard.data.dataset import open_dataset
from mmtard.data.index import load_index
from mmtard.data.indexing import build_index
from mmtard.data.paths import default_index, expand_shards
from mmtard.data.reader import Reader
from mmtard.errors import UserError

IMAGE = encode(picture(0))


def test_reading_equals_webdatasets_own(folder, dataset):
    reader, seen = Reader(dataset), 0
    for sample in webdataset.WebDataset([str(folder / f"{i}.tar") for i in range(3)], shardshuffle=False):
        assert (
            dataset.keys[seen] == sample["__key__"]
            and reader.image(seen) == sample["jpg"]
            and dataset.labels[seen] == int(sample["cls"])
        )
        seen += 1
    assert seen == len(dataset) == 32 and dataset.shard_counts.tolist() == [11, 7, 14]
    assert dataset.name(12) == "1.tar/s0012"


def test_layouts_of_public_sets(tmp_path):
    """timm's .jpg + .cls + .json members, upper-case extensions, folders and dots in names, captions, other members."""
    write_tar(tmp_path / "train" / "0.tar", [
        ("n01/a.x.jpg", b"no image: its extension is x.jpg"), ("n01/a.JPEG", IMAGE),
        ("n01/a.cls", b"7\n"), ("n01/a.json", b'{"label": 7}'), ("n01/a.txt", "ein Käfer\n".encode()),
        ("b.png", IMAGE), ("b.cls", b"12"), ("__meta__/x.jpg", IMAGE), ("._b.jpg", b"of another system"),
        ("only.json", b"{}"),
    ])  # fmt: skip
    (tmp_path / "classnames.txt").write_text("tench\nhammerhead shark\n")
    data = Data(shards=str(tmp_path))
    dataset = open_dataset(data)
    reader = Reader(dataset)
    assert dataset.keys == ["n01/a", "b"] and dataset.labels.tolist() == [7, 12] and dataset.file_name(1) == "b.png"
    assert [reader.caption(i) for i in range(2)] == ["ein Käfer", ""] and reader.image(1) == IMAGE
    assert "1 left out without an image" in dataset.index.summary()
    with pytest.raises(
        UserError,
        match="classnames.txt' has 2 names, and the shards have a sample of label 12; give the file of their classes",
    ):
        classnames(data, dataset)
    (tmp_path / "classnames.txt").write_text("tench\nhammerhead shark\n" + "another\n" * 11)
    assert classnames(data, dataset)[:2] == ["tench", "hammerhead shark"]


def test_labels_that_are_missing_or_not_integers(open_members):
    labels = [("b.cls", b"tench"), ("c.cls", b"-1"), ("d.cls", b" 5\n")]
    dataset = open_members(sorted([(f"{key}.jpg", IMAGE) for key in "abcd"] + labels, key=lambda member: member[0][0]))
    assert dataset.labels.tolist() == [-1, -1, -1, 5]
    assert [dataset.label_problem(i) for i in range(4)] == ["no .cls member", *[".cls is not a class number"] * 2, None]
    assert "1 without a label, 2 with a label that is not an integer" in dataset.index.summary()


def test_index_and_fingerprint_do_not_depend_on_jobs_or_folder(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "elsewhere")
    made = []
    for where, jobs in ((folder, 1), (tmp_path / "elsewhere", 3)):
        made.append(
            build_index([str(where / f"{i}.tar") for i in range(3)], tmp_path / f"{jobs}.npz", jobs, progress=False)
        )
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "3.npz").read_bytes()
    assert made[0].fingerprint == made[1].fingerprint == load_index(tmp_path / "1.npz").fingerprint


def test_where_the_index_lies(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = [str(folder / f"{i}.tar") for i in range(3)]
    assert default_index(shards) == folder / "mmtard-index.npz"
    part = default_index(shards[:2])
    assert part.parent == folder and part != folder / "mmtard-index.npz", "a part of a folder has an index of its own"
    folder.chmod(0o555)
    away = default_index(shards)
    folder.chmod(0o755)
    assert away.parent == tmp_path / "cache" / "mmtard" == default_index(["pipe:cat x.tar"]).parent
    open_dataset(Data(shards=shards[:2], index=str(tmp_path / "mine" / "i.npz")))
    assert (tmp_path / "mine" / "i.npz").is_file() and not any(folder.glob("*.npz"))


def test_an_index_beside_the_shards_serves_those_who_may_not_write_there(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = [str(p) for p in sorted(folder.glob("*.tar"))]
    beside = default_index(shards)
    build_index(shards, beside, 1, False)
    folder.chmod(0o555)
    try:
        assert default_index(shards) == beside
        beside.unlink()
        assert default_index(shards).parent == tmp_path / "cache" / "mmtard"
    finally:
        folder.chmod(0o755)


def test_linked_shards_belong_to_the_folder_of_the_links(folder, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    for shard in folder.glob("*.tar"):
        (links / shard.name).symlink_to(shard)
    (folder / "classnames.txt").unlink(missing_ok=True)
    (links / "classnames.txt").write_text("name\n" * 20)
    data = Data(shards=str(links))
    assert classnames(data, open_dataset(data)) == ["name"] * 20
    assert (links / "mmtard-index.npz").is_file() and not (folder / "mmtard-index.npz").exists()


def test_numbers_in_the_names_of_shards_count_as_numbers(tmp_path):
    for name in ("train-10.tar", "train-2.tar", "val.tar", "val.tar3.tar", "7.tar", "train-0010.tar"):
        (tmp_path / name).touch()
    assert [Path(s).name for s in expand_shards(str(tmp_path))] == [
        "7.tar",
        "train-2.tar",
        "train-0010.tar",
        "train-10.tar",
        "val.tar",
        "val.tar3.tar",
    ]


def test_a_file_that_is_no_index(folder, tmp_path):
    (tmp_path / "i.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match="is not an index"):
        open_dataset(Data(shards=str(folder), index=str(tmp_path / "i.npz")))
    np.savez(tmp_path / "i.npz", format=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="is not an index"):
        load_index(tmp_path / "i.npz")


def open_and_tell(shards, counted):
    from mmtard.data import dataset

    build = dataset.build_index
    dataset.build_index = lambda *a, **k: (counted.put(1), build(*a, progress=False, **k))[1]
    counted.put(open_dataset(Data(shards=shards)).fingerprint)


def test_several_processes_open_at_once_and_one_builds(folder):
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    processes = [context.Process(target=open_and_tell, args=(str(folder), told)) for _ in range(4)]
    [p.start() for p in processes]
    got = [told.get(timeout=30) for _ in range(5)]
    [p.join() for p in processes]
    assert got.count(1) == 1 and len(set(got) - {1}) == 1
    assert sorted(os.listdir(folder)) == ["0.tar", "1.tar", "2.tar", "mmtard-index.npz"]


def test_labels_and_captions_in_json_members_are_read_on_request(folder, tmp_path):
    texts = [b'{"label": 2, "text": "a cat"}', b'{"label": "1", "text": ["one", "two"]}', b'{"label": "dog"}', b"[1]"]
    members = [
        (f"{i}.{end}", data)
        for i in range(4)
        for end, data in (
            ("jpg", IMAGE),
            ("cls", b"9"),
            ("json", texts[i]),
        )
    ]
    write_tar(tmp_path / "j" / "0.tar", members)
    shards = str(tmp_path / "j")
    plain = open_dataset(Data(shards=shards))
    keyed = open_dataset(Data(shards=shards, label_key="label", caption_key="text"))
    assert plain.labels.tolist() == [9] * 4 and keyed.labels.tolist() == [2, 1, -1, -1]
    assert [keyed.label_problem(i) for i in (2, 3)] == ["'label' is not a class number", "no 'label' in a .json member"]
    assert [Reader(keyed).captions(i) for i in range(4)] == [["a cat"], ["one", "two"], [], []]
    assert plain.fingerprint != keyed.fingerprint
    assert open_dataset(Data(shards=shards)).labels.tolist() == [9] * 4, "each request has its own index"


def test_captions_are_lines_or_a_json_list(open_members):
    texts = [
        b"a cat\n a second \n\n",
        b'["a cat", "one cat"]',
        b"[not json]",
        "\ufeffun caf\u00e9\u2028au lait".encode(),
        b" \n",
    ]
    dataset = open_members([m for i, text in enumerate(texts) for m in ((f"{i}.jpg", IMAGE), (f"{i}.txt", text))])
    assert [Reader(dataset).captions(i) for i in range(5)] == [
        ["a cat", "a second"], ["a cat", "one cat"], ["[not json]"], ["un caf\u00e9\u2028au lait"], [],
    ]  # fmt: skip


@pytest.mark.parametrize("theirs", ["notes", "arrays", "pipe"])
def test_an_index_takes_the_place_of_no_other_file(tmp_path, theirs):
    shard, out = write_tar(tmp_path / "0.tar", samples(0, 3)), tmp_path / "features.npz"
    if theirs == "notes":
        out.write_text("my notes")
    elif theirs == "arrays":
        np.savez(out, features=np.zeros(3))
    else:
        os.mkfifo(out)
    before = out.read_bytes() if out.is_file() else None
    with pytest.raises(UserError, match="features.npz' is there and is no index; name another file"):
        build_index([str(shard)], out, 1, False)
    assert before is None or out.read_bytes() == before


def test_a_damaged_index_may_be_made_anew(tmp_path):
    shard, out = write_tar(tmp_path / "0.tar", samples(0, 3)), tmp_path / "index.npz"
    build_index([str(shard)], out, 1, False)
    out.write_bytes(out.read_bytes()[:200])
    assert len(build_index([str(shard)], out, 1, False)) == 3
    out.write_bytes(b"")
    assert len(build_index([str(shard)], out, 1, False)) == 3


def test_shards_without_an_index_are_not_checked_against_one_made_now(folder, tmp_path, capsys):
    shards = shutil.copytree(folder, tmp_path / "copy")
    assert cli.main(["index", str(shards)]) == cli.main(["index", str(shards), "--check"]) == 0
    (shards / "mmtard-index.npz").unlink()
    assert cli.main(["index", str(shards), "--check"]) == 2
    assert "--check: there is no index at" in capsys.readouterr().err and not (shards / "mmtard-index.npz").exists()
    assert cli.main(["index", str(shards), "--out", str(tmp_path / "own.npz")]) == 0
    assert cli.main(["index", str(shards), "--out", str(tmp_path / "own.npz"), "--check", "--label-key", "y"]) == 2
    assert "was made with other keys of .json members" in capsys.readouterr().err
