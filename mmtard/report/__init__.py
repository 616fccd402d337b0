"""A page that shows runs and how robust they became: one self-contained HTML file, and its figures as PNGs."""

__all__ = ["report"]
