"""`mmtard compare`: paired differences on the same samples, and a refusal of everything that is not a pair."""

import copy
import csv
import io
import json
import math
import os
import random

import numpy as np
import pytest
from saved_checkpoints import save
from scipy.stats import binomtest

from mmtard.errors import UserError
from mmtard.evaluation.compare import compare_all, means
from mmtard.evaluation.comparison_tables import as_csv, as_latex
from mmtard.evaluation.statistics import mcnemar, newcombe_interval, paired_difference
from mmtard.runs.checkpoint_writer import Checkpoints


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (0, 1), (3, 3), (1, 9), (40, 12), (0, 5000), (510, 600)])
def test_mcnemars_exact_p_is_that_of_a_binomial_test(only_a, only_b):
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand():
    # 1 against 5: 2 * (C(6,0) + C(6,1)) / 2^6 = 14/64
    assert mcnemar(1, 5) == mcnemar(5, 1) == 14 / 64


def test_a_difference_that_unpaired_intervals_hide():
    """Two models that differ on 30 of 1000 samples, all one way: their own intervals overlap, the pairs do not."""
    a = [True] * 500 + [False] * 500
    b = [True] * 530 + [False] * 470
    found = paired_difference(a, b)
    low, high = found["interval95"]
    assert 0.015 < low < found["difference"] == 0.03 < high < 0.05
    assert (found["only_a"], found["only_b"], found["p"]) == (0, 30, 2 * 0.5**30)
    assert 1.959964 * math.sqrt(0.25 / 1000) * 2 > 0.03


@pytest.mark.parametrize("both, only_a, only_b, neither, low, high", [
    # Airway hyper-responsiveness before and after transplantation (Bentur et al. 2009), in Fagerland, Lydersen & Laake,
    # Statistics in Medicine 33 (2014).
    (1, 7, 1, 12, -0.507, -0.026),
    # Nothing differs, all right: phi is 0, both Wilson intervals end at n / (n + z^2).
    (40, 0, 0, 0, -(1.959964**2) / (40 + 1.959964**2), 1.959964**2 / (40 + 1.959964**2)),
])  # fmt: skip
def test_the_interval_of_a_paired_difference_is_newcombes(both, only_a, only_b, neither, low, high):
    counts = (both, only_a, only_b, neither)
    a, b = (
        [side for side, n in zip(sides, counts) for _ in range(n)]
        for sides in ([True, True, False, False], [True, False, True, False])
    )
    assert paired_difference(a, b)["interval95"] == pytest.approx([low, high], abs=5e-4 if only_a else 1e-12)
    assert paired_difference(b, a)["interval95"] == pytest.approx([-high, -low], abs=5e-4 if only_a else 1e-12)


@pytest.mark.parametrize(
    "both, neither, a_alone, b_alone",
    [(0.5, 0.4, 0.05, 0.05), (0.3, 0.68, 0.0, 0.02), (0.9, 0.1, 0.0, 0.0), (0.2, 0.2, 0.2, 0.4)],
)
def test_the_interval_of_a_paired_difference_holds_the_true_one_as_often_as_it_says(both, neither, a_alone, b_alone):
    """Of 2000 drawn tables of 100 pairs; Wald's is of no width in each where nothing differs."""
    tables = np.random.default_rng(0).multinomial(100, [both, a_alone, b_alone, neither], size=2000)
    intervals = [newcombe_interval(*map(int, table[:3]), 100) for table in tables]
    assert np.mean([low <= b_alone - a_alone <= high for low, high in intervals]) > 0.94 and all(
        high - low > 0.01 for low, high in intervals
    )


RESULTS = {
    "format": 2,
    "settings": {"norm": "linf", "eps": ["2/255"], "attacks": ["apgd-ce"], "batch_size": 64},
    "datasets": [{
        "name": "pets", "kind": "zeroshot", "fingerprint": "f", "classes": ["cat", "dog"], "templates": ["a {}"],
        "perturb_at": "input", "perturbed_size": [32, 32], "replaced": 0,
        "eps": {"2/255": {}},
        "samples": {
            "ids": [1, 4, 5], "labels": [0, 1, 0], "clean": [True, True, False],
            "eps": {"2/255": {"robust": [True, False, False]}},
        },
    }],
}  # fmt: skip


