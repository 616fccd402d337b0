"""Captioned 32x32 images of coloured shapes, as WebDataset shards.

A class is a colour and a shape ("red circle"). Texture, place, size, angle, background and clutter vary freely,
and some of them are named in the caption. A quarter of the combinations never occurs in training: these are the
zero-shot classes, whose every word has been seen.
"""

from __future__ import annotations

import colorsys
import io
import math
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.progress import track

from ..folders import is_kept, publish_folder, read_settings

VERSION = 1  # one more where the same arguments give other bytes; tests/examples/test_versions.py asks
SIZE = 32
OVERSAMPLE = 4

# hue in degrees and saturation of the undisturbed colour
COLOURS = {
    "red": (0, 0.9),
    "yellow": (55, 0.9),
    "green": (120, 0.85),
    "cyan": (180, 0.85),
    "blue": (228, 0.9),
    "purple": (278, 0.85),
    "pink": (325, 0.6),
    "white": (0, 0.0),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TEXTURES = ("plain", "striped", "dotted", "checkered")
PLACES = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the centre": (0, 0),
}
OPENINGS = ("", "a photo of ", "an image of ", "this is a photo of ", "a picture showing ", "there is ")

CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
# Each shape is held out in two colours and each colour in one or two shapes,
# so neither word alone names a held-out class.
HELD_OUT = [f"{[*COLOURS][k % len(COLOURS)]} {SHAPES[k % len(SHAPES)]}" for k in range(2 * len(SHAPES))]
TRAINED = [name for name in CLASSES if name not in HELD_OUT]


def _polygon(radii, turn: float) -> np.ndarray:
    """Corners [n,2] at evenly spaced angles and the given distances from the origin, the first one pointing up."""
    angles = turn - math.pi / 2 + np.arange(len(radii)) * 2 * math.pi / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.asarray(radii)[:, None]


def _silhouette(shape: str, centre: np.ndarray, radius: float, turn: float) -> Image.Image:
    """Draw a mask of the shape at the oversampled size; shapes have about the same area.

    centre [2] and radius in oversampled pixels; turn in radians.
    """
    mask = Image.new("L", (SIZE * OVERSAMPLE,) * 2)
    draw = ImageDraw.Draw(mask)

    def disc(r: float, fill: int) -> None:
        draw.ellipse([*(centre - r), *(centre + r)], fill=fill)

    if shape == "circle":
        disc(0.95 * radius, 255)
    elif shape == "ring":
        disc(1.1 * radius, 255)
        disc(0.6 * radius, 0)
    elif shape == "cross":
        for axis in (0, 1):
            corners = np.array([[-1.2, -0.35], [1.2, -0.35], [1.2, 0.35], [-1.2, 0.35]]) * radius
            angle = turn + axis * math.pi / 2
            rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
            draw.polygon([tuple(p) for p in centre + corners @ rotation], fill=255)
    else:
        corners = {
            "square": _polygon([1.2] * 4, turn + math.pi / 4),
            "triangle": _polygon([1.35] * 3, turn),
            "star": _polygon([1.4, 0.55] * 5, turn),
        }[shape]
        draw.polygon([tuple(p) for p in centre + corners * radius], fill=255)
    return mask


def _texture(texture: str, rng: np.random.Generator) -> np.ndarray:
    """How much of the darker shade each pixel takes [SIZE,SIZE], in [0,1]."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    angle, period = rng.uniform(0, math.pi), rng.uniform(4.5, 6.5)
    u = (x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period + rng.uniform(0, 2 * math.pi)
    v = (y * math.cos(angle) - x * math.sin(angle)) * 2 * math.pi / period + rng.uniform(0, 2 * math.pi)
    wave = {
        "plain": np.full_like(u, -1.0),
        "striped": np.sin(u),
        "dotted": np.sin(u) + np.sin(v) - 0.8,
        "checkered": 2 * np.sin(u) * np.sin(v),
    }
    return np.clip(0.5 + 2 * wave[texture], 0, 1)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A dull, unevenly lit and cluttered backdrop [SIZE,SIZE,3] in [0,1]."""
    patches = np.clip(rng.uniform(0.1, 0.55) + rng.normal(0, 0.10, (3, 3, 1)) + rng.normal(0, 0.035, (3, 3, 3)), 0, 0.7)
    canvas = Image.fromarray((patches * 255).astype(np.uint8)).resize(
        (SIZE * OVERSAMPLE,) * 2, Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(0, 4)):
        ends = rng.uniform(0, SIZE * OVERSAMPLE, 4)
        shade = tuple(int(c) for c in np.clip(rng.uniform(20, 170) + rng.normal(0, 12, 3), 0, 255))
        draw.line([*ends], fill=shade, width=int(rng.integers(2, 2 * OVERSAMPLE)))
    for _ in range(rng.integers(0, 5)):
        centre, radius = rng.uniform(0, SIZE * OVERSAMPLE, 2), rng.uniform(0.6, 1.5) * OVERSAMPLE
        shade = tuple(
            int(255 * c) for c in colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.8), rng.uniform(0.4, 0.9))
        )
        draw.ellipse([*(centre - radius), *(centre + radius)], fill=shade)
    backdrop = np.asarray(canvas.reduce(OVERSAMPLE), dtype=np.float64) / 255
    return backdrop + rng.normal(0, rng.uniform(0, 0.04), backdrop.shape)


