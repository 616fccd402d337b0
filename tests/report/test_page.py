import base64
import csv
import re

import pytest
from written import ROWS, dataset, results, save, write_run

from mmtard.cli.main import main
from mmtard.errors import UserError
from mmtard.report.page import report

CLEAN = [True] * 8 + [False] * 2


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two runs and a model, and its folder; one class is called `green <ring>`."""
    tmp_path = tmp_path_factory.mktemp("page")
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for folder, sha256, robust in ((a, "a", 5), (b, "b", 6), (tmp_path / "model", "c", 0)):
        flags = [i < robust for i in range(10)]
        parts = [
            dataset(name, CLEAN, {"2/255": flags, "4/255": flags}) for name in ("Pets", "X<script>alert(1)</script>")
        ]
        save(results(parts, str(folder), sha256), folder / "evaluations" / "fare")
    out = report([a, b, tmp_path / "model"], tmp_path / "out", command="mmtard report a b")
    return out.read_text(), out.parent


def test_the_page_needs_nothing_but_itself(page):
    text, folder = page
    addresses = re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"')>\s]+)""", text)
    assert len(addresses) > 20 and all(a.startswith(("data:image/png;base64,", "#")) for a in addresses)
    assert "<script" not in text and "http" not in re.sub(r'http-equiv|base64,[^"]*', "", text)
    assert "X&lt;script&gt;alert(1)" in text and "green &lt;ring&gt;" not in text.replace("worst", "")
    anchors = set(re.findall(r'href="#(\w+)"', text))
    assert anchors == set(re.findall(r'id="(\w+)"', text))
    assert anchors == {"comparison", "radii", "health", "training", "details", "runs", "missing"}


def test_the_page_begins_with_the_comparison_and_ends_with_what_is_missing(page):
    text, _ = page
    headings = re.findall(r'<h2 id="(\w+)"', text)
    assert headings[0] == "comparison" and headings[-1] == "missing"
    first = text[text.index('<h2 id="comparison"') :]
    assert first.index("<img") < first.index("<table") < first.index("<h2 id", 1)
    assert first.index('alt="Clean against robust accuracy at linf 2/255') < first.index("<table")
    assert text.index("attacked images: ") > text.index('<h2 id="missing"')


def test_the_prompts_stand_under_the_table(page):
    assert "Prompts: “a photo of a {}”." in page[0]


def test_every_png_stands_beside_the_page_and_in_it_with_words(page):
    text, folder = page
    inline = {base64.b64decode(m) for m in re.findall(r'src="data:image/png;base64,([^"]+)"', text)}
    files = {p.read_bytes() for p in folder.glob("*.png")}
    assert inline == files and len(files) == text.count("<img")
    assert {p.name for p in folder.iterdir() if p.suffix not in (".png", ".svg", ".pdf")} == {
        "report.html", "accuracy-0.csv", "accuracy-0.tex", ".mmtard.json",
    }  # fmt: skip
    assert all(len(alt) > 30 for alt in re.findall(r'<img [^>]*alt="([^"]*)"', text)) and text.count(
        "<img"
    ) == text.count("alt=")


def test_what_was_found_and_what_was_not_is_said(page):
    text, _ = page
    assert "mmtard train a.yaml" in text and "mmtard evaluate" in text and "mmtard report a b" in text
    assert "weight_decay: 0.05" in text and "complete, 10 steps done" in text
    assert "zero gradients" in text and "3 of 10 samples" in text
    # No strip of any of the three: their weights are gone.
    assert text.count("attacked images: ") == 3 and "None: " not in text and "does not exist" not in text
    assert "training: these are evaluation results alone" in text
    assert "Δ +10.0, p 1" in text and "Δ -50.0, p 0.062" in text  # 5 in 5 discordant samples: 2 / 2^5


def test_a_report_is_replaced_whole_and_nothing_else_ever(tmp_path, quick_figures):
    folder = write_run(tmp_path / "a", ROWS[:1], None)
    out = report([folder], tmp_path / "out").parent
    first = {path.name for path in out.iterdir()}
    report([write_run(tmp_path / "b", [{"step": 1, "lr": 1.0}], None)], out)
    assert "training-loss.png" in first and not (out / "training-loss.png").exists()
    with pytest.raises(UserError, match="exists and is not a report that mmtard made; choose another folder"):
        report([folder], folder)
    assert (folder / "config.yaml").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_the_command_prints_the_page_and_refuses_in_one_line(tmp_path, capsys, quick_figures):
    assert (
        main(
            ["report", str(write_run(tmp_path / "a", ROWS[:1], None)), "--out", str(tmp_path / "out"), "--images", "0"]
        )
        == 0
    )
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}\n"
    assert "attacked image" not in (tmp_path / "out" / "report.html").read_text().lower()
    assert main(["report", str(tmp_path / "gone"), "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "other").exists()


def test_figures_and_tables_are_files_for_a_paper(page):
    """Each drawn figure as SVG and PDF, without a date, so that the same data give the same bytes."""
    folder = page[1]
    drawn = [path for path in folder.glob("*.png")]
    assert len(drawn) > 10 and all(
        path.with_suffix(end).stat().st_size > 1000 for path in drawn for end in (".svg", ".pdf")
    )
    assert b"%PDF" == (folder / "scatter-0-2-255.pdf").read_bytes()[:4]
    assert "<dc:date>" not in (folder / "scatter-0-2-255.svg").read_text()
    with (folder / "accuracy-0.csv").open() as file:
        rows = list(csv.DictReader(file))
    (row,) = [r for r in rows if (r["row"], r["model"], r["measure"]) == ("Pets", "b", "eps 2/255")]
    assert (row["value"], row["interval 95 %"], row["change"]) == ("60.0", "31.3–83.2", "Δ +10.0, p 1")
    lines = (folder / "accuracy-0.tex").read_text().splitlines()
    assert r"Pets & 80.0 & 50.0 & 50.0 & 80.0 & 60.0 & 60.0 & 80.0 & 0.0 & 0.0 & 50.0 \\" in lines
    small = lines[lines.index(next(line for line in lines if line.startswith("Pets &"))) + 1]
    assert small.startswith(r" & ") and small.count(" & ") == 10 and r"& \scriptsize 31.3--83.2 &" in small
    (columns,) = [line for line in lines if line.startswith(r"\begin{tabular}")]
    assert columns == r"\begin{tabular}{l" + 10 * "r" + "}" and lines[-1] == r"\end{tabular}"
