import multiprocessing
import os
import time

import pytest
import torch
from tiny_shards import samples, write_tar

from mmtard.config import Cache, Data
from mmtard.data.dataset import open_dataset
from mmtard.data.images import Transform
from mmtard.data.indexing import build_index
from mmtard.data.order import Order
from mmtard.data.reader import Reader
from mmtard.data.samples import SampleReader
from mmtard.data.stager import Stager
from mmtard.data.staging import Staging
from mmtard.data.stream import TrainStream
from mmtard.errors import UserError
from mmtard.files import exclusive

SHARDS = 6


@pytest.fixture
def source(tmp_path):
    for i in range(SHARDS):
        write_tar(tmp_path / "far" / f"{i}.tar", samples(8 * i, 8))
    return tmp_path / "far"


def remote(source, tmp_path, spec="pipe:cat {0} && echo {0} >> {1}"):
    """A remote data set whose opener notes each fetch in fetched.txt, and its staging of at most three shards."""
    shards = [spec.format(source / f"{i}.tar", tmp_path / "fetched.txt") for i in range(SHARDS)]
    if not (tmp_path / "i.npz").exists():
        build_index([str(source / f"{i}.tar") for i in range(SHARDS)], tmp_path / "i.npz", 1, False)
    dataset = open_dataset(Data(shards=shards, index=str(tmp_path / "i.npz"), allow_pipe=True))
    room = 3.5 * int(dataset.shard_sizes.max()) / 1e9
    return dataset, Staging(dataset, Cache(dir=str(tmp_path / "near"), max_gb=room))


def stream(dataset, staging, *, lanes=2, batch_size=4, stop=9, workers=0):
    samples = SampleReader(dataset, Transform(16), staging=staging)
    order, data = Order(dataset.shard_counts, 0, lanes, 6), Data(shards="x", workers=workers)
    return TrainStream(samples, order, data, batch_size=batch_size, steps=range(stop))


def fetched(tmp_path):
    return (tmp_path / "fetched.txt").read_text().split()


def test_fetched_once_bounded_least_recently_used_evicted_and_fetched_again(source, tmp_path):
    dataset, staging = remote(source, tmp_path)
    for shard in (0, 1, 2, 0, 3, 4):
        path = staging.ensure(shard)
        assert path.read_bytes() == (source / f"{shard}.tar").read_bytes()
        assert sum(p.stat().st_size for p in staging.folder.iterdir()) <= staging.limit
        time.sleep(0.01)
    assert len(fetched(tmp_path)) == 5
    staging.ensure(0)
    assert len(fetched(tmp_path)) == 5, "shard 0 was used after 1 and 2 and should have stayed"
    staging.ensure(1)
    assert len(fetched(tmp_path)) == 6
    assert all(p.suffix == ".tar" for p in staging.folder.iterdir()), "no locks or parts are left"


def test_an_open_shard_survives_its_eviction(source, tmp_path):
    dataset, staging = remote(source, tmp_path)
    reader = Reader(dataset, staging)
    first = reader.image(0)
    for shard in range(1, SHARDS):
        os.utime(staging.ensure(shard), ns=(2**62, 2**62))  # each newer than the shard in use
    assert not any("-0.tar" in p.name for p in staging.folder.iterdir())
    assert reader.image(0) == first
    assert len(deleted_but_open(staging.folder)) == 1
    reader.image(8 * (SHARDS - 1))
    assert not deleted_but_open(staging.folder), "its bytes count no more once another shard is opened"
    reader.close()
    assert reader.image(0) == first


def deleted_but_open(folder):
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
    return [link for link in links if link.startswith(str(folder)) and link.endswith("(deleted)")]


def test_a_staged_shard_of_another_user_is_told_in_one_line(source, tmp_path, monkeypatch):
    dataset, staging = remote(source, tmp_path)
    staging.ensure(0)
    monkeypatch.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    with pytest.raises(UserError, match=r"data.cache.dir: cannot stage shard .* \(Operation not permitted\)"):
        staging.ensure(0)


