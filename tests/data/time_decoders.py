"""Milliseconds of decoding and resizing a photograph of 256 px on one core: Pillow beside torchvision and torch.

    OMP_NUM_THREADS=1 python -m tests.data.time_decoders

In a checkout; no test. The photographs are drawn. Also printed: how many values of the pixels differ, and by how much.
"""

import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.io import decode_jpeg

from mmtard.benchmarks.pictures import draw_pictures
from mmtard.data.images import decode

ROUNDS, PICTURES, SHORT, SIDE = 5, 40, 256, 224


def jpegs() -> list[bytes]:
    """As `mmtard shards --resize 256 --quality 90` writes them: the shorter side has 256 px."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        draw_pictures(Path(folder) / "drawn", PICTURES)
        for path in sorted((Path(folder) / "drawn").rglob("*.jp*g")):
            image, file = Image.open(path), io.BytesIO()
            scale = SHORT / min(image.size)
            image.resize([round(side * scale) for side in image.size], Image.BICUBIC).save(file, "JPEG", quality=90)
            found.append(file.getvalue())
    return found


def beside(what: str, inputs: list, theirs, ours) -> None:
    """Time both alternately, and print the medians and how their pixels differ."""
    seconds = {theirs: [], ours: []}
    for _ in range(ROUNDS):
        for function, found in seconds.items():
            began = time.perf_counter()
            for one in inputs:
                function(one)
            found.append((time.perf_counter() - began) / len(inputs))
    apart = np.concatenate([np.abs(ours(one).astype(int) - theirs(one)).ravel() for one in inputs])
    own, other = (1e3 * statistics.median(seconds[function]) for function in (ours, theirs))
    differ = f"{(apart > 0).mean():.2%} differ, at most by {apart.max()}"
    print(f"{what}: Pillow {own:.2f} ms, the other {other:.2f}; {differ}")


def main() -> None:
    torch.set_num_threads(1)
    data = jpegs()
    beside(
        "decoding",
        data,
        lambda one: decode_jpeg(torch.frombuffer(bytearray(one), dtype=torch.uint8)).permute(1, 2, 0).numpy(),
        lambda one: np.asarray(decode(one).convert("RGB")),
    )

    def torchs(image: Image.Image) -> np.ndarray:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()

    images = [decode(one).convert("RGB") for one in data]
    beside("resizing", images, torchs, lambda image: np.asarray(image.resize((SIDE, SIDE), Image.BICUBIC)))


if __name__ == "__main__":
    main()
