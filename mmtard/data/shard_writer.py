"""An image folder written as WebDataset shards: the same bytes from the same images, by any number of processes."""

from __future__ import annotations

import filecmp
import io
import json
import os
import tarfile
import tempfile
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from ..errors import UserError
from ..files import exclusive, publish, write_text
from ..seeding import permutation
from .class_names import read_names
from .image_folder import ImageFolder, Source, survey
from .images import DecodeError, decode
from .index import Index
from .indexing import build_index
from .worker_pool import map_in_processes

RECORD = "shards.json"
NAMES, NUMBER, INDEX = "classnames.txt", "nshards.txt", "mmtard-index.npz"
WRITTEN = (NAMES, NUMBER, INDEX)  # beside the shards


@dataclass(frozen=True)
class Recipe:
    """What decides the shards' bytes besides the images."""

    samples_per_shard: int
    resize: int | None
    quality: int
    shuffle_seed: int
    images_sha256: str


@dataclass(frozen=True)
class Written:
    """What a folder of shards holds.

    `skipped` are the unreadable images, as paths; `left_out` counts the images that were no part of it, by reason;
    `unread` are those among them that are of a kind that is not read.
    """

    shards: int
    samples: int
    classes: int
    skipped: list[str]
    left_out: dict[str, int] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        shards = f"{self.shards} shard{'s' * (self.shards != 1)}"
        told = f"{self.samples} samples of {self.classes} classes in {shards}"
        if self.skipped:
            images = f"{len(self.skipped)} unreadable image{'s' * (len(self.skipped) != 1)}"
            told += f"; {images} left out, listed in skipped.txt beside the shards"
        if self.left_out:
            total = sum(self.left_out.values())
            reasons = "; ".join(f"{n} {why}" for why, n in self.left_out.items())
            told += f"; {total} image{'s' * (total != 1)} left out: {reasons}"
            if self.unread:  # whose reason is the last
                told += ", listed in skipped.txt beside the shards"
        return told


def write_shards(
    images: Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    resize: int | None = None,
    quality: int = 95,
    jobs: int | None = None,
    shuffle_seed: int = 0,
    classnames: Path | None = None,
    nested: bool = False,
    progress: bool = True,
) -> Written:
    """Write `images`/<class>/*.jpg|jpeg|png|webp as `out`/000000.tar ..., with class names, nshards.txt and the index.

    Labels count the class folders in sorted order, as numbers where all are numbers (ImageNet-V2's 0 ... 999); with
    `nested` every folder that holds images is a class, named by its path. `classnames` is a file of one name a line in
    that order (default: the folder names). `resize` re-encodes images whose shorter side is longer than that as JPEG of
    `quality`; all else is copied byte for byte. With `resize`, unreadable images are left out and listed in
    skipped.txt, as those of a kind that is not read always are. A `name.txt` beside an image becomes its caption. An
    interrupted call may be repeated: finished shards stay. Raises UserError when `out` holds shards of other images or
    settings.
    """
    images, out = Path(images), Path(out)
    if samples_per_shard < 1:
        raise UserError(f"samples per shard: {samples_per_shard} is not a number of samples; use 1 or more")
    folder = _survey(images, out, nested)
    names = _names(classnames, folder.classes)
    recipe = Recipe(samples_per_shard, resize, quality, shuffle_seed, folder.digest)
    plan = _plan(folder.sources, recipe, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out / ".writing"):
            _agree(out, recipe)
            index = _write(plan, recipe, out, names, jobs, progress)
            kept = set(index.keys.tolist())
            skipped = sorted(str(s.path) for s in folder.sources if s.key.encode() not in kept)
            unread = [str(path) for path in folder.unread]
            (out / "skipped.txt").unlink(missing_ok=True)  # of an earlier call
            if skipped or unread:
                text = "".join(f"{path}\n" for path in sorted(skipped + unread))
                (out / "skipped.txt").write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(
            f"cannot write shards: {error.strerror}: '{error.filename or out}'; free space or choose another folder"
        ) from None
    return Written(len(plan), len(index), len(names), skipped, folder.left_out, unread)


def is_whole(out: Path) -> bool:
    """Whether `write_shards` has finished in `out`, its last file being the index, and all shards are still there."""
    try:
        number = int((out / NUMBER).read_text())
    except (OSError, ValueError):
        return False
    return (out / INDEX).is_file() and len(list(out.glob("*.tar"))) == number


def _survey(images: Path, out: Path, nested: bool) -> ImageFolder:
    if out.resolve().is_relative_to(images.resolve()):
        raise UserError(
            f"'{out}' lies inside the image folder '{images}', where it would count as a class; write elsewhere"
        )
    try:
        return survey(images, nested)
    except OSError as error:
        raise UserError(f"'{error.filename or images}' cannot be read ({error.strerror}); mend or remove it") from None


Part = tuple[Path, list[Source]]  # a shard and the images that go into it


def _plan(sources: list[Source], recipe: Recipe, out: Path) -> list[Part]:
    shuffled = [sources[i] for i in permutation(len(sources), recipe.shuffle_seed).tolist()]
    each = recipe.samples_per_shard
    starts = range(0, len(sources), each)
    return [(out / f"{number:06d}.tar", shuffled[start : start + each]) for number, start in enumerate(starts)]