@pytest.mark.parametrize("spec", ["pipe:cat {0}", "file:{0}"])
@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_remote_shards_equals_local(source, tmp_path, spec, workers):
    dataset, staging = remote(source, tmp_path, spec)
    local = open_dataset(Data(shards=str(source)))
    one, other = (list(stream(d, s, stop=30, workers=workers)) for d, s in ((dataset, staging), (local, None)))
    assert len(one) == len(other) == 30 and all(
        torch.equal(a.images, b.images) and torch.equal(a.sample_ids, b.sample_ids) for a, b in zip(one, other)
    )
    assert dataset.fingerprint == local.fingerprint


def ensure_all(staging, barrier):
    barrier.wait()
    for shard in (0, 1, 2):
        staging.ensure(shard)


def test_processes_at_once_fetch_a_shard_once(source, tmp_path):
    dataset, staging = remote(source, tmp_path, "pipe:cat {0} && sleep 0.2 && echo {0} >> {1}")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=ensure_all, args=(staging, barrier)) for _ in range(3)]
    [p.start() for p in processes]
    [p.join(30) for p in processes]
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert sorted(fetched(tmp_path)) == [str(source / f"{i}.tar") for i in range(3)]


def test_processes_that_evict_each_other_all_get_their_shards(source, tmp_path):
    dataset, staging = remote(source, tmp_path, "file:{0}")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=churn, args=(staging, barrier, i)) for i in range(3)]
    [p.start() for p in processes]
    [p.join(60) for p in processes]
    assert [p.exitcode for p in processes] == [0, 0, 0]


def churn(staging, barrier, offset):
    def used():
        with exclusive(staging.folder / "room.lock"):  # else a listing mixes what was before and after an eviction
            return sum(p.stat().st_size for p in staging.folder.iterdir() if p.suffix in (".tar", ".part"))

    barrier.wait()
    for k in range(40):
        fd = staging.open((k * (offset + 1)) % SHARDS)
        assert os.pread(fd, 3, 0) == b"s00"
        os.close(fd)
        assert used() <= staging.limit


def test_leavings_of_a_killed_fetch_are_cleared_and_other_files_left_alone(source, tmp_path):
    dataset, staging = remote(source, tmp_path)
    (staging.folder / "users-own.tar").write_bytes(bytes(staging.limit))
    name = staging.ensure(5)
    context = multiprocessing.get_context("fork")
    slow, slow_staging = remote(source, tmp_path, "pipe:head -c 5000 {0}; sleep 30; true {1}")
    process = context.Process(target=slow_staging.ensure, args=(0,))
    process.start()
    deadline = time.monotonic() + 20
    while not any(p.suffix == ".part" for p in staging.folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert any(p.suffix == ".part" for p in staging.folder.iterdir())
    for shard in (1, 2, 3, 4):
        staging.ensure(shard)
    assert not any(p.suffix == ".part" for p in staging.folder.iterdir())
    assert (staging.folder / "users-own.tar").exists() and not name.exists()


@pytest.mark.parametrize(
    "spec, words",
    [
        ("pipe:cat /nowhere/{0}", "cannot be fetched .its opener ended with status 1"),
        ("file:/nowhere/{0}", "cannot be fetched"),
        ("s3://bucket{0}", "no opener for this scheme"),
        ("pipe:head -c 5000 {0}", "gave 5000 bytes, indexed were"),
        ("pipe:cat {0} /dev/zero", "gave more than"),
    ],
)
def test_openers_that_fail_name_the_shard(source, tmp_path, spec, words, monkeypatch, capfd):
    monkeypatch.setattr(Staging, "PAUSE_S", 0.01)
    dataset, staging = remote(source, tmp_path, spec)
    with pytest.raises(UserError, match=words) as caught:
        staging.ensure(2)
    assert "2.tar" in str(caught.value) and list(staging.folder.iterdir()) == []
    for workers in (0, 1):
        with pytest.raises(UserError, match=words):
            list(stream(dataset, staging, workers=workers))


def test_a_fetch_that_fails_now_and_then_is_tried_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Staging, "PAUSE_S", 0.01)
    dataset, staging = remote(source, tmp_path, "pipe:echo x >> {1}; [ $(wc -l < {1}) -ge 3 ] && cat {0}")
    assert staging.ensure(0).read_bytes() == (source / "0.tar").read_bytes()


