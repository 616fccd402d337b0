"""What a study is made of: rendered or converted images in splits, and CLIPs pretrained on their captions."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..config import Data
from ..data.dataset import open_dataset
from ..data.images import DecodeError, decode
from ..data.paths import shards_of
from ..data.reader import Reader
from ..distributed.processes import keep_freed_memory
from ..errors import UserError, unknown_name
from ..files import why_not_written
from ..study.origin import has_models
from ..study.schema import Material, Study
from .cifar_splits import make_splits
from .pretrain import Pretraining, pretrain
from .shapes import make_data
from .shard_splits import split_shards

DATA, PRETRAINED = "data", "pretrained"  # folders of a study


def check(study: Study) -> None:
    """Raise UserError for data that nothing makes, options that its maker does not know, and for a pretraining that
    cannot be: of no architecture, or of 10 steps.
    """
    if study.data is not None:
        if study.data.maker not in MAKERS:
            raise unknown_name("data.maker", study.data.maker, MAKERS)
        _options(study.data)
        if study.data.source is not None and not Path(study.data.source).is_dir():
            raise UserError(f"data.source: '{study.data.source}' is no folder; name the one that holds the images")
        if study.data.maker == "shards":
            _refuse_no_shards(study.data.source)
    for name, how in study.pretrain.items():
        if how.steps == 10:  # a tenth of them, its rise, ends at the first one, and torch divides by its length
            raise UserError(f"pretrain.{name}.steps: torch has no cycle of 10 steps; write 9, or 11 or more")
        if not _architecture(how.architecture).is_file():
            raise UserError(
                f"pretrain.{name}.architecture: '{how.architecture}' is no .json model config; name a file, or one of "
                f"{', '.join(sorted(path.stem for path in Path(__file__).parent.glob('*.json')))}"
            )
        takes, made = _image_size(_architecture(how.architecture)), _own_shards(study, Path(how.data))
        size = made.options.get("size", 0) if made is not None else 0
        if takes and size and takes != (size, size):
            raise UserError(
                f"data.options.size: {size}, and pretrain.{name}.architecture, {how.architecture}, "
                f"takes {_px(takes)}; write {takes[0]}"
            )


def make(study: Study) -> None:
    """Make the data and the pretrained models of a study; what is there already is left as it is.

    Raises UserError where one would be replaced that runs or teachers came of.
    """
    check(study)
    keep_freed_memory()
    folder, keep = Path(study.out), has_models(study)
    if study.data is not None:
        MAKERS[study.data.maker](study.data, folder / DATA, keep)
    for name, how in study.pretrain.items():
        data = Path(how.data)
        splits = tuple(split for split in ("test", "zeroshot") if (data / split).is_dir())
        settings = Pretraining(_architecture(how.architecture), how.steps, how.batch_size, how.lr, how.seed)
        out = folder / PRETRAINED / name
        try:
            pretrain(data, out, settings, splits, keep=keep)
        except SafetensorError as error:  # which is no OSError
            full = "os error 28" in str(error)
            reason = OSError(errno.ENOSPC, "No space left on device") if full else OSError(str(error))
            raise UserError(why_not_written(out, reason, remedy="name another folder")) from None
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, DecodeError):
            _look_at_images(_given(study, data, splits), settings.architecture)
            raise
    keep_freed_memory()  # what this freed goes back: from here on a study waits for other processes


def _own_shards(study: Study, data: Path) -> Material | None:
    """What made `data`, where it is of shards of the user's own."""
    made = study.data if Path(study.out) / DATA in data.parents else None
    return made if made is not None and made.maker == "shards" else None


def _given(study: Study, data: Path, splits: tuple[str, ...]) -> list[Path]:
    """The folders of shards where a user finds the images of `data`: the source, where these are copies of its own."""
    made = _own_shards(study, data)
    is_copy = made is not None and not made.options.get("size")
    return [Path(made.source)] if is_copy else [data / split for split in ("train", *splits)]


def _refuse_no_shards(source: str | None) -> None:
    try:
        shards_of(Data(shards=source or ""))
    except UserError as error:
        raise UserError(f"data.source: {str(error).removeprefix('data.shards: ')}") from None


