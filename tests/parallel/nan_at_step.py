"""A rank whose objective gives NaN for one sample at step STEP of each run: nan_at_step.py STEP CONFIG... Otherwise
`mmtard train CONFIG`.
"""

import os
import sys

import torch

from mmtard.cli.main import main
from mmtard.distillation.methods import tecoa
from mmtard.distributed import ranks as process_group
from mmtard.distributed.processes import exit_process

step, configs = int(sys.argv[1]), sys.argv[2:]
whole, calls = tecoa.loss, 0


def loss(settings, predictions, labels, state):
    global calls
    calls += 1
    total, terms = whole(settings, predictions, labels, state)
    if calls == step and os.environ["RANK"] == "1":
        total = torch.where(torch.arange(len(total)) == 2, torch.nan, total)
    return total, terms


tecoa.loss = loss
process_group.stop = lambda *_: None  # the next run meets in the same group
for config in configs:
    calls = 0
    status = main(["train", config])
    if status:
        break
exit_process(status)
