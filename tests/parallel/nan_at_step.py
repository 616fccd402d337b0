"""A rank whose objective gives NaN for one sample at one step: nan_at_step.py CONFIG STEP. Otherwise `mmtard train CONFIG`."""

import os
import sys

import torch

from mmtard import cli
from mmtard.methods import tecoa

config, step = sys.argv[1], int(sys.argv[2])
whole, calls = tecoa.loss, 0


def loss(settings, predictions, labels):
    global calls
    calls += 1
    total, terms = whole(settings, predictions, labels)
    if calls == step and os.environ["RANK"] == "1":
        total = torch.where(torch.arange(len(total)) == 2, torch.nan, total)
    return total, terms


tecoa.loss = loss
raise SystemExit(cli.main(["train", config]))
