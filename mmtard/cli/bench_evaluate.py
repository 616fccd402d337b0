"""`mmtard bench evaluate`: mmtard's attacks beside another library's, on the same samples."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from .. import config as settings
from ..benchmarks.out_file import check_out
from ..config.argument_types import fraction, natural, path, path_text, positive
from ..errors import UserError
from .command import add_command, heavy_imports


def add(parts) -> None:
    """Add this part of `mmtard bench` to its parser."""
    p = add_command(
        parts,
        "evaluate",
        _run,
        "Time mmtard's attacks beside pyautoattack's: the same samples, iterations and targets, in turns.",
        "mmtard bench evaluate runs/b32 --data shards/cifar10 --against pyautoattack",
        more="Seconds, forward passes, and how many samples fall to one and not to the other.",
    )
    p.add_argument("model", type=path_text, metavar="MODEL", help="as `mmtard evaluate` takes it")
    p.add_argument("--arch", type=path_text, help="open_clip architecture or .json, when MODEL is a tag or a file")
    p.add_argument("--data", type=path_text, required=True, metavar="ROOT", help="a dataset, as of `mmtard evaluate`")
    p.add_argument("--against", choices=("pyautoattack",), default="pyautoattack", help="(default pyautoattack)")
    p.add_argument(
        "--suites",
        action="extend",
        nargs="+",
        choices=("standard", "fare", "robustvlm"),
        help="AutoAttack's standard; APGD-CE and APGD-T; these with RobustVLM's five restarts (default: all)",
    )
    p.add_argument("--n-samples", type=positive, default=200, metavar="N", help="stratified (default 200)")
    p.add_argument("--norm", choices=("linf", "l2"), default="linf")
    p.add_argument("--eps", type=fraction, default=Fraction(4, 255), metavar="E", help="radius (default 4/255)")
    p.add_argument("--iters", type=positive, default=100, metavar="K", help="iterations (default 100)")
    p.add_argument("--queries", type=positive, default=5000, metavar="Q", help="of Square (default 5000)")
    p.add_argument("--compile", action="store_true", help="time mmtard's attacks on the compiled model, too")
    p.add_argument("--rounds", type=positive, default=1, metavar="N", help="rounds over both (default 1)")
    p.add_argument("--seed", type=natural, default=0, metavar="S", help="of the sample (default 0)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument(
        "--out", type=path, default=Path("bench_evaluate.json"), metavar="FILE", help="(bench_evaluate.json)"
    )


def _run(args) -> None:
    from ..evaluation.request import in_flags

    try:
        _compare(args)
    except UserError as error:
        raise UserError(in_flags(str(error))) from None


def _compare(args) -> None:
    from ..evaluation.datasets import find_datasets

    check_out(args.out)
    sources = find_datasets(args.data)
    if len(sources) > 1:
        raise UserError(f"--data: '{args.data}' holds {len(sources)} datasets; name one of them")
    with heavy_imports():
        from ..attacks.state import AttackSettings
        from ..benchmarks.classified import classified_samples
        from ..benchmarks.evaluate import SUITES, EvaluationBenchmark
        from ..distributed.progress import WorkProgress
        from ..distributed.ranks import process_group
        from ..models.precision import full_float32
    means = AttackSettings(eps=float(args.eps), norm=args.norm, iters=args.iters, queries=args.queries)
    suites = tuple(SUITES[name] for name in args.suites or SUITES)
    model = settings.Model(arch=args.arch, weights=args.model)
    with process_group(args.device) as ranks, full_float32():
        logits, compiled, images, labels = classified_samples(
            model, sources[0], args.n_samples, args.seed, ranks, args.compile
        )
        with WorkProgress(ranks.is_first) as progress:
            bench = EvaluationBenchmark(means, args.rounds, suites, progress=progress)
            report = bench.run(logits, images, labels, compiled)
        report.publish(args.out, ranks.device)
