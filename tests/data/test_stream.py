from pathlib import Path

import numpy as np
import pytest
import torch
from streams import CROP, stream
from tiny_shards import encode, picture, samples

from mmtard.config import Data
from mmtard.data.class_names import classnames
from mmtard.data.dataset import open_dataset
from mmtard.data.images import Transform
from mmtard.data.indexing import build_index
from mmtard.data.samples import SampleReader
from mmtard.data.stream import eval_batches
from mmtard.errors import UserError

IMAGE = encode(picture(0))


def whole(dataset, world=1, workers=0, start=0, stop=9):
    """All ranks' (ids, images, seeds) of each step, their lanes put back in turn."""
    ranks = [list(stream(dataset, rank=r, world=world, workers=workers, start=start, stop=stop)) for r in range(world)]
    for batches in zip(*ranks):
        fields = [[getattr(b, name) for b in batches] for name in ("sample_ids", "seeds", "labels", "images")]
        yield [torch.stack([f.unflatten(0, (-1, 2)) for f in parts], 1).flatten(0, 2) for parts in fields]


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(torch.equal(x, y) for s, t in zip(a, b) for x, y in zip(s, t))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world, workers", [(1, 1), (1, 3), (2, 0), (2, 1), (4, 0), (4, 1)])
def test_batches_do_not_depend_on_ranks_or_workers(dataset, world, workers):
    reference = list(whole(dataset))
    assert same(reference, whole(dataset, world, workers))
    ids = torch.cat([ids for ids, *_ in reference])
    assert len(set(ids[:32].tolist())) == 32 and all(torch.equal(labels, ids % 7) for ids, _, labels, _ in reference)


@pytest.mark.parametrize("start, world, workers", [(3, 1, 0), (5, 2, 1)])
def test_going_on_from_the_middle(dataset, start, world, workers):
    assert same(list(whole(dataset))[start:], whole(dataset, world, workers, start))


def test_images_are_those_of_their_ids(dataset):
    for batch in stream(dataset, transform=Transform(30)):
        assert batch.images.dtype == torch.uint8 and batch.seeds.dtype == torch.int64 and batch.replaced == []
        for image, i in zip(batch.images, batch.sample_ids.tolist()):
            assert np.abs(image.numpy().astype(int) - Transform(30)(picture(i), 0)).mean() < 6, (
                "not the image of this id"
            )


def test_an_epoch_sees_other_crops(dataset):
    batches = list(stream(dataset, batch_size=32, stop=2))
    first, second = ({i: b.images[k] for k, i in enumerate(b.sample_ids.tolist())} for b in batches)
    assert first.keys() == second.keys() and all(not torch.equal(first[i], second[i]) for i in first)


def test_eval_batches_give_the_samples_asked_for(dataset):
    ids = [3, 31, 4, 15, 9]
    for workers in (0, 2):
        batches = list(eval_batches(SampleReader(dataset, Transform(16)), ids, 2, workers=workers))
        assert [len(b) for b in batches] == [2, 2, 1]
        assert torch.cat([b.sample_ids for b in batches]).tolist() == ids and torch.cat(
            [b.labels for b in batches]
        ).tolist() == [i % 7 for i in ids]


def damaged(open_members, bad: dict[int, bytes], count=20):
    members = samples(0, count)
    for i, data in bad.items():
        members[2 * i] = (members[2 * i][0], data)
    return open_members(members)


