"""A model as a classifier of a dataset, and some of its samples: what a benchmark of attacks runs on."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from ..attacks.state import Classifier
from ..config import Model
from ..data.dataset import open_dataset
from ..data.samples import SampleReader
from ..data.staging import staging_for
from ..data.stream import eval_batches
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..evaluation.class_folders import with_shards
from ..evaluation.datasets import DatasetSource
from ..evaluation.model import load_model
from ..evaluation.prompts import names_of, prompts_of
from ..evaluation.protocols import PROTOCOLS
from ..evaluation.statistics import stratified
from ..evaluation.zeroshot import check_labels
from ..models.compiled import compile_tower


def classified_samples(
    spec: Model, source: DatasetSource, n: int, seed: int, ranks: Ranks, compile: bool = False
) -> tuple[Classifier, Classifier | None, Tensor, Tensor]:
    """(classifier, compiled, images [n,3,H,W] float32 in [0,1], labels int64 [n]) on the ranks' device.

    The samples are stratified over the classes. compiled: the same classifier by torch.compile, where that is asked
    for. Raises UserError for a dataset without labels, and for one of whose samples none can be read.
    """
    source = with_shards(source, print)
    dataset = open_dataset(source.data)
    names = names_of(source, dataset)
    check_labels(dataset, names, source.name)
    model = load_model(spec, ranks)
    prompts, _ = prompts_of(source, PROTOCOLS["fare"], None, True)
    head = model.head(names, prompts, ranks)
    compiled = replace(model, tower=copy.deepcopy(model.tower)) if compile else None
    if compiled is not None:
        compile_tower(compiled.tower, "the model", print, any_batch=True)
    labelled = (dataset.labels >= 0).nonzero()[0]
    ids = labelled[stratified(dataset.labels[labelled], n, seed)]
    staging = staging_for(dataset, source.data.cache)
    samples = SampleReader(dataset, model.transform(), staging=staging, replace=False)
    batches = [batch for batch in eval_batches(samples, ids, len(ids)) if len(batch)]
    if not batches:
        raise UserError(f"--data: none of {len(ids)} samples of '{source.name}' can be read; restore the shards")
    images = torch.cat([batch.pixels(ranks.device) for batch in batches])
    labels = torch.cat([batch.labels for batch in batches]).to(ranks.device)
    return model.logits(head), compiled and compiled.logits(head), images, labels