@pytest.fixture
def pair(tmp_path):
    """Call with a change of the second results: the paths of both."""

    def write(change=lambda r: None):
        other = copy.deepcopy(RESULTS)
        change(other)
        for name, content in (("a", RESULTS), ("b", other)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "results.json").write_text(json.dumps(content))
        return tmp_path / "a", tmp_path / "b" / "results.json"

    return write


def test_each_dataset_and_eps_has_its_row(pair, command, capsys):
    def change(other):
        other["settings"] |= {"batch_size": 8, "sanity": True}  # say how fast and what else, not what
        other["datasets"][0]["samples"]["eps"]["2/255"]["robust"] = [False, True, True]

    a, b = pair(change)
    clean, other_clean, robust, other_robust = compare_all([a, b])
    assert (clean.eps, other_clean.difference["difference"], other_clean.difference["p"]) == (None, 0, 1.0)
    assert (robust.eps, robust.accuracy, other_robust.accuracy) == ("2/255", 1 / 3, 2 / 3)
    found = other_robust.difference
    assert (found["only_a"], found["only_b"], found["p"]) == (1, 2, 1.0)
    assert command("compare", a, b) == 0 and "+33.33" in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    (
        lambda r: r["settings"].update(norm="l2"),
        "measured otherwise: norm is linf and l2; evaluate both with the same settings",
    ),
    (lambda r: r["datasets"][0].update(fingerprint="g"), "pets: fingerprint differs, f and g"),
    (lambda r: r["datasets"][0].update(templates=["the {}"]), r"pets: templates\[0\] differs, a {} and the {}"),
    (
        lambda r: r["datasets"][0].update(classes=["cat", "hound"]),
        r"pets: classes\[1\] differs, dog and hound; evaluate both on the same data in the same way",
    ),
    (
        lambda r: r["datasets"][0].update(classes=["cat", "dog", "cow"]),
        r"pets: classes differs, \['cat', 'dog'\] and \['cat', 'dog', 'cow'\]",
    ),
    (
        lambda r: r["datasets"][0]["samples"].update(ids=[1, 4, 6]),
        "pets: samples.ids differ; evaluate both with the same --n-samples and --seed",
    ),
    (lambda r: r["datasets"][0].update(name="cars"), "have other datasets: cars, pets stands in one alone"),
    (lambda r: r.update(format=1), "has format 1, this version reads 2"),
])  # fmt: skip
def test_what_is_no_pair_is_refused_by_name(pair, change, message):
    with pytest.raises(UserError, match=message):
        compare_all([*pair(change)])


@pytest.fixture
def runs(tmp_path):
    """Call with {run: {name of an evaluation: change of the results}}: run folders with these evaluations."""

    def write(**evaluations):
        for run, changes in evaluations.items():
            (tmp_path / run / "checkpoints").mkdir(parents=True)
            for name, change in changes.items():
                content = copy.deepcopy(RESULTS) | {"model": {"weights": str(tmp_path / run)}}
                change(content)
                folder = tmp_path / name if "/" in name else tmp_path / run / "evaluations" / name
                folder.mkdir(parents=True)
                (folder / "results.json").write_text(json.dumps(content))
        return [tmp_path / run for run in evaluations]

    return write


def robust(*flags):
    return lambda r: r["datasets"][0]["samples"]["eps"]["2/255"].update(robust=list(flags))


