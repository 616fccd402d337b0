"""`mmtard`: one thin subcommand for each thing a user does. Heavy imports wait until the arguments are known to be good."""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from . import __version__, config as settings, history, trackers
from .errors import RunError, UserError
from .preempt import Interruption

PROGRAM = "mmtard"


def main(argv: list[str] | None = None) -> int:
    """Run a command line; the exit status: 0 done, 1 the run failed, 2 the user's to mend, 75 start it again to go on."""
    args = _parse(argv)
    try:
        return args.run(args) or 0
    except UserError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    top = parser()
    args, left = top.parse_known_args(argv)
    # argparse takes all settings at once, before the first flag; those after a flag are settings, too.
    if left and not (hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in left)):
        top.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        args.overrides += left
    return args


def _fail(message: str, status: int) -> int:
    rank = os.environ.get("RANK", "0")
    print(f"{PROGRAM}{f' (rank {rank})' if rank != '0' else ''}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def parser() -> argparse.ArgumentParser:
    """The whole command line: every command with its arguments and an example."""
    top = argparse.ArgumentParser(prog=PROGRAM, description="Train and measure vision-language models that resist adversarial images.")
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    # The deepspeed launcher puts this before the arguments of every command it starts; the rank comes from the environment.
    top.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run, help: str, example: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=help, description=help, epilog=f"example: {example}", formatter_class=argparse.RawDescriptionHelpFormatter)
        p.set_defaults(run=run)
        return p

    p = command("shards", _shards, "Write WebDataset shards from an image folder with one sub-folder a class, and index them.",
                "mmtard shards imagenet/train shards/train --resize 256")
    p.add_argument("images", type=Path, metavar="IMAGES", help="folder with one sub-folder of images a class")
    p.add_argument("out", type=Path, metavar="OUT")
    p.add_argument("--samples-per-shard", type=_positive, default=1000, metavar="N", help="default 1000")
    p.add_argument("--resize", type=_positive, metavar="PX", help="shorter side; re-encodes as JPEG. Default: files as they are")
    p.add_argument("--quality", type=_quality, default=95, metavar="Q", help="JPEG quality when re-encoding (default 95)")
    p.add_argument("--classnames", type=Path, metavar="FILE", help="one name a line, in the order of the sorted sub-folders "
                   "(as numbers where all are); default: their names")
    p.add_argument("--jobs", type=_positive, metavar="N", help="processes; default: one a core")
    p.add_argument("--shuffle-seed", type=int, default=0, metavar="S", help="order of the images over the shards (default 0)")

    p = command("index", _index, "Index shards, so that training can read any sample of them.", "mmtard index 'shards/train/{000000..001281}.tar'")
    p.add_argument("shards", nargs="+", metavar="SHARDS", help="a folder, a brace pattern, or openers such as pipe:...")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: beside the shards")
    p.add_argument("--jobs", type=_positive, metavar="N", help="processes; default: one a core")

    p = command("train", _train, "Train, or go on training, the run of a configuration.",
                "mmtard train configs/vitb32_mmtard.yaml run_dir=runs/b32 data.shards=shards/train\n"
                "         torchrun --nproc_per_node 8 -m mmtard train configs/vitb32_mmtard.yaml")
    _config_arguments(p)

    p = command("cache", _cache, "Store the embeddings of the teachers that see clean images alone, so that training need not run them (teachers.NAME.stored).",
                "mmtard cache configs/vitb32_mmtard.yaml data.shards=shards/train\n"
                "         torchrun --nproc_per_node 8 -m mmtard cache configs/vitb32_mmtard.yaml")
    _config_arguments(p)

    p = command("config", _config, "Print the resolved configuration, or what is wrong with it.", "mmtard config configs/vitb32_mmtard.yaml train.lr=1e-5")
    p.add_argument("--memory", action="store_true", help="instead, a table of what the run takes of each GPU's memory")
    p.add_argument("--world", type=_positive, metavar="N", help="GPUs for --memory; default: this launch's")
    p.add_argument("--may-start", choices=("now", "again"), help="also fail when the `resume` settings do not let the run be started; "
                   "again: nor when this job's own start failed, was stopped by a person, or ended before it was noted in the run's folder")
    _config_arguments(p)

    p = command("preflight", _preflight, "Check, on the ranks of this launch, what a run needs: PASS or FAIL a line, status 1 on any FAIL.",
                "mmtard preflight configs/vitb32_mmtard.yaml data.shards=shards/train")
    _config_arguments(p)

    p = command("runs", _runs, "A table of the runs below a folder: state, step, speed, checkpoints, restarts, robustness.", "mmtard runs runs")
    p.add_argument("folder", type=Path, metavar="DIR")

    p = command("evaluate", _evaluate, "How robust a model is: clean and under attack, with intervals and checks of the attack, by a named protocol.",
                "mmtard evaluate runs/b32 --data shards/imagenet/val\n"
                "         mmtard evaluate openai --arch ViT-B-32 --protocol fare --data clip_benchmark --datasets cifar10 pets --eps 1/255 2/255")
    _evaluation_arguments(p)

    p = command("compare", _compare, "Paired differences of two evaluations on the same samples, with McNemar's test.",
                "mmtard compare runs/a/evaluations/quick-ImageNet-linf-2_255-0c1d2e3f runs/b/evaluations/quick-ImageNet-linf-2_255-0c1d2e3f")
    p.add_argument("a", type=Path, metavar="A", help="results.json, or the folder of one")
    p.add_argument("b", type=Path, metavar="B")

    p = command("report", _report, "One HTML page of runs and models: training, accuracy under attack, images, health, commands; figures as PNGs.",
                "mmtard report runs/b32 runs/baseline --out reports/b32")
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or a results.json or folder of them of a model that is no run")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--images", type=_natural, default=6, metavar="N", help="samples of each model that are attacked for the page, on the CPU (default 6; 0: none)")

    p = command("export", _export, "Write a run as a folder that open_clip loads, with the image tower alone and a model card.", "mmtard export runs/b32 exported/b32")
    p.add_argument("run_folder", type=Path, metavar="RUN", help="run or checkpoint folder")
    p.add_argument("out", type=Path, metavar="OUT")
    p.add_argument("--hf", action="store_true", help="also OUT/transformers, which transformers' CLIPModel loads")
    p.add_argument("--ema", action="store_true", help="the moving average of the weights that train.ema kept")
    p.add_argument("--merge-lora", action="store_true", help="fold a run's adapter into the weights; without it, OUT is a peft folder")
    return top