def test_a_truncated_jpeg_is_replaced_by_its_neighbour(open_members):
    dataset = damaged(open_members, {7: IMAGE[:-30], 8: b"nothing", 19: IMAGE[:-30]})
    for workers in (0, 2):
        (batch,) = eval_batches(SampleReader(dataset, CROP, seed=5), [6, 7, 19, 8], 4, workers=workers)
        assert batch.sample_ids.tolist() == [6, 9, 0, 9] and batch.labels.tolist() == [6, 2, 0, 2]
        assert [(a, b) for a, b, _ in batch.replaced] == [
            ("0.tar/s0007", "0.tar/s0009"),
            ("0.tar/s0019", "0.tar/s0000"),
            ("0.tar/s0008", "0.tar/s0009"),
        ]
        assert "truncated" in batch.replaced[0][2] and "not an image of a known format" in batch.replaced[2][2]
    (asked,) = eval_batches(SampleReader(damaged(open_members, {}), CROP, seed=5), [6, 7, 19, 8], 4)
    assert torch.equal(batch.seeds, asked.seeds), "a replacement keeps the seed of the sample asked for"


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_left_out_where_nothing_may_stand_for_it(open_members, workers):
    dataset = damaged(open_members, {7: IMAGE[:-30], 8: b"nothing", 19: IMAGE[:-30]})
    reader = SampleReader(dataset, CROP, seed=5, replace=False)
    first, second = eval_batches(reader, [6, 7, 9, 19, 8], 3, workers=workers)
    assert first.sample_ids.tolist() == [6, 9] and first.labels.tolist() == [6, 2] and first.replaced == []
    assert [name for name, _ in first.left_out] == ["0.tar/s0007"] and "truncated" in first.left_out[0][1]
    (whole,) = eval_batches(SampleReader(damaged(open_members, {}), CROP, seed=5), [6, 9], 2)
    assert (
        torch.equal(first.images, whole.images)
        and torch.equal(first.seeds, whole.seeds)
        and first.captions == whole.captions
    )
    assert (
        len(second) == 0
        and second.images.shape == (0, 3, 16, 16)
        and [name for name, _ in second.left_out] == ["0.tar/s0019", "0.tar/s0008"]
    )


def test_missing_labels_are_replaced_only_where_labels_are_needed(open_members):
    dataset = open_members([("a.jpg", IMAGE), ("b.jpg", IMAGE), ("b.cls", b"x"), ("c.jpg", IMAGE), ("c.cls", b"3")])
    (needed,) = eval_batches(SampleReader(dataset, CROP), [0, 1, 2], 3)
    assert needed.sample_ids.tolist() == [2, 2, 2] and [r for *_, r in needed.replaced] == [
        "no .cls member",
        ".cls is not a class number",
    ]
    (free,) = eval_batches(SampleReader(dataset, CROP, need_labels=False), [0, 1, 2], 3)
    assert free.labels.tolist() == [-1, -1, 3] and free.replaced == []


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_replaced_samples_stop_the_run(open_members, workers):
    dataset = damaged(open_members, {7: b"nothing"})
    assert len(list(stream(dataset, batch_size=4, stop=50, workers=workers))) == 50, "10 of the first 1000 are allowed"
    with pytest.raises(
        UserError, match=r"data.max_replaced: 11 of the first \d+ samples.*0.tar/s0007: cannot be decoded.*repair"
    ) as caught:
        list(stream(dataset, batch_size=4, stop=100, workers=workers))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="data.max_replaced: 1 of the first"):
        list(stream(dataset, batch_size=4, stop=9, workers=workers, max_replaced=0))


