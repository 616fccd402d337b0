"""An image folder written as WebDataset shards: the same bytes from the same images, whatever the number of processes."""

import hashlib
import io
import json
import re
import tarfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from ..errors import UserError
from ..files import exclusive, publish
from ..seeding import permutation
from .images import DecodeError, decode
from .index import EXTENSIONS
from .indexing import build_index
from .worker_pool import map_in_processes

RECORD = "shards.json"


@dataclass(frozen=True)
class Recipe:
    """What decides the shards' bytes besides the images."""

    samples_per_shard: int
    resize: int | None
    quality: int
    shuffle_seed: int
    images_sha256: str


@dataclass(frozen=True)
class Source:
    path: Path
    label: int
    key: str


@dataclass(frozen=True)
class Written:
    """What a folder of shards holds; `skipped` are the unreadable images, as paths."""

    shards: int
    samples: int
    classes: int
    skipped: list[str]

    def __str__(self) -> str:
        left_out = f"; {len(self.skipped)} unreadable images left out, see skipped.txt" if self.skipped else ""
        return f"{self.samples} samples of {self.classes} classes in {self.shards} shards{left_out}"


def write_shards(
    images: Path, out: Path, *, samples_per_shard: int = 1000, resize: int | None = None, quality: int = 95, jobs: int | None = None,
    shuffle_seed: int = 0, classnames: Path | None = None, progress: bool = True,
) -> Written:  # fmt: skip
    """Write `images`/<class>/*.jpg|jpeg|png|webp as `out`/000000.tar ..., with classnames.txt, nshards.txt and the index.

    Labels count the class folders in sorted order, as numbers where all are numbers (ImageNet-V2's 0 ... 999); `classnames` is a file of
    one name a line in that order (default: the folder names).
    `resize` re-encodes images whose shorter side is longer than that as JPEG of `quality`; all else is copied byte for byte. With
    `resize`, unreadable images are left out and listed in skipped.txt. A `name.txt` beside an image becomes its caption. An interrupted
    call may be repeated: finished shards stay. Raises UserError when `out` holds shards of other images or settings.
    """
    images, out = Path(images), Path(out)
    if samples_per_shard < 1:
        raise UserError(f"samples per shard: {samples_per_shard} is not a number of samples; use 1 or more")
    if out.resolve().is_relative_to(images.resolve()):
        raise UserError(
            f"'{out}' lies inside the image folder '{images}', where it would count as a class; write elsewhere"
        )
    try:
        folders, sources, digest = _survey(images)
    except OSError as error:
        raise UserError(f"'{error.filename or images}' cannot be read ({error.strerror}); mend or remove it") from None
    names = _names(classnames, folders)
    shuffled = [sources[i] for i in permutation(len(sources), shuffle_seed).tolist()]
    plan = [
        (out / f"{n:06d}.tar", shuffled[i : i + samples_per_shard])
        for n, i in enumerate(range(0, len(sources), samples_per_shard))
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out / ".writing"):
            _agree(out, Recipe(samples_per_shard, resize, quality, shuffle_seed, digest))
            for left in out.glob(".*.tar.*.part"):  # by a call that was killed
                left.unlink()
            todo = [part for part in plan if not part[0].exists()]
            map_in_processes(partial(_write_shard, resize=resize, quality=quality), todo, jobs, "shards", progress)
            (out / "classnames.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
            (out / "nshards.txt").write_text(f"{len(plan)}\n")
            index = build_index([str(path) for path, _ in plan], out / "mmtard-index.npz", jobs, progress)
            kept = set(index.keys.tolist())
            skipped = sorted(str(s.path) for s in sources if s.key.encode() not in kept)
            if skipped:
                (out / "skipped.txt").write_text(
                    "".join(f"{path}\n" for path in skipped), encoding="utf-8", errors="surrogateescape"
                )
    except OSError as error:
        raise UserError(
            f"cannot write shards: {error.strerror}: '{error.filename or out}'; free space or choose another folder"
        ) from None
    return Written(len(plan), len(index), len(names), skipped)


def _survey(images: Path) -> tuple[list[str], list[Source], str]:
    """The class folders, every image in sorted order, and a hash of their names and sizes."""
    if not images.is_dir():
        raise UserError(f"'{images}' is not a folder; give one whose sub-folders are the classes")
    folders = sorted(p.name for p in images.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UserError(f"'{images}' has no sub-folders; give a folder whose sub-folders are the classes")
    for folder in folders:
        if any("\ud800" <= c <= "\udfff" for c in folder):  # as which Python reads bytes that are no UTF-8
            raise UserError(
                f"'{images}': the class folder {folder!r} has a name that cannot be written as text; rename it"
            )
    if all(re.fullmatch("[0-9]+", name) for name in folders):
        folders.sort(key=int)
    sources, digest = [], hashlib.sha256()
    for label, folder in enumerate(folders):
        found = sorted(
            p for p in (images / folder).iterdir() if p.suffix[1:].lower() in EXTENSIONS and not p.name.startswith(".")
        )
        if not found:
            kinds = ", ".join(EXTENSIONS)
            raise UserError(
                f"class folder '{images / folder}' has no image ({kinds}); give the folder whose sub-folders are the classes, or remove it"
            )
        for path in found:
            # The number makes keys unique; dots would end them, and long or foreign names do not fit a plain tar header.
            readable = re.sub(r"[^A-Za-z0-9_-]", "_", f"{folder}-{path.stem}")[:64]
            sources.append(Source(path, label, f"{len(sources):08d}-{readable}"))
            caption = path.with_suffix(".txt")
            sizes = (path.stat().st_size, caption.stat().st_size if caption.is_file() else -1)
            digest.update(f"{folder}/{path.name}\0{sizes[0]}\0{sizes[1]}\n".encode("utf-8", "surrogateescape"))
    return folders, sources, digest.hexdigest()


def _names(classnames: Path | None, folders: list[str]) -> list[str]:
    if classnames is None:
        return folders
    try:
        names = [line.strip() for line in Path(classnames).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--classnames: cannot read '{classnames}' ({getattr(error, 'strerror', None) or error})"
        ) from None
    if len(names) != len(folders):
        raise UserError(
            f"--classnames: '{classnames}' has {len(names)} names for {len(folders)} class folders; write one a line, in sorted folder order"
        )
    return names


def _agree(out: Path, recipe: Recipe) -> None:
    record = out / RECORD
    try:
        made = json.loads(record.read_text())
    except FileNotFoundError:
        if any(out.glob("*.tar")):
            raise UserError(f"'{out}' holds shards that were not written here; choose another folder") from None
        with publish(record) as temporary:
            temporary.write_text(json.dumps(asdict(recipe), indent=1) + "\n")
        return
    except ValueError:
        raise UserError(f"'{record}' is damaged; remove '{out}' and write the shards anew") from None
    differ = [f"{k} was {made.get(k)}, now {v}" for k, v in asdict(recipe).items() if made.get(k) != v]
    if differ:
        raise UserError(
            f"'{out}' holds shards made otherwise ({'; '.join(differ)}); choose another folder or remove it"
        )


def _write_shard(part: tuple[Path, list[Source]], resize: int | None, quality: int) -> None:
    path, sources = part
    written = 0
    # webdataset's TarWriter leaves the order of a sample's members and the owner to its own defaults; plain USTAR with fixed fields does not.
    with publish(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
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
                f"none of the {len(sources)} images meant for '{path}' can be read ('{sources[0].path}', ...); repair or remove them"
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
