"""1,000 shards of 1,000 tiny samples: index, start-up, order of 64 pretended ranks, memory of the loaders.

    python tests/load.py [SHARDS] [SAMPLES A SHARD] [FOLDER]     some 2.1 GB and ten minutes on two cores as it stands

Prints one line a figure; fails where a sample is read twice in an epoch, or memory grows.
"""

import io
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mmtard.config import Data
from mmtard.data.dataset import open_dataset
from mmtard.data.images import Transform
from mmtard.data.indexing import build_index
from mmtard.data.order import Order
from mmtard.data.paths import expand_shards
from mmtard.data.samples import SampleReader
from mmtard.data.stream import TrainStream

LANES, WORLD, BATCH, EPOCHS, STEPS = 64, 64, 512, 2, 300


def header(name: bytes, size: int) -> bytearray:
    member = tarfile.TarInfo(name.decode())
    member.size = size
    return bytearray(member.tobuf(tarfile.USTAR_FORMAT))


def write_shards(folder: Path, shards: int, each: int) -> None:
    """Plain tars whose members differ in their names alone: headers are copied, with the name and checksum set anew."""
    image = io.BytesIO()
    Image.new("RGB", (2, 2)).save(image, "PNG")
    members = [(b"00000000.png", image.getvalue()), (b"00000000.cls", b"1")]
    blocks = [(header(name, len(data)), data + bytes(-len(data) % 512)) for name, data in members]
    for number in range(shards):
        with open(folder / f"{number:05d}.tar", "wb") as tar:
            for sample in range(number * each, (number + 1) * each):
                for head, body in blocks:
                    head[0:8], head[148:156] = b"%08d" % sample, b" " * 8
                    head[148:156] = b"%06o\0 " % sum(head)
                    tar.write(head + body)
            tar.write(bytes(10240))
    (folder / "classnames.txt").write_text("a\nb\n")


def timed(what: str, began: float, more: str = "") -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what}: {time.monotonic() - began:.2f} s{more} (peak {peak:.0f} MB)", flush=True)


def check_order(dataset) -> None:
    """Every sample at most once an epoch, and the N mod lanes left out are others each time."""
    orders = [Order(dataset.shard_counts, 0, LANES, 1024) for _ in range(WORLD)]
    began, total = time.monotonic(), orders[0].epoch_samples * EPOCHS
    seen = np.zeros((EPOCHS, len(dataset)), dtype=np.int32)
    for consumed in range(0, total - total % BATCH, BATCH):
        for rank in range(WORLD):
            ids, epochs = orders[rank].rank_batch(consumed, BATCH, rank, WORLD)
            np.add.at(seen, (epochs, ids), 1)
    for consumed in range(total - total % BATCH, total, LANES):
        ids, epochs = orders[0].batch(consumed, LANES)
        np.add.at(seen, (epochs, ids), 1)
    left = len(dataset) % LANES
    assert seen.max() == 1 and ((seen == 0).sum(1) == left).all(), "a sample is read twice or missed"
    timed(f"{EPOCHS} epochs of {WORLD} ranks: each sample once, {left} left out", began)


def memory_of_workers() -> list[int]:
    """MB that each child process holds of its own and its share of what is shared."""
    held = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rpartition(") ")[2].split()[1]) == os.getpid():
                lines = (process / "smaps_rollup").read_text().splitlines()
                held.append(sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) // 1024)
        except OSError:
            pass
    return held


def check_loaders(dataset) -> None:
    """A resume far into a run, and the loaders' memory over STEPS steps."""
    began, far = time.monotonic(), 10**6
    order, samples = Order(dataset.shard_counts, 0, LANES, 1024), SampleReader(dataset, Transform(8), seed=0)
    steps = range(far, far + STEPS + 1)
    stream = iter(TrainStream(samples, order, Data(shards="x", workers=2), batch_size=BATCH, steps=steps))
    next(stream)
    timed(f"first batch of a resume at step {far:,}", began)
    held = []
    for step in range(STEPS):
        next(stream)
        if step in (STEPS // 3, STEPS - 1):
            held.append(memory_of_workers())
    stream.close()
    timed(f"{STEPS} steps of {BATCH}, MB of the loaders {held[0]} -> {held[-1]}", began)
    assert max(held[-1]) < 1.2 * max(held[0]) + 20, "the loaders' memory grows"


def main(shards: int, each: int, folder: Path) -> None:
    began = time.monotonic()
    write_shards(folder, shards, each)
    size = sum(p.stat().st_size for p in folder.glob("*.tar")) / 1e9
    timed(f"{shards} shards of {each}: written", began, f", {size:.2f} GB")
    began = time.monotonic()
    index = folder / "mmtard-index.npz"
    build_index(expand_shards(str(folder)), index, progress=False)
    timed("index", began, f", {index.stat().st_size / 1e6:.1f} MB")
    began = time.monotonic()
    dataset = open_dataset(Data(shards=str(folder)))
    fingerprint = dataset.fingerprint
    timed("open and fingerprint", began)
    os.utime(folder / "00000.tar")
    began = time.monotonic()
    assert open_dataset(Data(shards=str(folder))).fingerprint == fingerprint
    timed("open after one shard was touched", began)
    for shard in folder.glob("*.tar"):
        os.utime(shard)
    began = time.monotonic()
    assert open_dataset(Data(shards=str(folder))).fingerprint == fingerprint
    timed("open after all shards were touched: headers, labels and captions walked", began)
    check_order(dataset)
    check_loaders(dataset)


if __name__ == "__main__":
    shards, each = (int(word) for word in (sys.argv[1:3] or ("1000", "1000")))
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(tempfile.mkdtemp(prefix="mmtard-load-"))
    try:
        folder.mkdir(exist_ok=True)
        main(shards, each, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
