"""Shards of anybody's labelled images as the splits of a study."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..config import Data
from ..data.class_names import classnames
from ..data.dataset import Dataset, open_dataset
from ..data.index import EXTENSIONS
from ..data.reader import Reader
from ..errors import UserError
from ..folders import SETTINGS, publish_folder, read_settings
from .image_splits import Images, divide, write_split


def split_shards(source: Path, out: Path, *, validation: int, seed: int) -> None:
    """Write images/train, images/test and validation/test below `out`; again only where images or names have changed.

    `source` is a folder of shards, beside which or one folder up lie its classnames.txt; images are copied as they are.
    validation/test has `validation` of them, images/test twice as many, even over the classes, images/train the rest.
    Raises UserError when `source` holds no shards or an image without a label, and when the images do not suffice.
    """
    given = Data(shards=str(source.resolve()))
    dataset = open_dataset(given)
    names = classnames(given, dataset)
    settings = {"source": str(source.resolve()), "fingerprint": dataset.fingerprint, "classes": names}
    settings |= {"validation": validation, "seed": seed}
    if read_settings(out) == settings:
        return
    rng = np.random.Generator(np.random.Philox(seed))
    train, held, test = divide(f"'{source}'", _read(dataset, names), None, validation, rng)
    with publish_folder(out, settings) as partial:
        for images, split in ((train, "images/train"), (test, "images/test"), (held, "validation/test")):
            write_split([images], partial / split)
        # The weights that are pretrained on it depend on them.
        (partial / "images" / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")


def _read(dataset: Dataset, names: list[str]) -> Images:
    for i in np.flatnonzero(dataset.labels < 0)[:1].tolist():
        raise UserError(
            f"data.source: '{dataset.name(i)}': {dataset.label_problem(i)}; settings are chosen by classes, so give it "
            "the number of its own in a .cls member, or leave it out"
        )
    kinds = [EXTENSIONS[kind] for kind in dataset.index.extension.tolist()]
    return Images.of(Reader(dataset).image, kinds, dataset.labels, names)
