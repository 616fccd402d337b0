"""Shards of anybody's labelled images as the splits of a study."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..config import Data
from ..data.class_names import beside, names_of
from ..data.dataset import Dataset, open_dataset
from ..data.images import DecodeError, Transform, decode
from ..data.index import EXTENSIONS
from ..data.reader import Reader
from ..errors import UserError
from ..folders import SETTINGS, is_kept, publish_folder, read_settings
from .image_splits import Images, divide, write_split


def split_shards(source: Path, out: Path, *, validation: int, size: int, seed: int, keep: bool = False) -> None:
    """Write images/train, images/test and validation/test below `out`; again only where images or names have changed.

    `source` is a folder of shards, beside which or one folder up lie its classnames.txt. Captions (.txt) are copied,
    images, too; with a `size` above 0 these become PNGs of size x size px: the shorter side brought to it, the centre
    cut out. validation/test has `validation` of them, images/test twice as many, even over the classes, images/train
    the rest. What the shards hold and is not read is printed. Raises UserError when `source` holds no shards, no names,
    one class or an image without a label, where one to be resized is damaged, when the images do not suffice, and where
    it would replace what `keep` asks to keep.
    """
    given = Data(shards=str(source.resolve()))
    try:
        dataset = open_dataset(given)
    except UserError as error:
        raise UserError(f"data.source '{source}': {error}") from None
    names = _names(source, given, dataset)
    settings = {"source": str(source.resolve()), "fingerprint": dataset.fingerprint, "classes": names}
    settings |= {"validation": validation, "seed": seed, **({"size": size} if size else {})}
    if (then := read_settings(out)) == settings or keep and is_kept(out, then, settings):
        return
    for note in dataset.index.notes():
        print(f"data.source '{source}': {note}", flush=True)
    rng = np.random.Generator(np.random.Philox(seed))
    train, held, test = divide(f"'{source}'", _read(dataset, names, size), None, validation, rng)
    with publish_folder(out, settings) as partial:
        for images, split in ((train, "images/train"), (test, "images/test"), (held, "validation/test")):
            write_split([images], partial / split)
        # The weights that are pretrained on it depend on them.
        (partial / "images" / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")


def _names(source: Path, given: Data, dataset: Dataset) -> list[str]:
    path = beside(given)
    if path is None:
        raise UserError(
            f"data.source: no classnames.txt beside the shards of '{source}'; write one there, a name a line, "
            "in the order of the labels"
        )
    names = names_of(dataset, path, "data.source")
    if len(found := np.unique(dataset.labels[dataset.labels >= 0])) == 1:
        only = names[found[0]]
        raise UserError(f"data.source: '{source}' has images of class '{only}' alone; a study takes 2 classes or more")
    return names


def _read(dataset: Dataset, names: list[str], size: int) -> Images:
    for i in np.flatnonzero(dataset.labels < 0)[:1].tolist():
        raise UserError(
            f"data.source: '{dataset.name(i)}': {dataset.label_problem(i)}; settings are chosen by classes, so give it "
            "the number of its own in a .cls member, or leave it out"
        )
    kinds, reader = [EXTENSIONS[kind] for kind in dataset.index.extension.tolist()], Reader(dataset)
    images = Images.of(reader.image, kinds, dataset.labels, names)
    if size:
        images = Images.of(_Resized(reader, size), ["png"] * len(kinds), dataset.labels, names)
    return replace(images, caption=reader.caption)


class _Resized:
    """Call with a sample: its image as a PNG of size x size px, brought there as CLIP's are."""

    def __init__(self, reader: Reader, size: int):
        self.reader, self.transform = reader, Transform(size)

    def __call__(self, sample: int) -> bytes:
        try:
            pixels = self.transform(decode(self.reader.image(sample)), 0)
        except DecodeError as error:
            name = self.reader.dataset.name(sample)
            raise UserError(f"data.source: '{name}' cannot be decoded ({error}); leave it out") from None
        out = io.BytesIO()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(out, "PNG")
        return out.getvalue()