def test_runs_are_compared_by_the_evaluations_that_match_wherever_they_lie(runs, tmp_path, command, capsys):
    other = {"loose": lambda r: r["settings"].update(iters=3)}
    a, b, c = runs(
        a={"x": robust(True, False, False), **other},
        b={"y": robust(False, True, True), "damaged": lambda r: r.update(datasets=5)},
        c={"elsewhere/c": robust(True, True, True)},
    )
    rows = compare_all([a, b, c])
    assert [(r.eps, r.label, round(r.accuracy, 3)) for r in rows] == [
        (None, "a", 0.667), (None, "b", 0.667), (None, "c", 0.667),
        ("2/255", "a", 0.333), ("2/255", "b", 0.667), ("2/255", "c", 1.0),
    ]  # fmt: skip
    assert [r.difference and (r.difference["only_a"], r.difference["only_b"]) for r in rows[3:]] == [
        None,
        (1, 2),
        (0, 2),
    ]
    files = tmp_path / "t.csv", tmp_path / "t.tex"
    assert command("compare", a, b, c, "--labels", "A", "B [x]", "C_1", "--csv", files[0], "--latex", files[1]) == 0
    printed = capsys.readouterr().out
    assert "B [x]" in printed and "+66.67" in printed and f"C_1: {tmp_path / 'elsewhere' / 'c'}" in printed
    lines = list(csv.DictReader(files[0].open()))
    assert [(r["model"], r["eps"], r["only_this"]) for r in lines][-1] == ("C_1", "2/255", "2") and len(lines) == 6
    assert r"C\_1 & 66.67 & 100.00 \\" in files[1].read_text().splitlines()


def test_an_evaluation_that_is_named_is_not_taken_for_its_runs_own_as_well(runs, tmp_path):
    """A run measured twice, once into a folder of its own: the newer one, which is named, is no pair with itself."""
    [a] = runs(a={"x": robust(True, False, False), "elsewhere/quick": robust(True, True, True)})
    named = tmp_path / "elsewhere" / "quick"
    rows = [r for r in compare_all([a, named]) if r.eps]
    assert [round(r.accuracy, 3) for r in rows] == [0.333, 1.0] and rows[0].path != rows[1].path
    assert [round(r.accuracy, 3) for r in compare_all([named, a]) if r.eps] == [1.0, 0.333]


def test_the_checkpoint_of_the_last_step_is_the_run_itself_and_one_on_the_way_is_not(runs, tmp_path):
    """A study measures the checkpoints by their names."""
    steps = {name: tmp_path / "a" / "checkpoints" / f"step-{n}" for name, n in (("last", 8), ("way", 4))}

    def of(name, *flags):
        return lambda r: (robust(*flags)(r), r["model"].update(weights=str(steps[name])))

    of_a = {"last": of("last", True, True, False), "way": of("way", True, False, False)}
    [a, b] = runs(a=of_a, b={"x": robust(True, True, False)})
    for step in steps.values():
        save(Checkpoints(a, keep_last=9), int(step.name[5:]))
    os.utime(a / "evaluations" / "last" / "results.json", (1e9, 1e9))  # measured again later: the one on the way
    assert [round(r.accuracy, 3) for r in compare_all([a, b]) if r.eps][0] == 0.667


def test_runs_of_one_label_are_averaged(runs):
    flags = {"a0": (True, False, False), "a1": (True, True, False), "b0": (True, True, True)}
    paths = runs(**{run: {"x": robust(*of)} for run, of in flags.items()})
    rows = compare_all(paths, ["ARD", "ARD", "MMT"])
    found = {(m.label, m.eps): m for m in means(rows)}
    ard = found["ARD", "2/255"]
    # of 1/3 and 2/3: the mean is 1/2, the sample's standard deviation sqrt(2 * (1/6)^2)
    assert (ard.runs, ard.accuracy) == (2, 0.5) and ard.deviation == pytest.approx(math.sqrt(2) / 6)
    assert (found["MMT", "2/255"].runs, found["MMT", "2/255"].deviation) == (1, 0.0)
    assert r"ARD & 66.67 $\pm$ 0.00 & 50.00 $\pm$ 23.57 \\" in as_latex(rows)
    assert [r["runs"] for r in csv.DictReader(io.StringIO(as_csv(rows)))] == ["1"] * 6 + ["2", "1"] * 2


