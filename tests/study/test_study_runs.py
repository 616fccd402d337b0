"""A whole study at tiny size: trained, killed, gone on with, measured, and shown on its page."""

import csv
import hashlib
import json
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from processes import python_path, without_extras
from tiny_study import tree, write

from mmtard.cli.main import main
from mmtard.distributed.interruption import EXIT_REQUEUE
from mmtard.examples import quickstart
from mmtard.study import findings, loading, summary

pytestmark = pytest.mark.slow
TIMES = ("seconds",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, vit):
    """A study that ran from its beginning to its end: (its file, its folder)."""
    folder = tmp_path_factory.mktemp("whole")
    methods = tree(folder, vit)["methods"]
    methods["less"] = {"ablates": "teacher", "settings": {**methods["teacher"]["settings"], "method": RSLAD_LESS}}
    methods["less"]["settings"]["teachers"] = {"robust": {"weights": "{study}/models/robust", "stored": True}}
    file = write(folder / "tiny.yaml", tree(folder / "out", vit, methods=methods))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mmtard", "study", str(file)])
        patch.setenv("PYTHONPATH", python_path(without_extras(folder)))  # of the workers
        assert main(["study", str(file)]) == 0
    return file, folder / "out"


RSLAD_LESS = {"name": "rslad", "alpha": 1.0}


def rows(folder, name):
    with (folder / "page" / name).open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def test_every_method_is_trained_at_every_seed_and_setting_and_measured(whole):
    _, out = whole
    runs = rows(out, "runs.csv")
    tuned, at_other_point = [("0", "0"), ("0", "1"), ("1", "1")], [("0", "0"), ("1", "0")]
    for method in ("tecoa", "teacher", "less"):
        mine = [r for r in runs if r["method"] == method and r["evaluation"] == "test"]
        # The other learning rate, the main table at two seeds, the other point at two seeds but for an ablation.
        wanted = tuned if method == "less" else tuned + at_other_point
        assert sorted((r["seed"], r["main"]) for r in mine) == sorted(wanted)
        assert {r["images"] for r in mine} == {"32"} and all(0 <= float(r["robust"]) <= float(r["clean"]) for r in mine)
    assert {r["method"] for r in runs} == {"tecoa", "teacher", "less", "robust", "start"}
    costs = (out / "page" / "table-cost.csv").read_text()
    stored = re.findall(r"(\w+),\"storing, once, s\",(.*?),", costs)
    assert dict(stored)["teacher"] == "–" and float(dict(stored)["less"]) >= 0  # it reads its teacher's embeddings
    assert len({r["gflop_an_image"] for r in runs if r["method"] == "tecoa"}) == 2  # one and two steps of attack


def test_the_numbers_on_the_page_are_those_of_the_evaluations(whole):
    file, out = whole
    study = loading.load(file)
    found = findings.collect(study)
    assert not found.missing and found.baseline == "tecoa" and list(found.main) == ["tecoa", "teacher", "less"]
    seen = [json.loads(p.read_text()) for p in (out / "runs" / "tecoa").rglob("results.json") if "/test-" in str(p)]
    accuracies = {round(r["datasets"][0]["clean"]["accuracy"], 9) for r in seen}
    assert {
        round(float(r["clean"]), 9)
        for r in rows(out, "runs.csv")
        if r["method"] == "tecoa" and r["evaluation"] == "test"
    } == accuracies
    (mine,) = [
        r for r in rows(out, "differences.csv")
        if (r["method"], r["minus"], r["evaluation"], r["kind"]) == ("teacher", "tecoa", "test", "clean")
    ]  # fmt: skip
    main_runs = [r for r in rows(out, "runs.csv") if r["main"] == "1" and r["evaluation"] == "test"]
    means = {m: sum(float(r["clean"]) for r in main_runs if r["method"] == m) / 2 for m in ("teacher", "tecoa")}
    assert float(mine["difference"]) == pytest.approx(means["teacher"] - means["tecoa"], abs=1e-6)
    assert (mine["seeds"], mine["samples"], mine["best_baseline"]) == ("2", "36", "1")
    curves = rows(out, "curves.csv")
    for method, points in (("teacher", (("1", 1), ("0", 2))), ("less", (("1", 1),))):
        mine = [r for r in curves if r["method"] == method and r["seed"] == "1"]
        lr = mine[0]["setting"].split()[-1]
        assert [(r["main"], r["setting"], r["images"]) for r in mine] == [
            (main, f"steps {steps}, lr {lr}", images) for main, steps in points for images in ("16", "32")
        ]


