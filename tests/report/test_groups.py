import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from written import ROWS, dataset, results, save, write_run

from mmtard.report import groups, seeds, sources, tables

CLEAN = [True] * 8 + [False] * 2
A = [True] * 5 + [False] * 5
B = [False] + [True] * 6 + [False] * 3  # loses sample 0, gains 5 and 6


def grouped(tmp_path, *models):
    """Groups of evaluations given as (folder, results); their age is their order."""
    for age, (name, content) in enumerate(models):
        os.utime(save(content, tmp_path / name), (1e9 + age, 1e9 + age))
    found = sources.read([tmp_path / name for name in dict.fromkeys(name.partition("/")[0] for name, _ in models)])
    return found, groups.group(found)


def test_differences_are_paired_and_worked_out_by_hand(tmp_path):
    found, (group,) = grouped(
        tmp_path,
        ("a", results([dataset("X", CLEAN, {"2/255": A})])),
        ("b", results([dataset("X", CLEAN, {"2/255": B})], sha256="b")),
    )
    change = groups.difference(group.models[0]["X"], group.models[1]["X"], "2/255")
    # 1 sample right under a alone, 2 under b alone: +1 of 10; two-sided binomial of (1, 2): 2 (1 + 3) / 8 = 1
    assert (change["difference"], change["only_a"], change["only_b"], change["p"], change["paired"]) == (
        0.1,
        1,
        2,
        1.0,
        True,
    )
    table = tables.pivot(group, found)
    assert table.head[0] == [("", 1), ("a", 2), ("b", 2), ("", 1)]
    ((name, cells),) = table.rows
    assert name == "X" and [c.text for c in cells] == ["80.0", "50.0", "80.0", "60.0", "50.0"]
    assert [c.change for c in cells] == ["", "", "Δ +0.0", "Δ +10.0, p 1", ""]
    assert cells[1].below == "23.7–76.3"  # Wilson's interval of 5 in 10


def test_other_samples_are_compared_without_a_test_and_marked(tmp_path):
    other = dataset("X", CLEAN, {"2/255": B})
    other["samples"]["ids"] = list(range(1, 11))
    found, (group,) = grouped(
        tmp_path, ("a", results([dataset("X", CLEAN, {"2/255": A})])), ("b", results([other], sha256="b"))
    )
    table = tables.pivot(group, found)
    assert table.rows[0][1][3].change == "Δ +10.0*" and any("not the same samples" in note for note in table.notes)


@pytest.mark.parametrize(
    "changes, rows",
    [
        ({"fingerprint": "e" * 64}, ["X (data ffffffff)", "X (data eeeeeeee)"]),
        ({"perturb_at": "native"}, ["X (perturbed at input)", "X (perturbed at native)"]),
        ({"classes": ("green <ring>", "red square")}, ["X (class names", "X (class names"]),
        ({"templates": ["the {}"]}, ["X (prompts", "X (prompts"]),
        (
            {"fingerprint": "e" * 64, "perturb_at": "native"},
            ["X (data ffffffff, perturbed at input)", "X (data eeeeeeee, perturbed at native)"],
        ),
    ],
)
def test_other_data_and_other_ways_of_asking_have_rows_of_their_own(tmp_path, changes, rows):
    x, y = dataset("X", CLEAN, {"2/255": A}), dataset("Y", CLEAN, {"2/255": A})
    other = dataset("X", CLEAN, {"2/255": B}, **changes)
    found, (group,) = grouped(tmp_path, ("a", results([x, y])), ("b", results([other, y], sha256="b")))
    table = tables.pivot(group, found)
    assert len(set(group.datasets)) == 3 and all(
        name.startswith(row) for name, row in zip(group.datasets, [rows[0], "Y", rows[1]], strict=True)
    )
    assert [[c.text for c in cells] for _, cells in table.rows] == [
        ["80.0", "50.0", "–", "–", "50.0"],
        ["80.0", "50.0", "80.0", "50.0", "50.0"],
        ["–", "–", "80.0", "60.0", "50.0"],
    ]
    assert group.shared == ["Y"] and not group.older


def test_imagenet_stays_out_of_a_mean_whatever_its_row_is_called(tmp_path):
    both = [dataset("ImageNet", CLEAN, {"2/255": B}, perturb_at=way) for way in ("input", "native")]
    found, (group,) = grouped(
        tmp_path, ("a", results([both[0], dataset("X", CLEAN, {"2/255": A})])), ("a/2", results([both[1]]))
    )
    assert [c.text for c in dict(tables.pivot(group, found).rows)["mean without ImageNet"]][:2] == ["80.0", "50.0"]


def test_means_are_over_the_datasets_that_all_models_have(tmp_path):
    everything = [dataset(n, CLEAN, {"2/255": f}) for n, f in (("ImageNet", A), ("X", A), ("Y", B))]
    found, (group,) = grouped(tmp_path, ("a", results(everything)), ("b", results(everything[:2], sha256="b")))
    rows = dict(tables.pivot(group, found).rows)
    assert [c.text for c in rows["Y"]] == ["80.0", "60.0", "–", "–", "50.0"]
    assert [c.text for c in rows["mean of 2"]][:4] == ["80.0", "50.0", "80.0", "50.0"]
    assert [c.text for c in rows["mean without ImageNet"]][:4] == ["80.0", "50.0", "80.0", "50.0"]
    alone = groups.mean([group.models[0][n] for n in ("X", "Y")], "2/255")
    assert alone == pytest.approx(np.mean([0.5, 0.6])) and groups.mean([group.models[0]["X"]], "8/255") is None


