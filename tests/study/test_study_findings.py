"""What a study says of results whose answer is known; nothing is trained."""

import csv
import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_study import results, tree, write

from mmtard.errors import UserError
from mmtard.study import findings, gains, loading, measures, records, runs, tables, verdict
from mmtard.study.collect import Outcome, cost, same_samples

N = 40  # samples
# (method, point) -> clean and robust accuracy in 40ths
ACCURACY = {
    ("tecoa", 0): (20, 16), ("tecoa", 1): (24, 12),
    ("other", 0): (26, 14), ("other", 1): (30, 8),
    ("teacher", 0): (25, 16), ("teacher", 1): (28, 12),
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory, vit):
    """Three methods, two of them baselines, at two points of the front with two seeds; one learning rate."""
    folder = tmp_path_factory.mktemp("findings")
    content = tree(folder / "out", vit, grid={"tune": {"train.lr": [1e-3]}, "vary": tree("", vit)["grid"]["vary"]})
    content["methods"]["other"] = {"baseline": True, "settings": {"method": {"name": "trades"}}}
    study = loading.load(write(folder / "study.yaml", content | {"curve": None}))
    for run in runs.all_runs(study).values():
        clean, robust = ([i < n for i in range(N)] for n in ACCURACY[run.method, run.point.number])
        for m in measures.of_run(study, run, tuning=True, chosen=False):
            # On validation data, tecoa is the best of the baselines.
            results(m.out, *([[run.method == "tecoa"] * N] * 2 if "validation" in m.out.name else [clean, robust]))
    return findings.collect(study)


def test_a_front_is_held_against_the_baselines_and_against_all_of_them_together(found):
    assert found.baseline == "tecoa" and not found.missing
    of = gains.front_gains(found, "test", "teacher")
    # Where tecoa is as robust as at its tuned settings, 16 of 40: itself 20 clean; no other baseline is so robust.
    assert of.at_equal.value == pytest.approx(5 / 40) and of.at_equal_all.value == pytest.approx(5 / 40)
    # The other baseline is less robust, so alone it has no point there; together with tecoa it has tecoa's.
    assert gains.front_gains(found, "test", "other").at_equal is None
    assert gains.front_gains(found, "test", "tecoa") == gains.Gains(gains.front_gains(found, "test", "tecoa").area)


def test_the_joint_front_of_baselines_lies_as_far_out_as_the_best_of_them(found):
    """At a robustness that both have, the better one counts."""
    states = {m: [s for s in found.states if s.method == m] for m in ("tecoa", "other", "teacher")}
    joint = [[found.accuracy("test", s, k) for k in ("clean", "robust")] for s in states["tecoa"] + states["other"]]
    points = gains._points(found, "test", ["tecoa", "other"])[0]
    assert sorted(map(tuple, points)) == sorted(map(tuple, np.array(joint)))
    ours = gains._points(found, "test", ["teacher"])
    at = (14 / 40, np.full(len(ours[1]), 14 / 40))
    alone = gains._at_equal(ours, gains._points(found, "test", ["tecoa"]), at)
    together = gains._at_equal(ours, gains._points(found, "test", ["tecoa", "other"]), at)
    # teacher at 14: between (25, 16) and (28, 12), so 26.5; tecoa 22, and the other one 26.
    assert (alone.value, together.value) == (pytest.approx(4.5 / 40), pytest.approx(0.5 / 40))
    assert alone.low <= alone.value <= alone.high


def test_each_setting_of_a_method_is_held_against_each_of_the_best_baselines(found):
    rows = list(csv.DictReader(io.StringIO(records.files(found, "mmtard study x")["settings.csv"])))
    number, place = {"steps 1": 0, "steps 2": 1}, {"clean": 0, "robust": 1}
    assert len(rows) == 2 * 2 * 2 * 2 * 2  # methods, their settings, the baseline's, evaluations, kinds
    assert {row["method"] for row in rows} == {"teacher", "other"} and {row["minus"] for row in rows} == {"tecoa"}
    for row in rows:
        ours = ACCURACY[row["method"], number[row["setting"]]][place[row["kind"]]]
        theirs = ACCURACY["tecoa", number[row["minus_setting"]]][place[row["kind"]]]
        assert float(row["difference"]) * N == pytest.approx(ours - theirs)


