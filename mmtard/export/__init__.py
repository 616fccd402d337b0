"""A model as files that others load: open_clip, RobustVLM's tower file, transformers, with a model card."""

__all__ = ["TOWER_FILE", "export"]
