"""Checkpoints without tensors, for the tests of what finds them and imports no torch."""

import json

from mmtard.runs import manifest


def publish(run, step, **state):
    """The folder of a checkpoint whose files have the sizes that its manifest says."""
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    for name in (manifest.WEIGHTS, manifest.OPTIMIZER):
        (folder / name).write_bytes(b"tensors")
    (folder / manifest.STATE).write_text(json.dumps({"step": step, **state}))
    files = {name: {"bytes": (folder / name).stat().st_size} for name in manifest.FILES}
    (folder / manifest.MANIFEST).write_text(json.dumps({"format": manifest.FORMAT, "step": step, "files": files}))
    return folder
