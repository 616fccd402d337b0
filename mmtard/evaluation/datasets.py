"""Datasets by name: where they lie, their class names and prompts, and what is particular to them.

Imports no torch, so that a missing dataset is answered at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import Data, section
from ..data.paths import expand_shards, is_remote
from ..errors import UserError, unknown_name
from .corruptions import corruption_folders

SPLITS = ("test", "val", "validation")
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
# A folder that `mmtard shards` is often told to write to. It says nothing of what is in it, so the split stays.
NAMELESS = "shards"

# CLIP's prompts name EuroSAT's classes in words (Radford et al., 2021); the dataset's own names are its folders'.
EUROSAT = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}


@dataclass(frozen=True)
class DatasetInfo:
    """A dataset with a name of its own.

    spellings: of its folder, beside `name`; case, `wds_`, `vtab-` and punctuation do not count in either.
    """

    name: str
    spellings: tuple[str, ...] = ()
    native: bool = False  # perturbed at its stored size by the protocols that cite it
    imagenet: bool = False  # takes ImageNet's prompts
    thousand: bool = False  # has ImageNet's 1000 classes
    corrupted: bool = False  # lies as CORRUPTION/SEVERITY, each a dataset
    names: dict[str, str] = field(default_factory=dict, hash=False)  # stored class name -> the one in prompts


KNOWN = (
    DatasetInfo("Caltech101"),
    DatasetInfo("Cars", ("stanfordcars",)),
    DatasetInfo("CIFAR10", native=True),
    DatasetInfo("CIFAR100", native=True),
    DatasetInfo("DTD"),
    DatasetInfo("EuroSAT", names=EUROSAT),
    DatasetInfo("FGVC", ("fgvcaircraft", "aircraft")),
    DatasetInfo("Flowers", ("flowers102", "oxfordflowers102")),
    DatasetInfo("PCAM"),
    DatasetInfo("Pets", ("oxfordpets", "oxfordiiitpet")),
    DatasetInfo("STL-10", native=True),
    DatasetInfo("ImageNet", ("imagenet1k", "imagenet1kwds"), imagenet=True, thousand=True),
    DatasetInfo("ImageNet-V2", imagenet=True, thousand=True),
    DatasetInfo("ImageNet-A", imagenet=True),
    DatasetInfo("ImageNet-R", imagenet=True),
    DatasetInfo("ImageNet-Sketch", imagenet=True, thousand=True),
    DatasetInfo("ImageNet-C", imagenet=True, thousand=True, corrupted=True),
)
PLAIN = DatasetInfo("")  # nothing particular


def plain(name: str) -> str:
    """A spelling without what differs between publishers: `wds_vtab-cifar10` and `CIFAR-10` -> cifar10."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^(wds[_/-])?(vtab[_/-])?", "", name.lower()))


def known(name: str) -> DatasetInfo | None:
    """The dataset that a folder's name, or a user, means."""
    return next((k for k in KNOWN if plain(name) in map(plain, (k.name, *k.spellings))), None)


@dataclass(frozen=True)
class DatasetSource:
    """A dataset that was found.

    data: its shards and the files beside them. folder: of its images where there are no shards yet, one sub-folder a
    class. captions: it is measured by retrieval.
    """

    name: str
    data: Data
    kind: DatasetInfo = PLAIN
    folder: Path | None = None
    captions: bool = False
    corruption: tuple[str, int] | None = None  # of ImageNet-C: the corruption and its severity