def _config_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file, e.g. train.lr=1e-5")


def _evaluation_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="run or checkpoint folder, exported folder, weights file, hf-hub:..., or an open_clip tag")
    p.add_argument("--arch", help="open_clip architecture or .json, when MODEL is a tag or a file")
    p.add_argument("--text", help="source of the text tower, when MODEL is an image-tower file")
    p.add_argument("--ema", action="store_true", help="the moving average of a run's weights that train.ema kept")
    p.add_argument("--quick-gelu", choices=("true", "false"), help="activation, when MODEL is a file that does not say")
    p.add_argument("--protocol", metavar="NAME", default="quick", help="fare, tecoa, robustbench or quick (default); what follows changes it")
    p.add_argument("--data", required=True, metavar="ROOT", help="a dataset (shards, or images in class folders), or a folder of them as CLIP_benchmark lays them out")
    p.add_argument("--datasets", nargs="+", metavar="NAME", help="of those in ROOT; default: all")
    p.add_argument("--index", metavar="FILE", help="default: beside the shards")
    p.add_argument("--classnames", metavar="FILE", help="default: classnames.txt beside the shards or above them")
    p.add_argument("--templates", metavar="FILE", help="prompts, one a line, with {} or {c} for the name, or one prompt; default: the dataset's own")
    p.add_argument("--norm", choices=("linf", "l2"))
    p.add_argument("--eps", type=_fraction, nargs="+", metavar="E", help="radii in units of [0,1], such as 2/255 4/255")
    p.add_argument("--attacks", nargs="+", metavar="NAME", help="in their order: pgd, apgd-ce, apgd-dlr, apgd-t, fab-t, square, transfer")
    p.add_argument("--iters", type=_positive, metavar="K", help="iterations of each gradient attack")
    p.add_argument("--restarts", type=_positive, metavar="R")
    p.add_argument("--transfer-from", metavar="MODEL2", help="also the `transfer` attack, which follows this model's gradients")
    p.add_argument("--transfer-arch", metavar="ARCH", help="when MODEL2 is a tag or a file")
    p.add_argument("--n-samples", type=_positive_or("all"), metavar="N|all", help="size of the stratified sample that is attacked")
    p.add_argument("--seed", type=_natural, metavar="S", help="of the sample and the attacks' starts")
    p.add_argument("--perturb-at", choices=("native", "input"), help="the images' stored size, or the tower's; default: the usual one of each dataset")
    p.add_argument("--sanity", action="store_true", help="also the health checks that need attacks of their own; of what is measured already, these alone")
    p.add_argument("--batch-size", type=_positive_or("auto"), metavar="auto|B", help="images a rank takes at once (default auto; halved when the GPU's memory is too small)")
    p.add_argument("--workers", type=_natural, default=2, metavar="N", help="loader processes a rank (default 2)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--out", type=Path, metavar="DIR", help="for results.json; default: a folder named by the settings in the run's evaluations/, or in ./evaluations")


