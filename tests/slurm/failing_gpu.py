"""Makes the GPU of a job's second rank fail, as torch says it: a sitecustomize.py for the folder that PYTHONPATH names.

Python imports it before anything else, so that the product needs no option for it. FAILING_GPU_RESTART: in which
restart of the job.
"""

import importlib.abc
import importlib.util
import os
import sys

WHERE, STEP = "mmtard.training.engine", 2
SAID = (
    "CUDA error: uncorrectable ECC error encountered\nSearch for `cudaErrorECCUncorrectable' in NVIDIA's "
    "documentation. CUDA kernel errors might be asynchronously reported at some other API call"
)


class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != WHERE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            module.Engine.end_micro_batch = failing(module.Engine.end_micro_batch)

        spec.loader.exec_module = exec_module
        return spec


def failing(end_micro_batch):
    steps = []

    def fails(*args):
        import torch

        steps.append(1)
        if len(steps) == STEP:
            raise torch.AcceleratorError(SAID)
        return end_micro_batch(*args)

    return fails


if (
    os.environ.get("SLURM_PROCID") == "1"
    and os.environ.get("SLURM_RESTART_COUNT") == os.environ.get("FAILING_GPU_RESTART", "none")
):  # fmt: skip
    sys.meta_path.insert(0, Hook())