def _write(plan: list[Part], recipe: Recipe, out: Path, names: list[str], jobs: int | None, progress: bool) -> Index:
    """Write the shards that are not there, check those whose images were touched since, and index all."""
    for left in out.glob(".*.tar.*.part"):  # by a call that was killed
        left.unlink()
    encoding = {"resize": recipe.resize, "quality": recipe.quality}
    finished = [part for part in plan if part[0].exists()]
    # A file that was changed, or moved to where it is, after the shard was finished is newer than the shard.
    touched = [part for part in finished if _newest(part) > part[0].stat().st_mtime_ns]
    todo = [part for part in plan if part not in finished]
    map_in_processes(partial(_write_shard, **encoding), todo, jobs, "shards", progress)
    same = map_in_processes(partial(_is_still, **encoding), touched, jobs, "check", progress and bool(touched))
    if changed := [path for (path, _), equal in zip(touched, same) if not equal]:
        raise UserError(
            f"'{out}' holds shards of other images ({len(changed)} of its shards would be written otherwise now, the "
            f"first is '{changed[0].name}'); choose another folder or remove it"
        )
    write_text(out / NAMES, "".join(f"{name}\n" for name in names))
    write_text(out / NUMBER, f"{len(plan)}\n")
    return build_index([str(path) for path, _ in plan], out / INDEX, jobs, progress)


def _names(classnames: Path | None, folders: list[str]) -> list[str]:
    if classnames is None:
        return folders
    names = read_names(Path(classnames), "--classnames")
    if len(names) != len(folders):
        raise UserError(
            f"--classnames: '{classnames}' has {len(names)} names for {len(folders)} class folders; "
            "write one a line, in sorted folder order"
        )
    return names


def _agree(out: Path, recipe: Recipe) -> None:
    record = out / RECORD
    try:
        made = json.loads(record.read_text())
    except FileNotFoundError:
        if any(out.glob("*.tar")):
            raise UserError(f"'{out}' holds shards that were not written here; choose another folder") from None
        if theirs := [name for name in WRITTEN if os.path.lexists(out / name)]:
            raise UserError(
                f"'{out}' holds {', '.join(theirs)}, which were not written here; choose another folder"
            ) from None
        write_text(record, json.dumps(asdict(recipe), indent=1) + "\n")
        return
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict):
        raise UserError(f"'{record}' is damaged; remove '{out}' and write the shards anew")
    differ = [f"{k} was {made.get(k)}, now {v}" for k, v in asdict(recipe).items() if made.get(k) != v]
    if differ:
        raise UserError(
            f"'{out}' holds shards made otherwise ({'; '.join(differ)}); choose another folder or remove it"
        )


def _newest(part: Part) -> int:
    """When the newest of a shard's images was changed, in nanoseconds."""
    return max(source.changed for source in part[1])


def _write_shard(part: Part, resize: int | None, quality: int) -> None:
    """Write a shard. It is then as old as its newest image, so that an image changed later is newer than the shard."""
    path, sources = part
    with publish(path) as temporary:
        _fill(temporary, path, sources, resize, quality)
        os.utime(temporary, ns=(_newest(part), _newest(part)))


def _is_still(part: Part, resize: int | None, quality: int) -> bool:
    """Whether the shard that is there is what its images give now; then it is as old as its newest image again."""
    path, sources = part
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".check-") as scratch:
        now = Path(scratch) / path.name
        _fill(now, path, sources, resize, quality)
        same = filecmp.cmp(now, path, shallow=False)
    if same:
        os.utime(path, ns=(_newest(part), _newest(part)))
    return same


def _fill(tar_path: Path, path: Path, sources: list[Source], resize: int | None, quality: int) -> None:
    written = 0
    # webdataset's TarWriter leaves the order of a sample's members and the owner to its own defaults; plain USTAR with
    # fixed fields does not.
    with tarfile.open(tar_path, "x", format=tarfile.USTAR_FORMAT) as tar:
        for source in sources:
            try:
                extension, data = _image(source.path, resize, quality)
            except DecodeError:
                continue
            caption = source.path.with_suffix(".txt")
            _put(tar, f"{source.key}.{extension}", data)
            _put(tar, f"{source.key}.cls", str(source.label).encode())
            if caption.is_file():
                _put(tar, f"{source.key}.txt", caption.read_bytes())
            written += 1
    if not written:
        raise UserError(
            f"none of the {len(sources)} images meant for '{path}' can be read ('{sources[0].path}', ...); "
            "repair or remove them"
        )


def _image(path: Path, resize: int | None, quality: int) -> tuple[str, bytes]:
    data = path.read_bytes()
    extension = path.suffix[1:].lower().replace("jpeg", "jpg")
    if resize is None:
        return extension, data
    image = decode(data)
    shorter = min(image.size)
    if shorter <= resize:
        return extension, data
    size = tuple(resize if side == shorter else int(resize * side / shorter) for side in image.size)
    encoded = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=quality)
    return "jpg", encoded.getvalue()


def _put(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(data), 0o644, 0
    tar.addfile(member, io.BytesIO(data))