def test_methods_are_compared_at_each_setting_of_the_front(found):
    rows = list(csv.DictReader(io.StringIO(records.files(found, "mmtard study x")["matched.csv"])))
    assert len(rows) == 2 * 6 * 2 * 2  # points, pairs, evaluations, kinds
    said = {
        (r["setting"], r["method"], r["minus"], r["kind"]): float(r["difference"]) * N
        for r in rows
        if r["evaluation"] == "test"
    }
    assert said["steps 2", "teacher", "tecoa", "clean"] == pytest.approx(4)
    assert said["steps 2", "teacher", "tecoa", "robust"] == pytest.approx(0)
    assert said["steps 1", "teacher", "other", "robust"] == pytest.approx(2)
    assert all(r["seeds"] == "2" and r["samples"] == str(N) for r in rows)
    shown = tables.matched(found)
    assert [name for name, _ in shown.rows] == [
        "steps 1: teacher", "steps 1: other", "steps 2: teacher", "steps 2: other",
    ]  # fmt: skip
    assert shown.rows[2][1][0].text == "+10.0" and shown.rows[2][1][0].below.startswith("+")


def test_the_sentences_name_the_joint_front(found):
    (said,) = [said for said in verdict.verdict(found) if said.line.startswith("“teacher” ")]
    (line,) = [line for line in said.more if "on test" in line]
    assert "; at the baseline's robust accuracy +12.5 points (" in line
    assert line.endswith(" against all baselines together.")
    assert "  " + line in verdict.lines(found)


def test_of_one_seed_the_first_sentence_is_that_the_models_are_judged(found):
    states = [dataclasses.replace(s, runs=s.runs[:1]) for s in found.states]
    one = verdict.lines(dataclasses.replace(found, states=states, gains={}))
    assert "judged over samples alone, so of these models, not of the methods" in one[0]
    assert not any("judged over samples alone" in line for line in verdict.lines(found))


def test_a_front_counts_no_setting_with_fewer_seeds_than_others(found):
    """A setting that only the tuning tried has one seed."""
    (state,) = [s for s in found.states if s.method == "teacher" and s.point.number == 1]
    few = dataclasses.replace(state, runs=state.runs[:1])
    one = dataclasses.replace(found, states=[few if s is state else s for s in found.states], gains={})
    assert [s.point.number for s in one.front_states("teacher")] == [0]
    assert gains.front_gains(one, "test", "teacher").area == pytest.approx(25 * 16 / N**2)
    assert "teacher, 1 setting" in [name for name, _ in tables.fronts(one)[0].rows]
    assert not any("front" in line for s in verdict.verdict(one) if "“teacher”" in s.line for line in s.more)


def test_a_page_half_way_needs_no_front_of_the_baseline(found):
    """Its main setting has fewer seeds so far than others have."""
    states = [dataclasses.replace(s, runs=s.runs[:1]) if s.method == "tecoa" and s.main else s for s in found.states]
    one = dataclasses.replace(found, states=states, gains={})
    assert one.baseline == "tecoa" and gains.front_gains(one, "test", "teacher").area_gain is None
    assert tables.fronts(one) and verdict.lines(one)


def test_a_front_that_lacks_a_setting_is_compared_with_no_whole_one(found):
    """Of fewer points it dominates less, whatever the method is worth; a joint front that lacks one is too easy."""
    few = {
        method: [s for s in found.states if s.method != method or s.point.number == 0]
        for method in ("teacher", "other")
    }
    half = dataclasses.replace(found, states=few["teacher"], gains={})
    assert gains.front_gains(half, "test", "teacher") == gains.Gains(pytest.approx(25 * 16 / N**2))
    assert gains.front_gains(half, "test", "other").area_gain is not None
    for states in (few["other"], [s for s in found.states if s.method != "other"]):
        of = gains.front_gains(dataclasses.replace(found, states=states, gains={}), "test", "teacher")
        assert of.at_equal.value == pytest.approx(5 / 40) and of.at_equal_all is None
    rows = csv.DictReader(io.StringIO(records.files(half, "mmtard study x")["fronts.csv"]))
    said = {row["method"]: (row["settings"], row["area_minus_baseline"]) for row in rows if row["evaluation"] == "test"}
    assert said["teacher"] == ("1", "") and said["tecoa"][0] == said["other"][0] == "2"
    assert said["other"][1] != ""


