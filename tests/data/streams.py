"""A training stream of a small dataset."""

from mmtard.config import Data
from mmtard.data.images import Transform
from mmtard.data.order import Order
from mmtard.data.samples import SampleReader
from mmtard.data.stream import TrainStream

CROP = Transform(16, crop_scale=(0.5, 1.0), flip=True)


def stream(dataset, *, lanes=4, batch_size=8, start=0, stop=9, transform=CROP, rank=0, world=1, **more):
    needs = {name: more.pop(name) for name in ("need_labels", "need_captions") if name in more}
    return TrainStream(
        SampleReader(dataset, transform, seed=1, **needs),
        Order(dataset.shard_counts, 1, lanes, 5),
        Data(shards="x", **{"workers": 0, **more}),
        batch_size=batch_size,
        steps=range(start, stop),
        rank=rank,
        world=world,
    )