def test_only_what_was_measured_alike_shares_a_table(tmp_path):
    x = [dataset("X", CLEAN, {"2/255": A})]
    _, found = grouped(
        tmp_path,
        ("a", results(x)),
        ("b", results(x, sha256="b", batch_size=8, sanity=True, eps=["2/255"])),
        ("c", results(x, sha256="c", iters=10)),
        ("d", results(x, sha256="d", protocol="quick")),
    )
    assert [[i for i, model in enumerate(g.models) if model] for g in found] == [[0, 1], [2], [3]]


def test_the_newest_evaluation_stands_and_older_ones_are_named(tmp_path):
    old, new = results([dataset("X", CLEAN, {"2/255": A})]), results([dataset("X", CLEAN, {"2/255": B})])
    found, (group,) = grouped(tmp_path, ("a/old", old), ("a/new", new))
    assert group.models[0]["X"].eps["2/255"].robust.accuracy == 0.6
    assert group.older == [f"a, X: {tmp_path}/a/old/results.json ({tmp_path}/a/new/results.json is newer)"]
    assert "older evaluation of a, X" in tables.pivot(group, found).notes[-1]


def test_details_show_what_each_attack_left(tmp_path):
    found, (group,) = grouped(tmp_path, ("a", results([dataset("X", CLEAN, {"4/255": B, "2/255": A})])))
    table = tables.details(found[0].evaluations[0].zeroshot, "all")
    by_eps = {cells[0].text: [c.text for c in cells] for _, cells in table.rows}
    # after apgd-ce every second of the samples that fall is still up: 5 and 7 of A's, 7 of B's
    assert by_eps["2/255"] == ["2/255", "80.0", "80.0", "70.0", "50.0", "50.0", "25.0", "50.0", "16x16"]
    assert by_eps["4/255"][3:6] == ["70.0", "60.0", "60.0"]
    assert group.eps == ["2/255", "4/255"] and json.dumps(table.head)


def test_retrieval_has_a_row_for_each_direction_and_k(tmp_path):
    def captions(r):
        recall = {
            d: {k: {"accuracy": r, "interval95": [0, 1], "n": 10} for k in ("1", "5")}
            for d in ("image_to_text", "text_to_image")
        }
        return {
            "name": "COCO",
            "kind": "retrieval",
            "data": "d",
            "fingerprint": "f",
            "n_total": 10,
            "clean_all": recall,
            "clean": recall,
            "eps": {"2/255": {"recall": recall}},
        }

    found, (group,) = grouped(tmp_path, ("a", results([captions(0.5)])), ("b", results([captions(0.4)], sha256="b")))
    rows = dict(tables.retrieval(group, found).rows)
    assert list(rows) == [f"COCO, {d}, recall@{k}" for d in ("image to text", "text to image") for k in (1, 5)]
    assert [(c.text, c.change) for c in rows["COCO, image to text, recall@5"]] == [
        ("50.0", ""),
        ("50.0", ""),
        ("40.0", "Δ -10.0"),
        ("40.0", "Δ -10.0"),
    ]
    assert group.datasets == []


def test_seeds_of_one_training_have_their_mean_and_spread(tmp_path):
    """0.5, 0.6 and 0.7 robust: mean 60.0, standard deviation 10.0; a run with another lr is no seed of it."""
    for i, (seed, lr) in enumerate(((0, 1e-3), (1, 1e-3), (2, 1e-3), (3, 1e-4))):
        run = write_run(tmp_path / f"b32-seed{seed}", ROWS[:1], None)
        content = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump({**content, "seed": seed, "train": {"lr": lr}}))
        flags = [n < 5 + i for n in range(10)]
        save(results([dataset("X", [True] * 10, {"2/255": flags})], str(run), str(i)), run / "evaluations" / "x")
    found = sources.read([tmp_path])
    (group,) = groups.group(found)
    assert seeds.families(found) == [[0, 1, 2]]
    table = seeds.means(group, found, "seeds-0")
    assert table.head[0] == [("", 1), ("b32", 2)]
    assert [(name, [(c.text, c.below) for c in cells]) for name, cells in table.rows] == [
        ("X", [("100.0 ± 0.0", "3 seeds"), ("60.0 ± 10.0", "3 seeds")])
    ]
    assert seeds.means(group, sources.read([tmp_path / "b32-seed0"]), "") is None


def test_a_strangers_configuration_that_unfolds_without_end_is_of_no_family():
    """Aliases of aliases: a few hundred bytes that are 10**12 values, once written out."""
    text = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 13))
    runs = [sources.ReportSource(str(i), Path(), config=f"seed: {i}\n{text}", evaluations=[None]) for i in range(2)]
    assert seeds.families(runs) == []
