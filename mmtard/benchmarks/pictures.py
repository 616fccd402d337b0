"""Images that take a decoder as long as photographs do, for measuring the loading of data where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, QUALITY = (500, 375), 92  # ImageNet's commonest size; what is drawn has some 85 kB a file
CLASSES = 10


def draw_pictures(folder: Path, count: int, drawn: Callable[[], object] = lambda: None) -> None:
    """Write `count` JPEG images in class folders: smooth shades, edges and grain, the same at every call.

    `drawn` is called after each.
    """
    width, height = SIZE
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        shades = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
        edges = np.asarray(Image.fromarray(coarse[::2, ::2]).resize(SIZE, Image.Resampling.NEAREST), dtype=np.float32)
        grain = random.normal(0, 9, (height, width, 1)).astype(np.float32)
        pixels = (0.6 * shades + 0.4 * edges + grain).clip(0, 255).astype(np.uint8)
        path = folder / f"{number % CLASSES:02d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, "JPEG", quality=QUALITY)
        drawn()
