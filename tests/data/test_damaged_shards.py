"""Shards and indexes that are damaged, hostile, or hold what is not read: each is told in one line, or counted."""

import gzip
import io
import os
import tarfile
from functools import partial

import numpy as np
import pytest
from tiny_shards import encode, picture, samples, write_tar

from mmtard.cli import main as cli
from mmtard.config import Data
from mmtard.data import index as index_file
from mmtard.data.dataset import open_dataset
from mmtard.data.index import load_index
from mmtard.data.indexing import build_index
from mmtard.data.shard_scan import scan_shard
from mmtard.errors import UserError

IMAGE = encode(picture(0))


def refused(path, words, **settings):
    with pytest.raises(UserError, match=words) as caught:
        open_dataset(Data(shards=str(path), **settings))
    assert path.name in str(caught.value)


def test_empty_tar(tmp_path):
    refused(write_tar(tmp_path / "0.tar", []), "no sample with an image")
    refused(write_tar(tmp_path / "1.tar", [("a.cls", b"1")]), "no sample with an image")
    (tmp_path / "2.tar").write_bytes(b"")
    refused(tmp_path / "2.tar", "truncated, damaged, or not a plain tar")


def member_ends(path):
    """Offsets at which a member ends and the next begins."""
    with tarfile.open(path) as tar:
        return [m.offset for m in tar.getmembers()[1:]]


def test_truncated_tar(tmp_path):
    whole = write_tar(tmp_path / "whole" / "0.tar", samples(0, 4))
    boundary = member_ends(whole)[3]
    for cut in (100, 700, boundary - 600, boundary, boundary + 100, boundary + 512, boundary + 600):
        path = tmp_path / f"cut{cut}.tar"
        path.write_bytes(whole.read_bytes()[:cut])
        refused(path, "truncated")


def test_damaged_header_in_the_middle(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples(0, 4))
    data = bytearray(path.read_bytes())
    data[member_ends(path)[3]] ^= 1
    path.write_bytes(data)
    refused(path, "truncated or damaged")


def test_not_a_plain_tar(tmp_path):
    (tmp_path / "0.tar").write_bytes(os.urandom(5000))
    refused(tmp_path / "0.tar", "not a plain tar")
    (tmp_path / "1.tar").write_bytes(gzip.compress(write_tar(tmp_path / "x" / "1.tar", samples(0, 2)).read_bytes()))
    refused(tmp_path / "1.tar", f"is compressed; unpack it: gzip -dc {tmp_path / '1.tar'} > ")


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 0, 1), (0, 1, 0), (0, 2, 1)])
def test_a_key_that_occurs_twice(tmp_path, order):
    members = [("a.jpg", IMAGE), ("a.cls", b"1"), ("b.jpg", IMAGE), ("b.cls", b"1")]
    refused(write_tar(tmp_path / "0.tar", [members[i] for i in order]), "key 'a' occurs twice")


def test_refusals_come_out_of_worker_processes(tmp_path, folder):
    (folder / "1.tar").write_bytes(b"nothing")
    with pytest.raises(UserError, match="1.tar"):
        build_index([str(folder / f"{i}.tar") for i in range(3)], tmp_path / "i.npz", jobs=2, progress=False)
    assert not (tmp_path / "i.npz").exists()


def special(name, kind, link):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def test_what_a_shard_holds_and_is_not_read_is_counted_and_named(tmp_path):
    path = tmp_path / "d" / "0.tar"
    path.parent.mkdir()
    write_tar(path, [
        ("a.jpg", IMAGE), ("a.png", IMAGE), ("a.cls", b"dog"), ("b.jpg", IMAGE), ("c.gif", IMAGE), ("c.cls", b"1"),
        ("d.image.jpg", IMAGE), ("d.label.cls", b"1"), ("README", b""), ("._a.jpg", b""),
    ])  # fmt: skip
    with tarfile.open(path, "a") as tar:
        tar.addfile(special("e.jpg", tarfile.LNKTYPE, "a.jpg"))
        tar.addfile(special("f.jpg", tarfile.SYMTYPE, "/etc/passwd"))
        tar.addfile(special("folder", tarfile.DIRTYPE, ""))
    dataset = open_dataset(Data(shards=str(path.parent)))
    assert dataset.keys == ["a", "b"]
    summary = dataset.index.summary()
    for words in (
        "2 left out without an image",
        "1 without a label",
        "1 with a label that is not an integer (such as 'dog' in 'a.cls')",
        "1 second images of a sample (such as 'a.png')",
        "1 .gif images, of a kind that is not read (jpg, jpeg, png, webp are)",
        "1 images with more than one dot in their name, whose first dot ends the key (such as 'd.image.jpg')",
        "1 labels with more than one dot in their name",
        "2 links and special files, which hold no data of their own (such as 'e.jpg')",
        "2 files whose name has no extension or begins with a dot (such as 'README')",
    ):
        assert words in summary, words
    assert dataset.index.notes(labels=False)[0] == "2 left out without an image" and len(dataset.index.notes()) == 9
    with pytest.raises(
        UserError, match=r"no sample with an image .*6 images with more than one dot .*'IMG_2020.01.0.jpg'"
    ):
        write_tar(tmp_path / "dotted" / "0.tar", [(f"IMG_2020.01.{i}.jpg", IMAGE) for i in range(6)])
        open_dataset(Data(shards=str(tmp_path / "dotted")))


