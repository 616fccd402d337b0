import gzip
import io
import multiprocessing
import os
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tiny_shards import encode, picture, samples, write_tar

from mmtard.cli import main as cli
from mmtard.config import Data
from mmtard.data import index as index_file
from mmtard.data.class_names import classnames
from mmtard.data.dataset import open_dataset
from mmtard.data.index import load_index
from mmtard.data.indexing import build_index
from mmtard.data.paths import default_index, expand_shards
from mmtard.data.reader import Reader
from mmtard.data.shard_scan import scan_shard
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


def test_shards_without_an_index_are_not_checked_against_one_made_now(folder, tmp_path, capsys):
    shards = shutil.copytree(folder, tmp_path / "copy")
    assert cli.main(["index", str(shards)]) == cli.main(["index", str(shards), "--check"]) == 0
    (shards / "mmtard-index.npz").unlink()
    assert cli.main(["index", str(shards), "--check"]) == 2
    assert "--check: there is no index at" in capsys.readouterr().err and not (shards / "mmtard-index.npz").exists()
    assert cli.main(["index", str(shards), "--out", str(tmp_path / "own.npz")]) == 0
    assert cli.main(["index", str(shards), "--out", str(tmp_path / "own.npz"), "--check", "--label-key", "y"]) == 2
    assert "was made with other keys of .json members" in capsys.readouterr().err
