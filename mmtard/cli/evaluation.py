"""Commands that measure: evaluate, compare."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from .. import config as settings
from ..config.argument_types import fraction, natural, path, path_text, positive, positive_or
from ..distributed.interruption import Interruption
from ..errors import UserError
from .command import add_command, heavy_imports


def add(commands) -> None:
    """Add the commands of this file to the command line."""
    _add_evaluate(commands)
    _add_compare(commands)


def _add_evaluate(commands) -> None:
    p = add_command(
        commands,
        "evaluate",
        _evaluate,
        "How robust a model is: clean and under attack, with intervals and checks of the attack, by a named protocol.",
        "mmtard evaluate runs/b32 --data shards/imagenet/val\n"
        "         mmtard evaluate openai --arch ViT-B-32 --protocol fare --data clip_benchmark --datasets cifar10 pets",
    )
    _model_arguments(p)
    _data_arguments(p)
    _attack_arguments(p)
    _running_arguments(p)


def _model_arguments(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("the model")
    group.add_argument(
        "model",
        type=path_text,
        metavar="MODEL",
        help="run or checkpoint folder, exported folder, weights file, hf-hub:..., or an open_clip tag",
    )
    group.add_argument("--arch", type=path_text, help="open_clip architecture or .json, when MODEL is a tag or a file")
    group.add_argument("--text", type=path_text, help="source of the text tower, when MODEL is an image-tower file")
    group.add_argument("--ema", action="store_true", help="the moving average of a run's weights that train.ema kept")
    group.add_argument(
        "--quick-gelu", choices=("true", "false"), help="activation, when MODEL is a file that does not say"
    )


def _data_arguments(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("the data")
    group.add_argument(
        "--data",
        type=path_text,
        required=True,
        metavar="ROOT",
        help="a dataset (shards, or images in class folders), or a folder of them as CLIP_benchmark lays them out",
    )
    group.add_argument("--datasets", action="extend", nargs="+", metavar="NAME", help="of those in ROOT; default: all")
    group.add_argument("--index", type=path_text, metavar="FILE", help="default: beside the shards")
    group.add_argument(
        "--classnames", type=path_text, metavar="FILE", help="default: classnames.txt beside the shards or above them"
    )
    group.add_argument(
        "--templates",
        type=path_text,
        metavar="FILE",
        help="prompts, one a line, with {} or {c} for the name, or one prompt; `dataset`: each dataset's own; "
        "default: those that a run was trained with, else the dataset's own",
    )
    group.add_argument("--label-key", metavar="KEY", help="read labels from this key of .json members, not from .cls")
    group.add_argument(
        "--caption-key", metavar="KEY", help="read captions from this key of .json members, not from .txt"
    )
    group.add_argument(
        "--allow-pipe", action="store_true", help="let --data name pipe: commands, which run on this machine"
    )


def _attack_arguments(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("the attacks")
    group.add_argument(
        "--protocol",
        metavar="NAME",
        default="quick",
        help="fare, tecoa, robustbench, autoattack or quick (default); what follows changes it",
    )
    group.add_argument("--norm", choices=("linf", "l2"), help="of the perturbation; default: the protocol's")
    group.add_argument(
        "--eps",
        type=fraction,
        action="extend",
        nargs="+",
        metavar="E",
        help="radii in units of [0,1], such as 2/255 4/255",
    )
    group.add_argument(
        "--independent-radii",
        action="store_true",
        help="attack at every radius, also the samples that fell at a smaller one",
    )
    group.add_argument(
        "--attacks",
        action="extend",
        nargs="+",
        metavar="NAME",
        help="in their order: pgd, apgd-ce, apgd-dlr, apgd-t, fab-t, square, transfer; "
        "autoattack (or aa): the original package, where installed",
    )
    group.add_argument("--iters", type=positive, metavar="K", help="iterations of each gradient attack")
    group.add_argument("--restarts", type=positive, metavar="R", help="random starts of each gradient attack")
    group.add_argument(
        "--transfer-from",
        type=path_text,
        metavar="MODEL2",
        help="also the `transfer` attack, which follows this model's gradients",
    )
    group.add_argument("--transfer-arch", type=path_text, metavar="ARCH", help="when MODEL2 is a tag or a file")
    group.add_argument(
        "--n-samples", type=positive_or("all"), metavar="N|all", help="size of the stratified sample that is attacked"
    )
    group.add_argument("--seed", type=natural, metavar="S", help="of the sample and the attacks' starts")
    group.add_argument(
        "--perturb-at",
        choices=("native", "input"),
        help="the images' stored size, or the tower's; default: the usual one of each dataset",
    )
    group.add_argument(
        "--sanity",
        action="store_true",
        help="also the health checks that need attacks of their own; of what is measured already, these alone",
    )


def _running_arguments(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("how it runs")
    group.add_argument(
        "--batch-size",
        type=positive_or("auto"),
        metavar="auto|B",
        help="images a rank takes at once (default auto; halved when the GPU's memory is too small)",
    )
    group.add_argument("--workers", type=natural, default=2, metavar="N", help="loader processes a rank (default 2)")
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the image tower and the attacks' arithmetic by torch.compile, once, for batches of any size; "
        "pays in long evaluations",
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where torch sees one"
    )
    group.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help="for results.json; default: a folder named by the settings in the run's evaluations/, or in ./evaluations",
    )


def _evaluate(args) -> int:
    from ..evaluation.request import in_flags

    with Interruption() as interruption:
        try:
            return _measure(args, interruption)
        except UserError as error:
            raise UserError(in_flags(str(error))) from None


def _measure(args, interruption: Interruption) -> int:
    from ..evaluation import datasets, request

    gelu = None if args.quick_gelu is None else args.quick_gelu == "true"
    model = settings.Model(arch=args.arch, weights=args.model, text=args.text, quick_gelu=gelu, ema=args.ema)
    transfer = settings.Model(arch=args.transfer_arch, weights=args.transfer_from) if args.transfer_from else None
    n_samples, batch_size = (None if n in ("all", "auto") else n for n in (args.n_samples, args.batch_size))
    protocol = request.protocol(
        args.protocol, args.eps, transfer is not None, args.n_samples == "all", n_samples=n_samples, norm=args.norm,
        iters=args.iters, restarts=args.restarts, seed=args.seed, perturb_at=args.perturb_at,
        attacks=args.attacks and tuple(args.attacks), independent_radii=args.independent_radii,
    )  # fmt: skip
    reading = {name: getattr(args, name) for name in ("allow_pipe", "label_key", "caption_key")}
    sources = datasets.find_datasets(args.data, args.datasets, args.index, args.classnames, reading)
    with heavy_imports():
        from ..attacks import checks
        from ..distributed.ranks import process_group
        from ..evaluation import table
        from ..evaluation.evaluate import evaluate
    datasets_prompts = args.templates == "dataset"
    if args.templates and not datasets_prompts:
        protocol = _with_prompts(protocol, args)
    others = {"batch_size": batch_size, "transfer": args.transfer_from}
    keys = {"label_key": args.label_key, "caption_key": args.caption_key, "transfer_arch": args.transfer_arch}
    others |= request.given(args.index, args.classnames, **keys)
    others |= {"prompts": "dataset"} if datasets_prompts else {}
    others |= {"compile": True} if args.compile else {}
    out = args.out or request.default_out(model, protocol, sources, args.data, **others)
    asked = request.EvaluationRequest(
        model, sources, protocol, out, transfer, batch_size, args.workers, args.sanity, datasets_prompts, args.compile
    )
    with process_group(args.device) as ranks:
        results = evaluate(asked, ranks, interruption=interruption)
        if ranks.is_first:
            table.show(results)
    return int(any(checks.failed(dataset["health"]) for dataset in results["datasets"]))


def _with_prompts(protocol, args):
    """The protocol with the prompts of --templates in place of the datasets' own."""
    from ..data.class_names import templates

    prompts = templates(settings.Data(shards=args.data, templates=args.templates))
    return replace(protocol, templates=tuple(prompts))