def test_failed_checks_and_overfitted_trainings_are_told_with_what_was_found(found):
    assert not any("believed" in line for line in verdict.lines(found))
    (name, run), outcome = next(iter(found.outcomes.items()))
    bad = dataclasses.replace(outcome, failed=("NaN (3 of 40 samples)",))
    events = Path(found.study.out) / "runs" / run / "events.jsonl"
    events.write_text('{"step": 3, "event": "alarm: catastrophic overfitting", "attack_steps_from_now_on": 3}\n')
    told = verdict.lines(dataclasses.replace(found, outcomes=found.outcomes | {(name, run): bad}))
    rows = csv.DictReader(io.StringIO(records.files(found, "mmtard study x")["runs.csv"]))
    events.unlink()
    assert sum(row["alarms"] == "1" for row in rows) == 2  # of one run, a row for each evaluation
    at = told.index("Before these numbers are believed:")
    assert told[at + 1] == f"  The evaluation {name} of {run} fails its check of health: NaN (3 of 40 samples)."
    assert told[at + 2].endswith(" overfitted to its one-step attack at step 3, 3 attack steps from then on.")


def test_the_time_of_storing_that_no_process_of_the_study_did_is_not_called_none(found):
    one = runs.all_runs(found.study)[found.main["teacher"].runs[0].name]
    config = runs.configuration(found.study, one)
    assert found.cost(one).stored == 0 and found._storing({("robust", config.teachers["robust"].weights)}) is None
    (row,) = [cells for name, cells in tables.costs(found).rows if name == "teacher"]
    assert row[-1].text == "–"


def test_models_that_were_measured_on_other_data_are_not_compared(tmp_path):
    """Other data of as many samples have the same sample ids."""
    one, other = (Outcome((0, 1), np.ones(2, bool), np.ones(2, bool), 0.5, fingerprint) for fingerprint in "ab")
    same_samples({"a": one, "b": one})
    with pytest.raises(UserError, match="'a' and 'b' were measured on other samples, so that no difference"):
        same_samples({"a": one, "b": other})


def write_metrics(run, steps):
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "seconds": 2}}\n' for n in steps))


def test_steps_without_metrics_leave_the_seconds_unknown_and_the_images_as_they_are(tmp_path):
    write_metrics(tmp_path, (1, 2, 4, 5))
    spent = cost(tmp_path, 5, 8)
    assert np.isnan(spent.seconds) and spent.images == 40
    assert spent.by_step[2] == 4 and np.isnan(spent.by_step[4]) and np.isnan(spent.by_step[5])


def test_a_method_whose_metrics_have_gaps_has_a_question_mark_and_no_time_in_its_curve(found, monkeypatch):
    state, outcome = found.main["teacher"], found.outcomes["test", found.main["teacher"].runs[0].name]
    monkeypatch.setattr(findings, "on_the_way", lambda *_: [SimpleNamespace(out=Path(f"step-{n}")) for n in (2, 4)])
    monkeypatch.setattr(findings, "outcome", lambda _: outcome)
    folders = [Path(found.study.out) / "runs" / run.name for run in state.runs]
    made, seconds = [folder / "metrics.jsonl" for folder in folders], []
    for steps in [(1, 2, 3, 4), (1, 2, 4)]:  # of the last run, then of both
        write_metrics(folders[0], (1, 2, 3, 4) if not seconds else (1, 3, 4))
        write_metrics(folders[1], steps)
        (row,) = [cells for name, cells in tables.costs(found).rows if name == "teacher"]
        curves = [line for line in csv.DictReader(io.StringIO(records._curves(found))) if line["method"] == "teacher"]
        seconds.append(([cell.text for cell in row[2:4]], [line["seconds"] for line in curves[:4]]))
    for path in made:
        path.unlink()
    assert seconds[0] == (["8 ± 0", "4 ± 0"], ["4.0", "8.0"] * 2)
    assert seconds[1] == (["?", "?"], ["nan"] * 4)


def test_a_run_whose_attack_grew_costs_the_mean_of_its_steps(tmp_path):
    """As after an alarm, late in the run."""
    rows = [
        {"step": n, "seconds": 1, "tflops_a_rank": 2e-3 if n < 4 else 6e-3, "images_per_s": 10} for n in range(1, 5)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cost(tmp_path, 4, 8).gflop == pytest.approx(0.3)


def test_a_damaged_row_of_metrics_costs_nothing_else(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 2}\n{}\n{"step": 2, "seconds": 3}\n')
    assert (cost(tmp_path, 2, 8).seconds, cost(tmp_path, 2, 8).images) == (5, 16)