def test_a_cache_too_small_is_refused(source, tmp_path):
    dataset, staging = remote(source, tmp_path)
    with pytest.raises(UserError, match="data.cache.max_gb: shard 'pipe:cat .*0.tar"):
        Staging(dataset, Cache(dir=str(tmp_path / "near"), max_gb=1e-5))
    with pytest.raises(UserError, match="data.cache.max_gb: .* cannot hold the 6 shards"):
        list(stream(dataset, staging, lanes=6, batch_size=6))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.cache.dir: cannot make"):
        Staging(dataset, Cache(dir=str(tmp_path / "file" / "x")))


def test_the_stager_fetches_ahead(source, tmp_path):
    dataset, _ = remote(source, tmp_path)
    staging = Staging(dataset, Cache(dir=str(tmp_path / "near"), ahead=3))
    order = Order(dataset.shard_counts, 0, 1, 8)
    stager = Stager(staging, order, 0, 1)
    stager.advance(0)
    now, later = order.shards_ahead(0, 0, 1, 3)
    wanted = [str(source / f"{i}.tar") for i in now + later]
    deadline = time.monotonic() + 20
    while (not (tmp_path / "fetched.txt").exists() or len(fetched(tmp_path)) < 4) and time.monotonic() < deadline:
        time.sleep(0.02)
    stager.close()
    assert fetched(tmp_path) == wanted and len(wanted) == 4


def test_variables_of_the_staging_folder_are_those_of_the_node(source, tmp_path, monkeypatch):
    dataset, _ = remote(source, tmp_path)
    cache = Cache(dir="$NODE_DISK/shards")
    with pytest.raises(UserError, match=r"data.cache.dir: '\$NODE_DISK/shards': the environment has no variable"):
        Staging(dataset, cache)
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    assert Staging(dataset, cache).folder == tmp_path / "disk" / "shards"


def test_a_remote_shard_rewritten_at_its_size_is_noticed_and_fetched_anew_once_indexed(source, tmp_path):
    dataset, staging = remote(source, tmp_path)
    old = staging.ensure(0)
    members = samples(0, 8)
    write_tar(source / "0.tar", [(name, b"6" if name.endswith(".cls") else data) for name, data in members])
    assert (source / "0.tar").stat().st_size == dataset.shard_sizes[0]
    old.unlink()
    with pytest.raises(UserError, match="0.tar.*' changed since it was indexed: the labels of 7 samples differ"):
        staging.ensure(0)
    assert list(staging.folder.iterdir()) == []
    (tmp_path / "i.npz").unlink()
    again, staging = remote(source, tmp_path)
    assert staging.ensure(0) != old and again.fingerprint != dataset.fingerprint


def test_a_full_staging_disk_is_told_as_such(source, tmp_path, monkeypatch):
    dataset, staging = remote(source, tmp_path)
    (staging.folder / "full").symlink_to("/dev/full")
    make_room = staging._make_room
    monkeypatch.setattr(
        staging, "_make_room", lambda part, size: (make_room(part, size), part.unlink(), part.symlink_to("/dev/full"))
    )
    with pytest.raises(
        UserError, match="data.cache.dir: cannot write shard .*No space left on device.*GB left: free space"
    ):
        staging.ensure(0)


def test_the_shared_staging_folder_must_be_the_users_own(source, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    own = tmp_path / "tmp" / f"mmtard-shards-{os.getuid()}"
    own.parent.mkdir()
    dataset, _ = remote(source, tmp_path)
    assert Staging(dataset, Cache()).folder == own and own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    Staging(dataset, Cache())
    assert own.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: own.stat().st_uid)
    own.rename(tmp_path / "of another")
    own.symlink_to(tmp_path / "of another")
    with pytest.raises(UserError, match="data.cache.dir: '.*mmtard-shards-.*' is a link, not a folder of yours"):
        Staging(dataset, Cache())
    own.unlink()
    (tmp_path / "tmp" / "mmtard-shards-4711").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(UserError, match="is of user .*, not a folder of yours; set data.cache.dir"):
        Staging(dataset, Cache())