def test_damaged_indexes_and_shards_are_told_in_one_line_whatever_is_damaged(folder, dataset, tmp_path):
    """A bounded fuzz: any error but the declared one is a finding."""
    rng = np.random.default_rng(0)
    index, shard = (folder / "mmtard-index.npz").read_bytes(), (folder / "0.tar").read_bytes()[:6000] + bytes(1024)
    pax = io.BytesIO()
    with tarfile.open(fileobj=pax, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"{'x' * 120}{number}\u00fc.jpg")
            member.size, member.pax_headers = len(IMAGE), {"GNU.sparse.size": "5", "comment": "c"}
            tar.addfile(member, io.BytesIO(IMAGE))
    refused, path = 0, tmp_path / "x.tar"
    for number in range(240):
        whole = bytearray([index, shard, pax.getvalue()][number % 3])
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(len(whole) if rng.random() < 0.5 else 700))
            whole[at : at + int(rng.integers(0, 5))] = rng.bytes(int(rng.integers(1, 5)))
        path.write_bytes(whole[: None if rng.random() < 0.8 else int(rng.integers(len(whole)))])
        for read in (load_index,) if number % 3 == 0 else (scan_shard, partial(scan_shard, images=False)):
            try:
                read(path if read is load_index else str(path))
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and "x.tar" in str(error)
    assert refused > 100


def test_captions_that_are_not_utf_8_are_counted(tmp_path):
    members = [(f"{i}.{end}", content) for i in range(3) for end, content in (
        ("jpg", IMAGE), ("txt", "un caf\u00e9".encode("latin-1" if i else "utf-8")))]  # fmt: skip
    dataset = open_dataset(Data(shards=str(write_tar(tmp_path / "0.tar", members))))
    assert "not read: 2 captions with characters that are not UTF-8 (such as '1.txt')" in dataset.index.summary()


def test_an_index_that_unpacks_to_gigabytes_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "MOST_BYTES", 2**20)
    np.savez_compressed(tmp_path / "bomb.npz", format=np.int64(2), keys=np.zeros(2**22, np.uint8))
    with pytest.raises(UserError, match="is not an index .its arrays take 0.00419 GB, of .* MB on disk"):
        load_index(tmp_path / "bomb.npz")


def test_an_index_that_is_a_pipe_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "mmtard-index.npz")
    with pytest.raises(UserError, match="is not an index but a folder, pipe or device; remove it"):
        load_index(tmp_path / "mmtard-index.npz")


def test_members_too_large_to_be_what_they_say_are_counted_and_not_read(tmp_path):
    long = [("big.jpg", IMAGE), ("big.cls", b" " * 2000 + b"1"), ("big.txt", b"word " * 300_000)]
    tar = write_tar(tmp_path / "0.tar", [("0.jpg", IMAGE), ("0.cls", b"1"), *long])
    index = scan_shard(str(tar))
    assert index.labels.tolist() == [1, -1] and index.text_size.tolist() == [-1, -1]
    told = index.summary()
    assert "not read: 1 .cls members of more than 1.0 KiB, which are not looked into (such as 'big.cls')" in told
    assert "1 .txt members of more than 1.0 MiB, which are not looked into (such as 'big.txt')" in told


def test_names_in_a_shard_move_no_terminals_cursor(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("a\x1b[2J.jpg", IMAGE), ("b.jpg", IMAGE), ("a\x1b[2J.cls", b"1")])
    assert cli.main(["index", str(tmp_path / "0.tar")]) == 2
    printed = capsys.readouterr().err
    assert "key 'a?[2J' occurs twice" in printed and "\x1b" not in printed


def test_a_header_that_speaks_of_terabytes_ends_at_the_end_of_the_file(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in (("a.jpg", {}), ("b.jpg", {"size": "99999999999999"})):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(IMAGE), headers
            tar.addfile(member, io.BytesIO(IMAGE))
    with pytest.raises(UserError, match="is truncated or damaged"):
        scan_shard(str(tmp_path / "0.tar"))
    with pytest.raises(UserError, match="is truncated or damaged"):
        scan_shard(f"file:{tmp_path / '0.tar'}")
