"""The process of one probe: `python -m mmtard.training.probe_process PARENT ASKED OUT`. Of the lowest priority, and it ends when process PARENT does.

ASKED is a JSON file as `schedule.Probe` writes it; OUT will hold {"clean": ACC, "robust": ACC} of the same samples.
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


def main(parent: str, asked: str, out: str) -> int:
    # A job's signals reach every process of it; what they mean for this one is the parent's to decide, who ends it with SIGKILL.
    signal.pthread_sigmask(signal.SIG_BLOCK, Interruption.SIGNALS)
    die_with_parent(int(parent))
    os.nice(19)
    try:
        found = measure(json.loads(Path(asked).read_text()))
    except (UserError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    Path(out).write_text(json.dumps(found))
    return 0


def measure(asked: dict) -> dict:
    """Accuracy of a checkpoint on a stratified sample, clean and under PGD on cross-entropy, in float32 at the tower's size."""
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
    from ..evaluation.model import full_float32, load_model
    from ..evaluation.statistics import stratified

    source = Data(**asked["data"])
    dataset = open_dataset(source)
    names = classnames(source, dataset)
    zeroshot.check_labels(dataset, names, "probe.data")
    settings = AttackSettings(eps=float(Fraction(asked["eps"])), norm=asked["norm"], iters=asked["steps"])
    clean, robust, left_out = [], [], []
    with process_group(asked["device"]) as ranks, full_float32():
        model = load_model(Model(weights=asked["checkpoint"], ema=asked["ema"]), ranks)
        logits = model.logits(model.head(names, templates(source), ranks))
        samples = SampleReader(dataset, model.transform(), staging=staging_for(dataset, source.cache), replace=False)
        ids = stratified(dataset.labels, asked["n_samples"], seed=0)
        for batch in eval_batches(samples, ids, asked["batch_size"]):
            left_out += batch.left_out
            if not len(batch):
                continue
            images, *rest = (t.to(ranks.device) for t in (batch.images, batch.labels, batch.seeds))
            outcome = ensemble.run_attacks(logits, images.float() / 255, *rest, ["pgd"], settings)
            clean += outcome.clean.tolist()
            robust += outcome.robust.tolist()
    chunks.check_left_out("probe.data", left_out, len(ids), source.max_replaced)
    return {"clean": results.accuracy(clean), "robust": results.accuracy(robust)}


if __name__ == "__main__":
    exit_process(main(*sys.argv[1:]))
