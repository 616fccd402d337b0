"""Commands that prepare data: shards, index."""

from __future__ import annotations

from pathlib import Path

from ..config.argument_types import jpeg_quality, natural, path, path_text, positive
from ..data.paths import check_openers, default_index, expand_shards
from ..errors import UserError
from .command import add_command


def add(commands) -> None:
    """Add the commands of this file to the command line."""
    _add_shards(commands)
    _add_index(commands)


def _add_shards(commands) -> None:
    p = add_command(
        commands,
        "shards",
        _shards,
        "Write WebDataset shards from an image folder with one sub-folder a class, and index them.",
        "mmtard shards imagenet/train shards/train --resize 256",
    )
    p.add_argument("images", type=path, metavar="IMAGES", help="folder with one sub-folder of images a class")
    p.add_argument("out", type=path, metavar="OUT")
    p.add_argument("--samples-per-shard", type=positive, default=1000, metavar="N", help="default 1000")
    p.add_argument(
        "--resize", type=positive, metavar="PX", help="shorter side; re-encodes as JPEG. Default: files as they are"
    )
    p.add_argument(
        "--quality", type=jpeg_quality, default=95, metavar="Q", help="JPEG quality when re-encoding (default 95)"
    )
    p.add_argument(
        "--classnames",
        type=path,
        metavar="FILE",
        help="one name a line, in the order of the sorted sub-folders (as numbers where all are); default: their names",
    )
    p.add_argument(
        "--nested", action="store_true", help="each folder at any depth that holds images is a class, named by its path"
    )
    p.add_argument("--jobs", type=positive, metavar="N", help="processes; default: one a core")
    p.add_argument(
        "--shuffle-seed", type=natural, default=0, metavar="S", help="order of the images over the shards (default 0)"
    )


def _shards(args) -> None:
    from ..data.shard_writer import write_shards

    written = write_shards(
        args.images,
        args.out,
        samples_per_shard=args.samples_per_shard,
        resize=args.resize,
        quality=args.quality,
        jobs=args.jobs,
        shuffle_seed=args.shuffle_seed,
        classnames=args.classnames,
        nested=args.nested,
    )
    print(written)


def _add_index(commands) -> None:
    p = add_command(
        commands,
        "index",
        _index,
        "Index shards, so that training can read any sample of them.",
        "mmtard index 'shards/train/{000000..001281}.tar'",
    )
    p.add_argument(
        "shards",
        nargs="+",
        type=path_text,
        metavar="SHARDS",
        help="a folder, a brace pattern, or openers such as pipe:...",
    )
    p.add_argument(
        "--allow-pipe", action="store_true", help="let SHARDS name pipe: commands, which run on this machine"
    )
    p.add_argument("--label-key", metavar="KEY", help="read labels from this key of .json members, not from .cls")
    p.add_argument("--caption-key", metavar="KEY", help="read captions from this key of .json members, not from .txt")
    p.add_argument(
        "--check", action="store_true", help="read every byte of the shards and compare them with the index they have"
    )
    p.set_defaults(flags={"data.shards": "SHARDS", "data.index": "--out"})
    p.add_argument("--out", type=path, metavar="FILE", help="default: beside the shards")
    p.add_argument("--jobs", type=positive, metavar="N", help="processes; default: one a core")


def _index(args) -> None:
    shards = expand_shards(args.shards)
    check_openers(shards, args.allow_pipe)
    from ..config import Data
    from ..data.dataset import open_dataset
    from ..data.index import Keys
    from ..data.indexing import build_index, check_shards

    keys = Keys(args.label_key, args.caption_key)
    out = args.out or default_index(shards, keys.label, keys.caption)
    if args.check:
        _require_index(out, keys)
        data = Data(shards=shards, index=str(out), label_key=keys.label, caption_key=keys.caption, allow_pipe=True)
        index = open_dataset(data, look_again=False).index
        check_shards(index, shards, list(range(len(shards))), out, images=True, jobs=args.jobs)
    else:
        index = build_index(shards, out, args.jobs, keys=keys)
    print(f"{out}: {index.summary()}, fingerprint {index.fingerprint[:16]}" + (", unchanged" if args.check else ""))


def _require_index(path: Path, keys) -> None:
    """Raise UserError where shards have no index to be compared with: one made now would fit whatever they hold."""
    from ..data.index import load_index

    try:
        made_with = load_index(path).read_by
    except FileNotFoundError:
        raise UserError(
            f"--check: there is no index at '{path}' to compare with; run `mmtard index` without --check first"
        ) from None
    if made_with != keys:
        raise UserError(
            f"--check: the index at '{path}' was made with other keys of .json members; give the same --label-key and "
            "--caption-key"
        )
