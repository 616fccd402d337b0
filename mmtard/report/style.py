"""How the report's figures look: small panels, one subject each, so that they are legible on a phone."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

# Okabe & Ito's colours, without yellow, which vanishes on white: told apart in every common form of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES, MARKERS = ("-", "--", "-.", ":"), "osD^vP*X"
PANEL = (4.4, 3.0)  # inches
DPI = 180
RC = {
    "font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.6, "axes.spines.top": False,
    "axes.spines.right": False, "legend.framealpha": 0.85, "legend.edgecolor": "none", "legend.fontsize": 8, "lines.linewidth": 1.5, "figure.facecolor": "white",
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A finished figure: `name` of its PNG file, what it shows, in words (`alt`), and what has to be said beside it."""

    name: str
    alt: str
    png: bytes = field(repr=False)
    caption: str = ""


@contextmanager
def canvas(size: tuple[float, float] = PANEL) -> Iterator[Canvas]:
    """A figure to draw on, without pyplot's global state."""
    with rc_context(RC):
        figure = Canvas(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def png(figure: Canvas) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def line(i: int) -> dict:
    """Colour and dash of the i-th run or model, the same in every figure."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}


def marker(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