def test_a_shard_without_any_usable_sample(open_members):
    dataset = damaged(open_members, {0: b"nothing", 1: b"nothing"}, count=2)
    with pytest.raises(UserError, match="0.tar/s0001.*nor has its shard any other usable sample"):
        list(eval_batches(SampleReader(dataset, CROP), [1], 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_changed_or_gone_stops_the_run_with_one_line(folder, dataset, workers):
    data = bytearray((folder / "1.tar").read_bytes())
    data[dataset.index.image_offset[11] + 300] ^= 1
    (folder / "1.tar").write_bytes(data)
    with pytest.raises(UserError, match="1.tar' changed since it was indexed") as caught:
        list(stream(dataset, workers=workers))
    assert "\n" not in str(caught.value)
    (folder / "1.tar").unlink()
    with pytest.raises(UserError, match="1.tar' cannot be read: No such file"):
        list(stream(dataset, workers=workers))


def test_captions(open_members):
    dataset = open_members(
        [("a.jpg", IMAGE), ("a.cls", b"0"), ("a.txt", b"a red square"), ("b.jpg", IMAGE), ("b.cls", b"1")]
    )
    (batch,) = eval_batches(SampleReader(dataset, CROP), [1, 0], 2)
    assert batch.captions == ["", "a red square"]


def test_micro_batches_are_the_batch_in_parts_and_name_what_was_replaced_once(open_members):
    (batch,) = eval_batches(SampleReader(damaged(open_members, {7: b"nothing"}), CROP), [6, 7, 9, 19, 8], 5)
    batch.teacher_embeddings = {"t": torch.arange(10.0).reshape(5, 2)}
    parts = list(batch.split(2))
    assert [len(part) for part in parts] == [2, 2, 1] and len(batch.replaced) == 1
    assert not any(part.replaced or part.left_out for part in parts)
    for name in ("images", "labels", "sample_ids", "seeds"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert torch.equal(torch.cat([part.teacher_embeddings["t"] for part in parts]), batch.teacher_embeddings["t"])
    moved = parts[0].to("meta")
    assert moved.images.is_meta and moved.seeds.is_meta and moved.teacher_embeddings["t"].is_meta
    assert moved.sample_ids.tolist() == [6, 8], "ids name samples in logs; they stay where they can be read"
    pixels = batch.pixels("cpu")
    assert pixels.dtype == torch.float32 and torch.equal((pixels * 255).round().to(torch.uint8), batch.images)


def test_the_loader_leaves_torchs_generator_alone(dataset):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(stream(dataset, workers=1, stop=2))
    assert torch.equal(before, torch.get_rng_state())


def test_real_shards(tmp_path):
    shard = Path(__file__).parents[3] / "shared/data/imagenet1k-sample-s256/test/0.tar"
    if not shard.is_file():
        pytest.skip(f"needs real images at {shard}")
    data = Data(shards=str(shard), index=str(tmp_path / "i.npz"))
    build_index([str(shard)], tmp_path / "i.npz", 1, False)
    dataset = open_dataset(data)
    assert (
        len(dataset) == 1000
        and sorted(dataset.labels) == list(range(1000))
        and classnames(data, dataset)[:2] == ["tench", "goldfish"]
    )
    batches = list(eval_batches(SampleReader(dataset, Transform(64)), range(0, 1000, 10), 50, max_replaced=0))
    assert sum(len(b) for b in batches) == 100 and 60 < torch.cat([b.images for b in batches]).double().mean() < 180


def test_a_sample_without_a_caption_is_replaced_where_captions_are_needed(open_members):
    """Missing, empty and white space alone are all none; labels are then not needed."""
    members = [
        m
        for key, more in (
            ("a", []),
            ("b", [("b.txt", b"")]),
            ("c", [("c.txt", b" \n")]),
            ("d", [("d.txt", b"an owl"), ("d.cls", b"x")]),
        )
        for m in [(f"{key}.jpg", IMAGE), *more]
    ]
    dataset = open_members(members)
    batches = list(
        stream(dataset, lanes=1, batch_size=4, stop=1, need_labels=False, need_captions=True, max_replaced=1)
    )
    assert batches[0].captions == ["an owl"] * 4 and sorted(r[0][-1] for r in batches[0].replaced) == ["a", "b", "c"]
    assert {r[1:] for r in batches[0].replaced} == {(dataset.name(3), "no .txt member, or an empty one")}
    with pytest.raises(UserError, match="no .txt member.*nor has its shard any other usable.*data.caption_key"):
        next(
            iter(
                stream(
                    open_members([("a.jpg", IMAGE), ("a.cls", b"0")]), lanes=1, batch_size=1, stop=1, need_captions=True
                )
            )
        )
