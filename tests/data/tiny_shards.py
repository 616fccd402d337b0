"""Tiny shards written by the standard library alone, so that our reader is not tested against our writer."""

import io
import tarfile

import numpy as np
from PIL import Image


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth random RGB image; no two seeds look alike."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def write_tar(path, members: list[tuple[str, bytes]]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    return [
        m
        for i in range(first, first + count)
        for m in ((f"s{i:04d}.jpg", encode(picture(i))), (f"s{i:04d}.cls", str(i % 7).encode()))
    ]
