"""The process of one probe: `python -m mmtard.training.probe_process PARENT REQUEST OUT`.

It has the lowest priority, and ends when process PARENT does. REQUEST is a JSON file as `probe.Probe` writes it; OUT
will hold {"clean": ACC, "robust": ACC} of the same samples.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from fractions import Fraction
from pathlib import Path

from ..distributed.interruption import Interruption
from ..distributed.processes import die_with_parent, exit_process
from ..errors import RunError, UserError


def main(parent: str, request: str, out: str) -> int:
    """Measure what a request asks for, and write it; the exit status."""
    # A job's signals reach every process of it. The parent decides what they mean for this one, and ends it by SIGKILL.
    signal.pthread_sigmask(signal.SIG_BLOCK, Interruption.SIGNALS)
    die_with_parent(int(parent))
    os.nice(19)
    try:
        found = measure(json.loads(Path(request).read_text()))
    except (UserError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    Path(out).write_text(json.dumps(found))
    return 0


def measure(request: dict) -> dict:
    """Accuracy of a checkpoint on a stratified sample, clean and under PGD on cross-entropy.

    In float32, at the size that the tower was trained with.
    """
    from ..attacks import ensemble
    from ..attacks.state import AttackSettings
    from ..config import Data, Model
    from ..data.class_names import classnames, templates
    from ..data.dataset import open_dataset
    from ..data.samples import SampleReader
    from ..data.staging import staging_for
    from ..data.stream import eval_batches
    from ..distributed.ranks import process_group
    from ..evaluation import chunks, results, zeroshot
    from ..evaluation.model import load_model
    from ..evaluation.statistics import stratified
    from ..models.precision import full_float32

    source = Data(**request["data"])
    dataset = open_dataset(source)
    names = classnames(source, dataset)
    zeroshot.check_labels(dataset, names, "probe.data")
    settings = AttackSettings(eps=float(Fraction(request["eps"])), norm=request["norm"], iters=request["steps"])
    clean, robust, left_out = [], [], []
    with process_group(request["device"]) as ranks, full_float32():
        model = load_model(Model(weights=request["checkpoint"], ema=request["ema"]), ranks)
        logits = model.logits(model.head(names, templates(source), ranks))
        samples = SampleReader(dataset, model.transform(), staging=staging_for(dataset, source.cache), replace=False)
        ids = stratified(dataset.labels, request["n_samples"], seed=0)
        for batch in eval_batches(samples, ids, request["batch_size"]):
            left_out += batch.left_out
            if not len(batch):
                continue
            batch = batch.to(ranks.device)
            images = batch.pixels(ranks.device)
            outcome = ensemble.run_attacks(logits, images, batch.labels, batch.seeds, ["pgd"], settings)
            clean += outcome.clean.tolist()
            robust += outcome.robust.tolist()
    chunks.check_left_out("probe.data", left_out, len(ids), source.max_replaced)
    return {"clean": results.accuracy(clean), "robust": results.accuracy(robust)}


if __name__ == "__main__":
    exit_process(main(*sys.argv[1:]))
