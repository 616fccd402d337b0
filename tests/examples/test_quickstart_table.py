"""The table at the quickstart's end, from a measurement of untrained models on a few images."""

import re
from dataclasses import replace

from mmtard.config import Model
from mmtard.examples import quickstart
from mmtard.examples.pretrain import ARCHITECTURE
from mmtard.examples.shapes import make_data
from mmtard.models import loading


def test_every_model_has_its_row_of_both_splits_clean_and_attacked(ranks, tmp_path, monkeypatch, capsys):
    make_data(tmp_path / "shapes", train=36, test=72, zeroshot=24, shard_size=40)
    for seed, name in enumerate(("start", "other")):
        loading.load_clip(Model(arch=str(ARCHITECTURE), weights="random"), seed).save(tmp_path / name)
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "COMPARED", {name: tmp_path / name for name in ("start", "other")})
    monkeypatch.setattr(quickstart, "PROTOCOL", replace(quickstart.PROTOCOL, iters=1))
    measured = quickstart._measure()
    assert [(split, found["n_total"]) for split, found in measured["other"].items()] == [("test", 72), ("zeroshot", 24)]
    capsys.readouterr()
    quickstart._table(measured)
    lines = capsys.readouterr().out.splitlines()
    (row,) = (re.findall(r"([\d.]+) \(", line) for line in lines if "other" in line)
    clean = [measured["other"][split]["clean"]["accuracy"] for split in ("test", "zeroshot")]
    robust = [measured["other"][split]["eps"]["6/255"]["robust"]["accuracy"] for split in ("test", "zeroshot")]
    assert [float(cell) for cell in row] == [round(100 * a, 1) for pair in zip(clean, robust) for a in pair]
    assert lines[-1].startswith("chance level: test 2.8, zeroshot 8.3.")
    monkeypatch.setattr(quickstart, "TRAINED", ())
    quickstart._report()
    assert capsys.readouterr().out == f"Look at it in a browser: {(tmp_path / 'report' / 'report.html').as_uri()}\n"
    page = (tmp_path / "report" / "report.html").read_text()
    first = page[page.index('<h2 id="') :].partition("<table")[0]
    assert first.startswith('<h2 id="comparison"') and first.count("<img") >= 1 and "What is missing" not in first
    assert page.count("attacked image: said to be") >= 2  # samples of both models were attacked for it
