"""Data: WebDataset shards and their index, the global order of samples, decoding, and the loader.

Imports nothing of ranks' communication: they come as numbers, and to `open_on_all` as an object.
"""

from .dataset import Dataset, Reader, classnames, default_index, open_dataset, open_on_all, templates
from .embeddings import Embeddings
from .images import DecodeError, Native, Transform, decode
from .index import Index, build_index, load_index
from .order import Order, sample_seeds
from .shards import write_shards
from .staging import Stager, Staging
from .stream import Batch, Stream, eval_batches

__all__ = [
    "Batch", "Dataset", "DecodeError", "Embeddings", "Index", "Native", "Order", "Reader", "Stager", "Staging", "Stream", "Transform", "build_index", "classnames",
    "decode", "default_index", "eval_batches", "load_index", "open_dataset", "open_on_all", "sample_seeds", "templates", "write_shards",
]  # fmt: skip