def find_datasets(
    root: str,
    wanted: list[str] | None = None,
    index: str | None = None,
    classnames: str | None = None,
    reading: dict | None = None,
) -> list[DatasetSource]:
    """The datasets at or below ROOT: ROOT itself, else ROOT/[wds/][vtab/]NAME[/test]; `wanted` names some of them.

    ROOT may be a pattern of shards. A dataset is called after its folder, not `test` or `val` but the one above
    (`shards/test` says nothing without its split, and is called so). Each corruption and severity of ImageNet-C is a
    dataset. index, classnames: files of the one dataset that ROOT is. reading: settings of the section `data` that
    say how every dataset is read (allow_pipe, label_key, caption_key). Raises UserError naming what is missing.
    """
    own = _sources(root, index, classnames)
    if not own and (index or classnames):
        raise UserError(
            f"--{'index' if index else 'classnames'}: belongs to one dataset, '{root}' holds several; "
            "name the dataset's folder in --data"
        )
    found = own or [source for path in _below(Path(root)) for source in _sources(str(path))]
    if not found:
        raise UserError(
            f"--data: '{root}' is no dataset and holds none; "
            "give a folder of shards, of class folders, or of datasets (NAME/test/0.tar)"
        )
    names = [s.name for s in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--data: '{root}' holds the dataset {name} twice; name its folder in --data")
    found = [replace(source, data=source.data.model_copy(update=reading or {})) for source in found]
    if wanted is None:
        return found
    picked = [source for name in dict.fromkeys(wanted) for source in _pick(found, name, root)]
    return list({source.name: source for source in picked}.values())


def _pick(found: list[DatasetSource], name: str, root: str) -> list[DatasetSource]:
    of_kind = known(name)
    for source in found:
        if source.name == (of_kind.name if of_kind else name) or plain(source.name) == plain(name):
            return [source]
    if of_kind is not None and of_kind.corrupted and (all_ := [source for source in found if source.kind == of_kind]):
        return all_
    raise unknown_name(f"dataset in '{root}'", name, [s.name for s in found])


def _sources(where: str, index: str | None = None, classnames: str | None = None) -> list[DatasetSource]:
    """The dataset that a folder is, or those of a folder of corruptions; [] where it is neither."""
    top = Path(where)
    kind = known(top.resolve().name) if top.is_dir() else None
    if kind is None or not kind.corrupted:
        source = _source(where, index, classnames)
        return [source] if source else []
    classnames = classnames or _first([top], "classnames.txt")
    return [
        replace(found, name=f"{kind.name}/{corruption}/{severity}", kind=kind, corruption=(corruption, severity))
        for corruption, severity, folder in corruption_folders(top)
        if (found := _source(str(folder), classnames=classnames))
    ]


def _below(root: Path) -> list[Path]:
    """Folders that may be datasets: children, looking through `wds` and `vtab`."""
    paths = []
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path.is_dir() and not path.name.startswith("."):
            paths += _below(path) if path.name in ("wds", "vtab") else [path]
    return paths


def _source(where: str, index: str | None = None, classnames: str | None = None) -> DatasetSource | None:
    if is_remote(where):
        name = _remote_name(where, index)
        kind = known(name)
        return DatasetSource(
            kind.name if kind else name, section(Data, shards=where, index=index, classnames=classnames), kind or PLAIN
        )
    shards, folder, top = where, None, Path(where)
    if top.is_dir():
        at = next(
            (p for p in (*(top / s for s in SPLITS), top) if p.is_dir() and (any(p.glob("*.tar")) or _has_classes(p))),
            None,
        )
        if at is None:
            return None
        shards, folder = str(at), None if any(at.glob("*.tar")) else at
    else:
        expand_shards(where)  # names what is missing
        at = top = top.parent
    top, at = top.resolve(), at.resolve()
    name = _name(top.parent.name if top.name in SPLITS and top.parent.name else top.name, at.name)
    kind = known(name)
    beside = [at, at.parent] if at.name in SPLITS else [at]
    prompts, described = _first(beside, "zeroshot_classification_templates.txt"), _first(beside, "dataset_type.txt")
    data = section(
        Data,
        shards=shards,
        index=index,
        classnames=classnames or _first(beside, "classnames.txt"),
        **({"templates": prompts} if prompts else {}),
    )
    kind_of_data = Path(described).read_bytes().decode("utf-8", "replace").strip().lower() if described else ""
    retrieves = kind_of_data == "retrieval"
    return DatasetSource(kind.name if kind else name, data, kind or PLAIN, folder, retrieves)


def _name(folder: str, split: str) -> str:
    """What a dataset in folder/split is called."""
    return f"{folder}/{split}" if folder == NAMELESS and split in SPLITS else folder


def _remote_name(where: str, index: str | None) -> str:
    """What shards behind an opener are called.

    After their folder, else (on a host, `{0..9}.tar`) their files, else their index.
    A split and the revision of a Hugging Face repository (`NAME/resolve/main/test/0.tar`) are no names.
    """
    url = next(iter(re.findall(r"[^\s'\"|]+\.tar\b", where)), "")
    *folders, file = re.sub(r"^[\w+.-]+:(//[^/]*)?", "", re.sub(r"/resolve/[^/]+/", "/", url)).split("/")
    stem = re.sub(r"[-_.]*(\{.*|\d*\.tar.*)$", "", file)
    named = Path(index).stem if index else ""
    name = next(
        (name for name in (*reversed([f for f in folders if f not in SPLITS]), stem, named) if name.strip(".")),
        "remote",
    )
    return _name(name, folders[-1] if folders else "")


def _has_classes(folder: Path) -> bool:
    """Whether images lie in a sub-folder, as in one for each class."""
    return any(
        p.is_dir() and any(f.suffix.lower() in IMAGES for f in p.iterdir())
        for p in folder.iterdir()
        if not p.name.startswith(".")
    )


def _first(folders: list[Path], name: str) -> str | None:
    return next((str(f / name) for f in folders if (f / name).is_file()), None)


def class_names(source: DatasetSource, stored: list[str]) -> list[str]:
    """The names as prompts have them: `stored`, with the dataset's rewritings."""
    rewritten = {plain(k): v for k, v in source.kind.names.items()}
    return [rewritten.get(plain(name), name) for name in stored]