def test_the_page_says_it_in_words_tables_and_figures(whole):
    file, out = whole
    page = (out / "page" / "study.html").read_text()
    assert "The baseline is “TeCoA”, the best with one teacher or none by validation data" in page
    assert re.search(r"“teacher” (gains on|trades one|loses to|is level with) .* at the tuned settings", page)
    for heading in (
        "What is compared",
        "Accuracy and differences",
        "The front",
        "Robustness over time",
        "Ablations",
        "Cost",
        "Tuning",
    ):
        assert f">{heading}</h2>" in page, heading
    assert page.count("<img") == 4 and "less minus teacher" in page and "At the edge of its grid" in page
    assert "less but for one part" not in page and "teacher but for one part" in page
    assert "Cross-entropy on adversarial images." in page and "teachers: robust (stored)" in page
    assert "pgd; eps 8/255, 2 iterations" in page and "Difference from TeCoA at the same setting" in page
    assert "teacher, steps 2" in (out / "page" / "table-speed.csv").read_text()
    names = {p.name for p in (out / "page").iterdir()}
    assert {"front-test.svg", "curve-seconds.pdf", "table-differences.tex", "table-accuracy.csv"} <= names
    made = json.loads((out / "page" / "made_with.json").read_text())
    assert made["command"] == f"mmtard study {file}" and made["versions"]["torch"] and made["missing"] == []


def test_the_console_shows_the_same_accuracies_and_sentences(whole, capsys):
    file, _ = whole
    found = findings.collect(loading.load(file))
    summary.show(found)
    printed = capsys.readouterr().out
    shown = re.search(r"TeCoA \(baseline\).*", printed)[0]
    mean = sum(found.outcomes["test", run.name].accuracy("clean") for run in found.main["tecoa"].runs) / 2
    assert f"{100 * mean:.1f} ±" in shown and "The baseline is “TeCoA”, the best with one teacher or none" in printed


def test_the_report_of_its_runs_shows_each_and_its_teachers(whole, quick_figures):
    """As the quickstart writes it."""
    file, out = whole
    page = quickstart.report_of_runs(findings.collect(loading.load(file))).read_text()
    assert page.count("attacked image: said to be") >= 1 and "robust teacher" in page and "TeCoA" in page
    assert (out / "runs-report" / "report.html").is_file()


def test_a_second_call_trains_nothing_and_writes_the_same(whole, capsys, quick_figures):
    file, out = whole
    before = {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")}
    numbers = {name: rows(out, name) for name in ("runs.csv", "fronts.csv")}
    assert main(["study", str(file)]) == 0
    assert "[1/" not in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")} == before
    assert {name: rows(out, name) for name in numbers} == numbers


def test_a_damaged_last_checkpoint_is_trained_again_and_measured(whole, tmp_path, monkeypatch, capsys, quick_figures):
    """Its newest whole checkpoint is gone on from, and no accuracy of an earlier step stands for the last one's."""
    monkeypatch.setenv("PYTHONPATH", python_path(without_extras(tmp_path)))
    file, out = whole
    before = rows(out, "runs.csv")
    run = next((out / "runs" / "teacher").rglob("seed-1"))
    weights = run / "checkpoints" / "step-4" / "weights.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    with weights.open("r+b") as file_of_weights:
        file_of_weights.truncate(1000)
    for results in run.rglob("results.json"):
        results.unlink()
    assert main(["study", str(file), "--dry-run"]) == 0
    assert "1 to train" in capsys.readouterr().out
    assert main(["study", str(file)]) == 0
    assert re.search(rf"WARN {run}: step-4: .* has 1000 bytes.*goes on from step-", capsys.readouterr().out)
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == digest and rows(out, "runs.csv") == before


def test_killed_and_stopped_on_the_way_it_ends_with_the_same_numbers(whole, tmp_path, monkeypatch, quick_figures):
    """SIGKILL to the whole in the middle of the tuning, SIGTERM later, then to the end."""
    monkeypatch.setenv("PYTHONPATH", python_path(without_extras(tmp_path)))
    file, out = whole
    content = yaml.safe_load(file.read_text()) | {"out": str(tmp_path / "again")}
    again = write(tmp_path / "again.yaml", content)
    statuses = []
    for number, enough in ((signal.SIGKILL, 3), (signal.SIGTERM, 9)):
        process = subprocess.Popen([sys.executable, "-m", "mmtard", "study", str(again)], stdout=subprocess.DEVNULL)
        end = time.monotonic() + 240
        while len(list((tmp_path / "again").rglob("results.json"))) < enough and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(number)
        statuses.append(process.wait(timeout=120))
    assert statuses == [-signal.SIGKILL, EXIT_REQUEUE]
    assert not (tmp_path / "again" / "page").exists()
    assert main(["study", str(again)]) == 0
    for name in ("runs.csv", "differences.csv", "fronts.csv", "tuning.csv", "curves.csv"):
        assert rows(tmp_path / "again", name) == rows(out, name), name


def test_a_run_that_fails_is_named_with_its_log_and_the_others_stay(tmp_path, vit, capsys, monkeypatch, quick_figures):
    monkeypatch.setenv("PYTHONPATH", python_path(without_extras(tmp_path)))
    content = tree(tmp_path / "out", vit, curve=None, seeds=[0], grid={"tune": {"train.lr": [1e-3]}})
    content["methods"]["teacher"]["settings"]["teachers"]["robust"]["weights"] = str(tmp_path / "gone")
    file = write(tmp_path / "fails.yaml", content)
    assert main(["study", str(file)]) == 2
    told = capsys.readouterr().err
    assert "teacher, lr 0.001, seed 0: " in told and f"{tmp_path}/gone" in told and ".log'. The same command" in told
    assert main(["study", str(file), "--page"]) == 0  # of what is there
    assert "1 runs are not there yet" in (tmp_path / "out" / "page" / "study.html").read_text()