def _image_size(architecture: Path) -> tuple[int, int] | None:
    """Height and width of the images that a CLIP takes; None where its config leaves them to open_clip.

    Raises UserError for what is no model config.
    """
    try:
        size = json.loads(architecture.read_text())["vision_cfg"].get("image_size")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"'{architecture}' is no model config of open_clip with a vision_cfg; name one") from None
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]} px" if size[0] == size[1] else f"{size[1]} x {size[0]} px"


def _look_at_images(folders: list[Path], architecture: Path) -> None:
    """Raise UserError naming an image that a CLIP cannot be pretrained on: one that is damaged, or of another size."""
    takes = _image_size(architecture)
    for folder in folders:
        dataset = open_dataset(Data(shards=str(folder)))
        reader = Reader(dataset)
        for i in range(len(dataset)):
            name = f"'{dataset.name(i)}' of '{folder}'"
            try:
                found = decode(reader.image(i)).size
            except DecodeError as error:
                raise UserError(f"data: {name} cannot be decoded ({error}); leave it out") from None
            if takes and found != takes[::-1]:
                raise UserError(
                    f"data: {name} has {found[0]} x {found[1]} px, and {architecture.stem} is pretrained on "
                    f"{takes[1]} x {takes[0]}; `maker: shards` brings images there with data.options.size={takes[0]}"
                )


def shapes(material: Material, out: Path, keep: bool = False) -> None:
    """Render OUT/{train,test,zeroshot}, and OUT/validation/{test,zeroshot} of images of their own.

    options: images of each split, `validation` and `validation_zeroshot` among them, and `seed`.
    """
    sizes = _options(material)
    held = {"train": 0, "test": sizes.pop("validation"), "zeroshot": sizes.pop("validation_zeroshot")}
    make_data(out / "images", **sizes, keep=keep)
    make_data(out / "validation", **held, seed=sizes["seed"] + 1_000_003, keep=keep)


def cifar(material: Material, out: Path, keep: bool = False) -> None:
    """Split CIFAR-10 and CIFAR-100 as `make_splits` says; `source` is their folder, options are its arguments."""
    make_splits(Path(material.source or ""), out, **_options(material), keep=keep)


def shards(material: Material, out: Path, keep: bool = False) -> None:
    """Split the shards that lie in `source` as `split_shards` says; options are its arguments."""
    split_shards(Path(material.source or ""), out, **_options(material), keep=keep)


MAKERS: dict[str, Callable[[Material, Path, bool], None]] = {"shapes": shapes, "cifar": cifar, "shards": shards}
SOURCES = {"cifar": "CIFAR-10 and CIFAR-100, e.g. data.source=../shared/data", "shards": "the shards"}
DEFAULTS = {
    "shapes": {
        "train": 8000, "test": 1000, "zeroshot": 480, "validation": 600, "validation_zeroshot": 240, "seed": 0,
    },
    "cifar": {"trained": "cifar100", "validation": 2000, "zeroshot_validation": 1000, "few": 2000, "seed": 0},
    "shards": {"validation": 500, "size": 0, "seed": 0},
}  # fmt: skip


def _architecture(words: str) -> Path:
    path = Path(words)
    return path if path.suffix else Path(__file__).with_name(f"{words}.json")


def _options(material: Material) -> dict:
    known = DEFAULTS[material.maker]
    for name, value in material.options.items():
        if name not in known:
            raise unknown_name("key of data.options", name, known)
        if not isinstance(value, type(known[name])) or isinstance(value, bool) or (name != "trained" and value < 0):
            kind = "name" if name == "trained" else "whole number of 0 or more"
            raise UserError(f"data.options.{name}: {value!r} is no {kind}; write e.g. {known[name]}")
        if name == "validation" and value < 1 and material.maker in SOURCES:
            raise UserError("data.options.validation: no image to choose settings by; ask for 1 or more")
    if material.maker in SOURCES and material.source is None:
        raise UserError(f"data.source: name the folder of {SOURCES[material.maker]}")
    return known | material.options