@contextmanager
def _imports() -> Iterator[None]:
    """Around the heavy imports: what they make stays for good, and the collector, walking it again and again, takes a third of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _natural(text: str) -> int:
    return _at_least(text, 0)


def _positive_or(word: str):
    def parse(text: str) -> int | str:
        return text if text == word else _positive(text)

    return parse


def _quality(text: str) -> int:
    if not 1 <= _at_least(text, 1) <= 100:
        raise argparse.ArgumentTypeError(f"'{text}' is not a JPEG quality; give 1 to 100")
    return int(text)


def _at_least(text: str, least: int) -> int:
    if not text.lstrip("-").isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
    return int(text)


def _fraction(text: str):
    try:
        value = settings.parse_fraction(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"'{text}' is negative")
    return value


# ---------------------------------------------------------------- the commands


def _config(args) -> None:
    config = settings.load(args.config, args.overrides)
    if args.may_start:
        _may_start(config, again=args.may_start == "again")
    if args.memory:
        from . import memory

        return memory.show(config, args.world or settings.world_size_from_env())
    print(settings.dump(config), end="")


def _ready(args) -> settings.Config:
    """The configuration of a launch, and that its ranks and shards fit it."""
    config = settings.load(args.config, args.overrides)
    settings.check_world(config, settings.world_size_from_env())
    settings.expand_shards(config.data.shards)
    trackers.check(config.log)
    if config.engine.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would take a GPU that is there
    return config


def _may_start(config: settings.Config, again: bool = False) -> None:
    run = Path(config.run_dir)
    refused = history.refusal(run, config.resume) or (history.refusal_of_job(run) if again else None)
    if refused:
        raise RunError(f"'{config.run_dir}': {refused}")


def _train(args) -> int:
    config = _ready(args)
    _may_start(config)
    with Interruption() as interruption:  # from here on: importing torch takes long enough to be interrupted
        with _imports():
            from .train import train
        return train(config, interruption)


def _cache(args) -> None:
    config = _ready(args)
    with Interruption() as interruption:
        from .cache import cache

        cache(config, interruption)


def _preflight(args) -> int:
    config = _ready(args)
    with _imports():
        from .preflight import preflight
    return preflight(config)


def _runs(args) -> None:
    from .runs import show

    show(args.folder)


def _evaluate(args) -> int:
    with Interruption() as interruption:
        return _measure(args, interruption)


def _measure(args, interruption: Interruption) -> int:
    from .evaluate import datasets, request

    gelu = None if args.quick_gelu is None else args.quick_gelu == "true"
    model = settings.Model(arch=args.arch, weights=args.model, text=args.text, quick_gelu=gelu, ema=args.ema)
    transfer = settings.Model(arch=args.transfer_arch, weights=args.transfer_from) if args.transfer_from else None
    n_samples, batch_size = (None if n in ("all", "auto") else n for n in (args.n_samples, args.batch_size))
    protocol = request.protocol(
        args.protocol, args.eps, transfer is not None, args.n_samples == "all", n_samples=n_samples, norm=args.norm, iters=args.iters,
        restarts=args.restarts, seed=args.seed, perturb_at=args.perturb_at, attacks=args.attacks and tuple(args.attacks),
    )  # fmt: skip
    sources = datasets.find(args.data, args.datasets, args.index, args.classnames)
    with _imports():
        from . import parallel
        from .data import templates
        from .evaluate import evaluation, health, table
    if args.templates:
        protocol = replace(protocol, templates=tuple(templates(settings.Data(shards=args.data, templates=args.templates))))
    out = args.out or request.default_out(model, protocol, sources, args.data, batch_size=batch_size, transfer=args.transfer_from)
    asked = request.Evaluation(model, sources, protocol, out, transfer, batch_size, args.workers, args.sanity)
    with parallel.group(args.device) as ranks:
        results = evaluation.evaluate(asked, ranks, interruption=interruption)
        if ranks.first:
            table.show(results)
    return int(any(health.failed(dataset["health"]) for dataset in results["datasets"]))


def _compare(args) -> None:
    from .evaluate import compare

    compare.show(compare.compare(args.a, args.b), args.a, args.b)


def _report(args) -> None:
    for run in args.runs:
        if not run.exists():
            raise UserError(f"'{run}' does not exist; give a run's folder, or a results.json or its folder")
    from .report import report

    print(report(args.runs, args.out, args.images, command=shlex.join(sys.argv)))


def _export(args) -> None:
    from .export import export

    for path in export(settings.Model(weights=str(args.run_folder), ema=args.ema), args.out, hf=args.hf, merge_lora=args.merge_lora):
        print(path)


def _index(args) -> None:
    shards = settings.expand_shards(args.shards)
    from .data import build_index, default_index

    out = args.out or default_index(shards)
    index = build_index(shards, out, **({"jobs": args.jobs} if args.jobs else {}))
    print(f"{out}: {len(index)} samples in {len(shards)} shards, fingerprint {index.fingerprint[:16]}")


def _shards(args) -> None:
    from .data import write_shards

    written = write_shards(
        args.images, args.out, samples_per_shard=args.samples_per_shard, resize=args.resize, quality=args.quality,
        jobs=args.jobs, shuffle_seed=args.shuffle_seed, classnames=args.classnames,
    )
    print(written)
