"""The class names of a dataset and the prompts that they stand in, and where the prompts came from."""

from __future__ import annotations

import numpy as np
import open_clip

from ..config import Data
from ..data.class_names import classnames, templates
from ..data.dataset import Dataset
from ..errors import UserError
from .datasets import DatasetSource, class_names
from .protocols import Protocol
from .trained_with import TrainedWith


def names_of(source: DatasetSource, dataset: Dataset) -> list[str]:
    """The names of a dataset's classes, in the order of the labels.

    Raises UserError for an ImageNet of other than 1000 classes without a file of names.
    """
    if source.data.classnames is None and source.kind.thousand:
        found, wanted = len(np.unique(dataset.labels[dataset.labels >= 0])), len(open_clip.IMAGENET_CLASSNAMES)
        if found != wanted:
            raise UserError(
                f"'{source.folder or source.data.shards}' has {found} classes, {source.kind.name} has {wanted}: "
                "their labels may be others; name them, one a line in the order of the labels, "
                "in a classnames.txt beside them or with --classnames"
            )
        return list(open_clip.IMAGENET_CLASSNAMES)
    return class_names(source, classnames(source.data, dataset))


def prompts_of(
    source: DatasetSource, protocol: Protocol, run: TrainedWith | None = None, datasets_own: bool = False
) -> tuple[list[str], str]:
    """The prompts of a dataset, each with `{}` for the name, and in words whose they are.

    Those that the protocol or --templates name; else those that the run was trained with, unless each dataset's own are
    asked for; else the dataset's own file, else ImageNet's, else the plain one.
    """
    if protocol.templates is not None:
        chosen = templates(Data(shards=source.data.shards, templates=list(protocol.templates)))
        return chosen, "as asked for"
    if run is not None and not datasets_own and (trained := run.prompts()) is not None:
        return trained, "of the run's training"
    if source.kind.imagenet and not isinstance(source.data.templates, str):
        return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES], "OpenAI's for ImageNet"
    return templates(source.data), "the dataset's own" if isinstance(source.data.templates, str) else "the plain one"
