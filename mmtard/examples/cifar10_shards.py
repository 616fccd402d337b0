"""CIFAR-10 as WebDataset shards, from image folders or from archives of encoded images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import webdataset as wds

from ..data.shard_writer import write_shards
from ..errors import UserError
from ..folders import publish_folder, read_settings

SPLITS = ("train", "test")
SHARD = 5000


def make_shards(source: Path, out: Path) -> Path:
    """Write `out/train` and `out/test`, each with a classnames.txt; return `out`.

    Nothing is written anew from a source that was written before. `source` holds either train/ and test/ with one
    sub-folder of images a class, or archives named `*train*.npz` and `*test*.npz` whose `blob` uint8 has encoded images
    end to end: image i is blob[offset[i]:offset[i+1]], of class classes[label[i]].
    Raises UserError when it holds neither.
    """
    settings = {
        "source": str(source.resolve()),
        "files": sorted(f"{p.name} {p.stat().st_size}" for p in source.glob("*.npz")),
    }
    if read_settings(out) == settings:
        return out
    archives = {split: sorted(source.glob(f"*{split}*.npz")) for split in SPLITS}
    if not all(archives.values()) and not all((source / split).is_dir() for split in SPLITS):
        raise UserError(
            f"'{source}' has neither train/ and test/ folders of images nor archives *train*.npz and *test*.npz; "
            "give the folder of CIFAR-10"
        )
    with publish_folder(out, settings) as partial:
        for split in SPLITS:
            if archives[split]:
                _from_archives(archives[split], partial / split)
            else:
                write_shards(source / split, partial / split, samples_per_shard=SHARD)
    return out


def _from_archives(archives: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    with wds.ShardWriter(str(folder / "%d.tar"), maxcount=SHARD, verbose=0) as shards:
        for path in archives:
            with np.load(path, allow_pickle=False) as stored:  # each look-up decompresses the array anew
                blob, offset, label, classes = (stored[name] for name in ("blob", "offset", "label", "classes"))
            for i, c in enumerate(label.tolist()):
                image = blob[offset[i] : offset[i + 1]].tobytes()
                shards.write({"__key__": f"{path.stem}-{i:05d}", "webp": image, "cls": str(c).encode()})
    (folder / "classnames.txt").write_text("\n".join(classes.tolist()) + "\n")
