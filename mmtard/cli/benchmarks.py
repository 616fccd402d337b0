"""`mmtard bench`: how fast a training, an evaluation, or the loading of data is. One module for each of its parts."""

from __future__ import annotations

from . import bench_checkpoint, bench_data, bench_evaluate, bench_scale, bench_train

PARTS = (bench_train, bench_evaluate, bench_data, bench_checkpoint, bench_scale)  # as `mmtard bench --help` lists them


def add(commands) -> None:
    """Add the command of this file, with its parts, to the command line."""
    help = "Measure how fast mmtard is on this machine, beside what it is compared with; a table and JSON."
    bench = commands.add_parser(
        "bench",
        help=help,
        description=help,
        epilog="example: mmtard bench train benchmarks/vitb32_vitl14 --against published",
    )
    parts = bench.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    for part in PARTS:
        part.add(parts)