def draw(name: str, rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Draw an image of the class `name` (SIZE x SIZE, RGB) and word its caption.

    Both depend on `name` and the state of `rng` alone.
    """
    colour, shape = name.split()
    texture, place = str(rng.choice(TEXTURES, p=[0.4, 0.2, 0.2, 0.2])), str(rng.choice(list(PLACES)))
    radius = rng.uniform(8.5, 11.5)
    centre = SIZE / 2 + np.array(PLACES[place]) * rng.uniform(2.5, 3.5) + rng.uniform(-0.7, 0.7, 2)
    mask = _silhouette(shape, centre * OVERSAMPLE, radius * OVERSAMPLE, rng.uniform(-0.25, 0.25))
    alpha = np.asarray(mask.reduce(OVERSAMPLE), dtype=np.float64)[..., None] / 255

    hue, saturation = COLOURS[colour]
    saturation *= rng.uniform(0.85, 1.1)
    bright = np.array(
        colorsys.hsv_to_rgb((hue + rng.uniform(-9, 9)) / 360 % 1, min(saturation, 1), rng.uniform(0.8, 1.0))
    )
    dark = _texture(texture, rng)[..., None]
    surface = bright * (1 - dark * rng.uniform(0.2, 0.4))
    pixels = alpha * surface + (1 - alpha) * _background(rng)
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))

    words = []
    if radius < 9.3 or radius > 10.7:
        words += ["small" if radius < 9.3 else "large"] if rng.uniform() < 0.5 else []
    words += [texture] if rng.uniform() < 0.6 else []
    where = f" {place}" if rng.uniform() < 0.6 else ""
    return image, f"{rng.choice(OPENINGS)}a {' '.join([*words, name])}{where}"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    tar.addfile(member, io.BytesIO(content))


def _write_split(folder: Path, names: list[str], samples: int, shard_size: int, entropy: list[int]) -> None:
    folder.mkdir()
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    labels = np.random.default_rng(entropy).permutation(np.arange(samples) % len(names))
    starts = range(0, samples, shard_size)
    for shard, start in enumerate(track(starts, description=f"rendering {folder.name:<9}")):
        with tarfile.open(folder / f"{folder.name}-{shard:04d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(start, min(start + shard_size, samples)):
                image, caption = draw(names[labels[i]], np.random.default_rng([*entropy, i]))
                jpeg = io.BytesIO()
                image.save(jpeg, "JPEG", quality=92, subsampling=0)
                _add(tar, f"{i:06d}.jpg", jpeg.getvalue())
                _add(tar, f"{i:06d}.cls", str(labels[i]).encode())
                _add(tar, f"{i:06d}.txt", caption.encode())


def make_data(
    out: Path,
    *,
    train: int = 8000,
    test: int = 1000,
    zeroshot: int = 480,
    shard_size: int = 500,
    seed: int = 0,
    keep: bool = False,
) -> Path:
    """Render `out/{train,test,zeroshot}/*.tar`, each split with its `classnames.txt`.

    train, test, zeroshot: images of each split. `train` and `test` share their classes, `zeroshot` has its own.
    The same arguments give the same bytes. A folder that already holds them is left as it is; one made with other
    arguments is replaced. Raises UserError where `out` was not made here, and where
    it would replace what `keep` asks to keep.
    """
    out = Path(out)
    settings = dict(train=train, test=test, zeroshot=zeroshot, shard_size=shard_size, seed=seed)
    settings["version"] = VERSION
    if (then := read_settings(out)) == settings or keep and is_kept(out, then, settings):
        return out
    with publish_folder(out, settings) as partial:
        for i, (split, names, samples) in enumerate(
            [("train", TRAINED, train), ("test", TRAINED, test), ("zeroshot", HELD_OUT, zeroshot)]
        ):
            _write_split(partial / split, names, samples, shard_size, [seed, i])
    return out