def _add_compare(commands) -> None:
    p = add_command(
        commands,
        "compare",
        _compare,
        "Runs on the same samples: paired differences from the first with McNemar's test, means over seeds.",
        "mmtard compare runs/single_teacher runs/mmtard\n"
        "         mmtard compare runs/ard-0 runs/ard-1 runs/mmtard-0 runs/mmtard-1 --labels ARD ARD MMT-ARD MMT-ARD "
        "--latex table.tex",
    )
    p.add_argument(
        "runs",
        type=path,
        nargs="+",
        metavar="RUN",
        help="a run, whose evaluations that match the first one's are found, or a results.json or the folder of one",
    )
    p.add_argument(
        "--labels",
        action="extend",
        nargs="+",
        metavar="NAME",
        help="a name for each RUN, in their order; runs of one name are averaged (default: the folders' names)",
    )
    p.add_argument("--csv", type=path, metavar="FILE", help="also write the table as CSV")
    p.add_argument("--latex", type=path, metavar="FILE", help="also write the accuracies as a LaTeX tabular")


def _compare(args) -> None:
    from ..evaluation import comparison_tables
    from ..evaluation.compare import compare_all
    from ..evaluation.matching import file_of, is_results
    from ..files import write_text
    from ..report.finding import measured_before

    rows = compare_all(args.runs, args.labels)
    comparison_tables.show(rows)
    for named, results in dict.fromkeys((row.named, file_of(row.path)) for row in rows):
        if not is_results(named) and measured_before(results, named):
            print(
                f"warning: '{named}' holds other weights now than those measured in {results}; "
                f"`mmtard evaluate {named}` measures them",
                file=sys.stderr,
            )
    for file, flag, text in (
        (args.csv, "--csv", comparison_tables.as_csv),
        (args.latex, "--latex", comparison_tables.as_latex),
    ):
        if file is not None:
            try:
                write_text(file, text(rows))
            except OSError as error:
                raise UserError(
                    f"{flag}: cannot write '{file}': {error.strerror or error}; choose another file"
                ) from None
            print(f"written: {file}")
