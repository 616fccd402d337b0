"""Names and numbers of strangers: the page stands, shows them as they are written, and nothing of them works."""

import copy
import json
import random
import re

import pytest
from written import dataset, results, save, write_run

from mmtard.errors import UserError
from mmtard.report import page, sources
from mmtard.report.page import report
from mmtard.report.records import read
from mmtard.report.style import Figure

FLAGS = [True, False, True, True]
NAMES = (
    "a$\\frac{x$b",
    "r<script>alert(1)</script>",
    "[/b] [link=x]y",
    "r`x`\\n---",
    "_leading underscore",
    "\u202egreen\x1b[31m",
    "naïve 中文 🟥",
    "x" * 200,
)


@pytest.mark.slow
def test_names_of_any_kind_are_shown_and_do_nothing(tmp_path, monkeypatch):
    """A run, a dataset, a class, a loss term, a reason and a command by every such name, on one page."""
    monkeypatch.setattr("mmtard.report.style.VECTOR", {"svg": {"Date": None}})
    runs = []
    for i, name in enumerate(NAMES):
        rows = [{"step": 1, "loss": 1.0, name: 2.0, f"w_{name}": 1.0}]
        run = write_run(tmp_path / str(i) / name, rows if i < 2 else [], None)
        classes = (name, "other")
        part = dataset(name, FLAGS, {"2/255": FLAGS}, classes=classes, templates=[f"{name} {{}}"])
        content = results([part], name, str(i), name)
        content["command"] = f"x\n</pre>{name}"
        save(content, run / "evaluations" / "x")
        runs.append(run)
    text = report(runs, tmp_path / "out", images=1).read_text()
    assert "<script" not in text.lower() and "\u202e" not in text and "\x1b" not in text
    assert text.count("a$\\frac{x$b") > 5 and "\\u202egreen\\x1b[31m" in text and "</pre>r&lt;script" not in text
    svg = [path.read_text() for path in (tmp_path / "out").glob("*.svg")]
    assert len(svg) > 8 and not any("<script" in figure for figure in svg)
    tex = (tmp_path / "out" / "accuracy-0.tex").read_text()
    assert r"a\$\textbackslash{}frac\{x\$b" in tex
    assert not re.search(r"(?m)^---", tex)


def _paths(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(min(len(value), 3)):
            yield from _paths(value[key], (*path, key))


VALUES = [None, 1, -1, 1e308, float("nan"), "x", "", [], {}, True, [None], {"a": 1}, "../../x", "9" * 400, 10**400]


@pytest.mark.slow
def test_no_change_of_a_results_json_ends_in_a_traceback(tmp_path, monkeypatch):
    """150 mutations: each is shown, or told in one line that names the file."""
    good = results([dataset("A", FLAGS, {"2/255": FLAGS, "4/255": FLAGS})])
    rng, told = random.Random(0), 0
    paths = [path for path in _paths(good) if path]
    # Drawn, and not encoded: that is most of the time.
    monkeypatch.setattr(
        "mmtard.report.style.finish", lambda name, alt, drawn, caption="": Figure(name, alt, b"", caption)
    )
    for _ in range(150):
        content = copy.deepcopy(good)
        *above, last = rng.choice(paths)
        at = content
        for key in above:
            at = at[key]
        if isinstance(at, dict) and rng.random() < 0.2:
            del at[last]
        else:
            at[last] = rng.choice(VALUES)
        (tmp_path / "r").mkdir(exist_ok=True)
        (tmp_path / "r" / "results.json").write_text(json.dumps(content))
        try:
            read(tmp_path / "r" / "results.json")
        except UserError as error:
            assert "results.json" in str(error) and "\n" not in str(error)
            told += 1
            continue
        page._render(page._content(sources.read([tmp_path / "r"]), images=2), "")
    assert 50 < told < 145


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"", b"null", b'{"format": 2}'])
def test_what_is_no_result_is_told_in_one_line(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError, match="results.json'"):
        report([tmp_path / "results.json"], tmp_path / "out", images=0)
    assert not (tmp_path / "out").exists()
