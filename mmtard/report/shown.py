"""Text that is not ours (names of runs, datasets and classes, commands), made fit for the place where it is shown."""

from __future__ import annotations

import re
import shlex
import unicodedata
from pathlib import Path

SHORT = 44  # characters of a name in a figure
# Controls, lone surrogates, line and paragraph separators; format characters below, where they turn the text around.
_INVISIBLE = ("Cc", "Cs", "Zl", "Zp")
_DIRECTION = {
    *map(chr, range(0x202A, 0x202F)),
    *map(chr, range(0x2066, 0x206A)),
    "\u061c",
    "\u200e",
    "\u200f",
    "\ufeff",
}


class Safe(str):
    """Text that is already fit for a Markdown file."""


def visible(text: object, lines: bool = False) -> str:
    """Return the text with every control and direction character written out, as `\\x1b`; lines: keep its lines."""
    kept = "\n\t" if lines else ""
    return "".join(c if c in kept or not _hidden(c) else c.encode("unicode_escape").decode() for c in str(text))


def _hidden(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE or character in _DIRECTION


def short(text: object, most: int = SHORT) -> str:
    """Return the text on one line of at most `most` characters, the middle left out of a longer one."""
    text = visible(text)
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def markdown(text: object) -> Safe:
    """Return the text for a line or a table cell of Markdown, where it reads as it stands."""
    if isinstance(text, Safe):
        return text
    return Safe(re.sub(r"([\\`*_{}\[\]<>#|~$!&])", r"\\\1", visible(text)))


def code(text: object) -> Safe:
    """Return the text as inline code of Markdown, inside a table too."""
    text = visible(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[:1] in ("", "`", " ") or text[-1:] in ("`", " ") else ""
    return Safe(f"{fence}{space}{text}{space}{fence}".replace("|", "\\|"))


def block(text: object, language: str = "") -> Safe:
    """Return the text as a fenced block of Markdown that no line of it can close."""
    text = visible(text, lines=True).rstrip("\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Safe(f"{fence}{language}\n{text}\n{fence}")


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"–": "--", "≥": r"$\ge$", "Δ": r"$\Delta$", "±": r"$\pm$", **{c: f"\\{c}" for c in "&%$#_{}"}}


def latex(text: object) -> str:
    """Return the text for a cell of a LaTeX table."""
    return "".join(_LATEX.get(c, c) for c in visible(text))


def csv_cell(text: object) -> str:
    """Return the text for a CSV cell; a spreadsheet takes it for no formula."""
    text = visible(text)
    return f"'{text}" if text[:1] in ("=", "@", "\t") or re.match(r"[+-](?![\d.]+$)", text) else text


def typed(command: str) -> str:
    """Return a stored command line as a person would type it: `mmtard ...`, not the path of the file that ran."""
    try:
        first, *words = shlex.split(command)
    except ValueError:
        return command
    path = Path(first)
    if path.name == "mmtard" or path.parts[-2:] == ("mmtard", "__main__.py"):
        start = ["mmtard"]
    elif "mmtard" in path.parts[:-1] and path.suffix == ".py":
        parts = path.with_suffix("").parts
        module = [*parts[len(parts) - 1 - parts[::-1].index("mmtard") :]]
        start = ["python", "-m", ".".join(module[:-1] if module[-1] == "__main__" else module)]
    else:
        return command
    return shlex.join([*start, *words])
