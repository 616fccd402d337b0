"""CIFAR-10 and CIFAR-100 as the splits of a study: what is trained on, what settings are chosen by, what is shown.

Adversarial training sees one of the two; the other one's classes are named to it by their words alone (zero-shot).
Pretraining sees the captions of both.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..data.index import EXTENSIONS
from ..errors import UserError
from ..folders import SETTINGS, is_kept, publish_folder, read_settings
from .image_splits import Images, divide, spread, write_split

PRETRAINING = "pretraining"
NAMES = ("cifar10", "cifar100")


def make_splits(
    source: Path,
    out: Path,
    *,
    trained: str,
    validation: int,
    zeroshot_validation: int,
    few: int,
    seed: int,
    keep: bool = False,
) -> None:
    """Write the splits below `out`; nothing is written anew from a source that was written before.

    images/train, images/few (a pool of `few` of them), images/test: of the data set that is `trained` on; images/
    zeroshot: of the other one, its test images. validation/test and validation/zeroshot: training images of both, in
    no other split. pretraining/train: all training images of both that are not in a validation split, by the names of
    all classes. zeroshot_validation: 0 leaves the other data set out. Where a data set has no test images, test takes
    twice `validation` of its training images. Raises UserError when `source` holds neither archives
    `cifar10_*train*.npz` and the like, nor folders cifar10/train/CLASS of images; of one data set alone, also without
    its name, and where it would replace what `keep` asks to keep.
    """
    if trained not in NAMES:
        raise UserError(f"data.options.trained: '{trained}' is neither of {', '.join(NAMES)}; write one of them")
    given = sorted(f"{p.name} {p.stat().st_size}" for p in source.glob("*.npz")) if source.is_dir() else []
    settings = {"source": str(source.resolve()), "files": given, "trained": trained, "seed": seed, "few": few}
    settings |= {"validation": validation, "zeroshot_validation": zeroshot_validation}
    if (then := read_settings(out)) == settings or keep and is_kept(out, then, settings):
        return
    wanted = {trained: validation}
    if zeroshot_validation:
        wanted[next(name for name in NAMES if name != trained)] = zeroshot_validation
    rng = np.random.Generator(np.random.Philox(seed))
    found = {name: _read(source, name, alone=len(wanted) == 1) for name in wanted}
    kept = {name: divide(name, *found[name], wanted[name], rng) for name in wanted}
    with publish_folder(out, settings) as partial:
        for (_, held, test), split in zip(kept.values(), ("test", "zeroshot")):
            write_split([test], partial / "images" / split)
            write_split([held], partial / "validation" / split)
        train = kept[trained][0]
        write_split([train], partial / "images" / "train")
        write_split([train.take(np.sort(spread(train.labels, rng)[:few]))], partial / "images" / "few")
        write_split([kept[name][0] for name in NAMES if name in kept], partial / PRETRAINING / "train")
        # The weights that are pretrained on it depend on them.
        (partial / PRETRAINING / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")


def _read(source: Path, name: str, alone: bool) -> tuple[Images, Images | None]:
    """The training and the test images of a data set; None where it has no test images. alone: it is the only one."""
    found = {}
    for split in ("train", "test"):
        archives = sorted(source.glob(f"{name}_*{split}*.npz")) or (
            sorted(source.glob(f"*{split}*.npz")) if alone else []
        )
        folders = [source / name / split, *([source / split] if alone else [])]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        found[split] = _archives(archives) if archives else _folder(folder) if folder else None
    if found["train"] is None:
        raise UserError(
            f"data.source: '{source}' has neither archives {name}_*train*.npz nor a folder {name}/train of images; "
            f"name the folder that holds {'it' if alone else 'both CIFAR-10 and CIFAR-100'}"
        )
    return found["train"], found["test"]


def _archives(paths: list[Path]) -> Images:
    encoded, labels = [], []
    for path in paths:
        with np.load(path, allow_pickle=False) as stored:  # each look-up decompresses the array anew
            blob, offset, label, classes = (stored[key] for key in ("blob", "offset", "label", "classes"))
        whole = blob.tobytes()
        encoded += [whole[start:end] for start, end in zip(offset[:-1].tolist(), offset[1:].tolist())]
        labels.append(label)
    names = _in_words(classes.tolist())
    return Images.of(encoded.__getitem__, ["webp"] * len(encoded), np.concatenate(labels).astype(np.int64), names)


def _folder(folder: Path) -> Images:
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [
        (path, i) for i, name in enumerate(classes) for path in sorted((folder / name).iterdir()) if _is_image(path)
    ]
    kinds = [path.suffix.lstrip(".").lower() for path, _ in files]
    labels = np.array([i for _, i in files], dtype=np.int64)
    names = _in_words(classes)
    return Images.of(lambda i: files[i][0].read_bytes(), kinds, labels, names)


def _in_words(names: list[str]) -> list[str]:
    return [name.replace("_", " ") for name in names]


def _is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in EXTENSIONS and not path.name.startswith(".")
