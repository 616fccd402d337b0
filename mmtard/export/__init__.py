"""A model as files that others load: open_clip, RobustVLM's tower file, transformers, with a model card."""

from .folder import TOWER_FILE, export

__all__ = ["TOWER_FILE", "export"]