def test_evaluations_of_one_run_are_no_seeds_of_one_another(runs, command, tmp_path, capsys):
    """Two runs, each measured by two protocols: two comparisons, with names of their own."""

    def fare(*flags):
        return lambda r: (r["settings"].update(iters=100), robust(*flags)(r))

    a, b = runs(
        a={"quick": robust(True, False, False), "fare": fare(True, True, True)},
        b={"quick": robust(True, True, False), "fare": fare(False, False, False)},
    )
    rows = compare_all([a, b])
    assert means(rows) == []
    assert {r["dataset"] for r in csv.DictReader(io.StringIO(as_csv(rows)))} == {"pets (fare)", "pets (quick)"}
    lines = [line.removesuffix(r" \\").split(" & ") for line in as_latex(rows).splitlines() if " & " in line]
    latex = {column[0]: column[1:] for column in zip(*lines)}
    assert latex == {
        "": ("a", "b"),
        "pets (quick) clean": ("66.67", "66.67"),
        "pets (quick) 2/255": ("33.33", "66.67"),
        "pets (fare) clean": ("66.67", "66.67"),
        "pets (fare) 2/255": ("100.00", "0.00"),
    }
    assert command("compare", a, b) == 0 and "pets (quick)" in capsys.readouterr().out
    seeds = {(m.against.parent.name, m.eps): m for m in means(compare_all([a, b], ["A", "A"]))}
    assert [(seeds[at, "2/255"].runs, seeds[at, "2/255"].accuracy) for at in ("fare", "quick")] == [(2, 0.5), (2, 0.5)]


def test_where_the_weights_of_transfer_lay_is_no_difference_but_which_they_were_is(runs):
    def follows(weights, sha256):
        return lambda r: r["settings"].update(transfer_from={"weights": weights, "sha256": sha256})

    a, b, c = runs(
        a={"x": follows("here", "0")},
        b={"x": follows("there", "0")},
        c={"x": follows("here", "1")},
    )
    assert len(compare_all([a, b])) == len(compare_all([r / "evaluations" / "x" for r in (a, b)])) == 4
    with pytest.raises(UserError, match="transfer_from is {'sha256': '0'} and {'sha256': '1'}"):
        compare_all([a, c])


@pytest.mark.parametrize("change, message", [
    (lambda r: r["settings"].update(norm="l2"), "no evaluation of '.*b' matches one of '.*a': .* norm is linf and l2"),
    (lambda r: r["datasets"][0].update(fingerprint="g"), "matches one of '.*a': pets: fingerprint differs, f and g"),
    (lambda r: r["datasets"][0].update(name="cars"), "'.*a' and '.*b' have no evaluation in common; evaluate both"),
    (lambda r: r.update(datasets=5), "'.*b' has no evaluation that can be compared .'.*results.json' is damaged"),
])  # fmt: skip
def test_runs_without_a_match_are_told_what_differs(runs, change, message):
    with pytest.raises(UserError, match=message):
        compare_all(runs(a={"x": lambda r: None}, b={"x": change}))


def test_labels_of_another_number_and_a_single_run_are_refused(runs):
    a, b = runs(a={"x": lambda r: None}, b={"x": lambda r: None})
    with pytest.raises(UserError, match="--labels: 1 labels for 2 runs"):
        compare_all([a, b], ["A"])
    with pytest.raises(UserError, match="needs two or more"):
        compare_all([a])


def _places(value, at=()):
    yield at
    first_three = list(enumerate(value))[:3] if isinstance(value, list) else []
    for key, below in value.items() if isinstance(value, dict) else first_three:
        yield from _places(below, (*at, key))


def test_damaged_results_are_one_line_wherever_they_are_damaged(tmp_path):
    """One value of results.json after another is taken away or replaced by one of another kind."""
    rng, good = random.Random(0), copy.deepcopy(RESULTS)
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "good" / "results.json").write_text(json.dumps(good))
    values = (None, 1, -1, 1e308, "x", "", [], {}, True, [None], {"a": 1}, "../../x", "9" * 400)
    refused = 0
    for place in [place for place in _places(good) if place] * 6:
        bad = copy.deepcopy(good)
        *above, last = place
        inner = bad
        for key in above:
            inner = inner[key]
        if rng.random() < 0.2:
            del inner[last]
        else:
            inner[last] = rng.choice(values)
        (tmp_path / "bad" / "results.json").write_text(json.dumps(bad))
        for pair in (("good", "bad"), ("bad", "good")):
            try:
                compare_all([tmp_path / name for name in pair])
            except UserError as error:
                refused += "\n" not in str(error)
    assert refused > 150
