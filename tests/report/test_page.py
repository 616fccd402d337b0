import base64
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
    assert anchors == set(re.findall(r'id="(\w+)"', text)) and len(anchors) == 8


def test_every_png_stands_beside_the_page_and_in_it_with_words(page):
    text, folder = page
    inline = {base64.b64decode(m) for m in re.findall(r'src="data:image/png;base64,([^"]+)"', text)}
    files = {p.read_bytes() for p in folder.glob("*.png")}
    assert inline == files and len(files) == text.count("<img")
    assert {p.name for p in folder.iterdir() if p.suffix != ".png"} == {"report.html"}
    assert all(len(alt) > 30 for alt in re.findall(r'<img [^>]*alt="([^"]*)"', text)) and text.count(
        "<img"
    ) == text.count("alt=")


def test_what_was_found_and_what_was_not_is_said(page):
    text, _ = page
    assert "mmtard train a.yaml" in text and "mmtard evaluate" in text and "mmtard report a b" in text
    assert "weight_decay: 0.05" in text and "complete, 10 steps done" in text
    assert "zero gradients" in text and "3 of 10 samples" in text
    assert (
        text.count("None: ") == 3 and "does not exist" not in text
    )  # no strip of any of the three: their data are gone
    assert "training: these are evaluation results alone" in text
    assert "Δ +10.0, p 1" in text and "Δ -50.0, p 0.062" in text  # 5 in 5 discordant samples: 2 / 2^5


def test_a_report_is_replaced_whole_and_nothing_else_ever(tmp_path):
    folder = write_run(tmp_path / "a", ROWS[:1], None)
    out = report([folder], tmp_path / "out").parent
    (out / "stale.png").touch()
    report([folder], out)
    assert not (out / "stale.png").exists()
    with pytest.raises(UserError, match="exists and is no report; choose another folder for --out"):
        report([folder], folder)
    assert (folder / "config.yaml").is_file()


def test_the_command_prints_the_page_and_refuses_in_one_line(tmp_path, capsys):
    assert (
        main(
            ["report", str(write_run(tmp_path / "a", ROWS[:1], None)), "--out", str(tmp_path / "out"), "--images", "0"]
        )
        == 0
    )
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}\n"
    assert "None: they were not asked for" in (tmp_path / "out" / "report.html").read_text()
    assert main(["report", str(tmp_path / "gone"), "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "other").exists()
