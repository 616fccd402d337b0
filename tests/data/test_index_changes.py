"""What changed since the index was made is noticed, and never read as if it had not."""

import hashlib
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import encode, picture, samples, write_tar

from mmtard.cli import main as cli
from mmtard.config import Data
from mmtard.data.dataset import open_dataset
from mmtard.data.index import load_index
from mmtard.data.indexing import build_index
from mmtard.data.reader import Reader
from mmtard.errors import UserError

IMAGE = encode(picture(0))


@pytest.mark.parametrize(
    "change", [("s0005.cls", b"6"), ("s0005.jpg", encode(picture(99))), ("s0099.jpg", encode(picture(5)))]
)
def test_fingerprint_sees_every_change(tmp_path, change):
    members = samples(0, 8)
    at = 10 + ("cls" in change[0])
    before = build_index([str(write_tar(tmp_path / "a" / "0.tar", members))], tmp_path / "a.npz", 1, False).fingerprint
    if change[0] == "s0099.jpg":
        members[10], members[11] = change, ("s0099.cls", members[11][1])
    else:
        members[at] = change
    assert (
        build_index([str(write_tar(tmp_path / "b" / "0.tar", members))], tmp_path / "b.npz", 1, False).fingerprint
        != before
    )


def test_a_shard_that_changed(folder, dataset):
    write_tar(folder / "1.tar", samples(0, 40))
    with pytest.raises(UserError, match=r"1.tar' has \d+ bytes.*run `mmtard index"):
        open_dataset(Data(shards=str(folder)))


def test_other_shards_than_indexed(folder, dataset):
    shutil.copy(folder / "1.tar", folder / "3.tar")
    with pytest.raises(UserError, match=r"shard 3 is '3.tar', indexed was none.*run `mmtard index"):
        open_dataset(Data(shards=str(folder)))


def test_a_changed_image_of_the_same_size_is_not_read(folder, dataset):
    path = folder / "1.tar"
    data = bytearray(path.read_bytes())
    data[dataset.index.image_offset[11] + 300] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="1.tar' changed since it was indexed"):
        Reader(dataset).image(11)
    assert len(Reader(dataset).image(12)) == dataset.index.image_size[12]


def rewrite(path, change):
    """Write a tar anew in its place with members changed by change(name, data); tars are padded, so its size stays."""
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
    before = path.stat().st_size
    write_tar(path, [(name, change(name, data)) for name, data in members])
    assert path.stat().st_size == before


@pytest.mark.parametrize(
    "kind, words",
    [
        ("cls", "the labels of 7 samples differ"),
        ("txt", "the captions of 7 samples differ"),
        ("renamed", "its samples differ"),
    ],
)
def test_shards_rewritten_at_their_size_are_noticed(folder, kind, words):
    path = folder / "1.tar"
    members = [
        (f"{n}.{e}", d) for n, d in enumerate([IMAGE] * 7) for e, d in (("jpg", d), ("cls", b"1"), ("txt", b"a cat"))
    ]
    write_tar(path, members)
    first = open_dataset(Data(shards=str(folder))).fingerprint
    if kind == "renamed":
        write_tar(path, [(name.replace("3", "9"), data) for name, data in members])
    else:
        rewrite(path, lambda name, data: (b"2" if kind == "cls" else b"a dog") if name.endswith(kind) else data)
    with pytest.raises(UserError, match=f"1.tar' changed since it was indexed: {words}.*run `mmtard index"):
        open_dataset(Data(shards=str(folder)))
    built = build_index([str(folder / f"{i}.tar") for i in range(3)], folder / "mmtard-index.npz", 1, False)
    assert built.fingerprint != first, "what trains otherwise has another fingerprint"
    assert open_dataset(Data(shards=str(folder))).fingerprint == built.fingerprint


def test_shards_written_again_with_the_same_content_are_looked_at_once(folder, dataset, monkeypatch):
    rewrite(folder / "1.tar", lambda name, data: data)
    os.utime(folder / "2.tar", ns=(1, 1))
    assert open_dataset(Data(shards=str(folder))).fingerprint == dataset.fingerprint
    monkeypatch.setattr(
        "mmtard.data.indexing.scan_shard", lambda *a, **k: pytest.fail("the index knows their new times")
    )
    open_dataset(Data(shards=str(folder)))


def test_a_full_check_finds_what_sizes_and_times_do_not_show(folder, dataset, capsys):
    path, index = folder / "1.tar", str(folder / "mmtard-index.npz")
    assert cli.main(["index", str(folder), "--check"]) == 0
    assert "32 samples in 3 shards, fingerprint" in (said := capsys.readouterr().out) and said.strip().endswith(
        "unchanged"
    )
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[dataset.index.image_offset[12] + 300] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(open_dataset(Data(shards=str(folder)))) == 32
    assert cli.main(["index", str(folder), "--check", "--out", index]) == 2
    assert "1.tar' changed since it was indexed: the images of 1 samples differ" in capsys.readouterr().err


def test_a_caption_changed_after_the_index_was_made_is_not_read(open_members):
    dataset = open_members([("a.jpg", IMAGE), ("a.txt", b"a cat")])
    path = Path(dataset.paths[0])
    rewrite(path, lambda name, data: b"a dog" if name == "a.txt" else data)
    with pytest.raises(UserError, match="0.tar' changed since it was indexed"):
        Reader(dataset).caption(0)


def test_an_index_of_an_earlier_format_is_made_anew(folder, dataset):
    path = folder / "mmtard-index.npz"
    with np.load(path) as arrays:
        old = {name: arrays[name] for name in arrays.files if name != "text_crc"}
    np.savez(path, **{**old, "format": np.int64(1)})
    with pytest.raises(UserError, match="has format 1, this version reads 2; run `mmtard index"):
        load_index(path)
    assert open_dataset(Data(shards=str(folder))).fingerprint == dataset.fingerprint
    assert len(load_index(path)) == 32


def test_captions_count_in_the_fingerprint_and_data_without_any_keep_theirs(folder, dataset):
    """The second number is of the version before captions counted: runs of labels go on with their fingerprint."""
    index = dataset.index
    digest = hashlib.sha256("\n".join(map(str, index.shard_names)).encode() + b"\0" + b"\n".join(index.keys.tolist()))
    for array in (index.shard_sizes, index.shard_counts, index.image_size, index.image_crc, index.labels):
        digest.update(array.astype("<i8").tobytes())
    assert dataset.fingerprint == digest.hexdigest()
