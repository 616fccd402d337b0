"""How the report's figures look: small panels, one subject each, so that they are legible on a phone."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from .shown import short

# Okabe & Ito's colours, without yellow, which vanishes on white: told apart in every common form of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES, MARKERS = ("-", "--", "-.", ":"), "osD^vP*X"
PANEL = (4.4, 3.0)  # inches
DPI = 180
RC = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "figure.facecolor": "white",
    "text.parse_math": False,  # a `$` in a name is a dollar, not the start of a formula
    "pdf.fonttype": 42,  # as publishers ask for
    "svg.hashsalt": "mmtard",  # the same figure gives the same bytes
}
# What says when and with what a file was written is left out, so that the same figure gives the same bytes.
VECTOR = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


@dataclass(frozen=True)
class Figure:
    """A finished figure: `name` of its files, what it shows, in words (`alt`), and what has to be said beside it.

    vector: the same as `svg` and `pdf`; empty for photographs.
    """

    name: str
    alt: str
    png: bytes = field(repr=False)
    caption: str = ""
    vector: dict[str, bytes] = field(default_factory=dict, repr=False)


@contextmanager
def canvas(size: tuple[float, float] = PANEL) -> Iterator[Canvas]:
    """A figure to draw on, without pyplot's global state."""
    with rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")  # a box stands for it; the page has the name
        warnings.filterwarnings("ignore", message=r"constrained_layout not applied")
        figure = Canvas(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def finish(name: str, alt: str, drawn: Canvas, caption: str = "") -> Figure:
    """Write what was drawn as PNG, SVG and PDF."""
    files = {}
    for kind, metadata in {"png": {"Software": None}, **VECTOR}.items():
        buffer = io.BytesIO()
        drawn.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
        drawn.set_layout_engine("none")  # laid out once: the next format takes the same places
        files[kind] = buffer.getvalue()
    return Figure(name, alt, files.pop("png"), caption, files)


def label(name: str) -> str:
    """Return the name as a legend's entry; matplotlib itself leaves out one that begins with an underscore."""
    return short(name) if not name.startswith("_") else f" {short(name)}"


def line(i: int) -> dict:
    """Colour and dash of the i-th run or model, the same in every figure."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}


def marker(i: int) -> dict:
    """Colour and mark of the i-th run or model, the same in every figure."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def file_name(text: str) -> str:
    """Return the text as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-").lower()[:60]
