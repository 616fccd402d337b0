"""`--sanity`: checks that need attacks of their own, by themselves or added to what is measured."""

import json
import re

import pytest
from tiny_datasets import COLOURS, strip_seconds, write

from mmtard.attacks import checks, ensemble
from mmtard.evaluation import results, retrieval, zeroshot
from mmtard.evaluation.compare import compare_all
from mmtard.models import image_tower


def test_the_costly_checks_see_every_class_and_are_not_made_twice(measure, tmp_path, monkeypatch):
    seen = []

    def sanity(model, images, labels, seeds, settings, source, halving):
        seen.append((labels.tolist(), settings.eps))
        return [{"check": "batch size", "status": "WARN", "detail": "differs"}]

    monkeypatch.setattr(checks, "sanity", sanity)
    monkeypatch.setattr(checks, "SANITY_SAMPLES", 2)
    ordered = write(tmp_path / "ordered", 40, label=lambda i, n: i * n // 40)
    (entry,) = measure(ordered, iters=1, sanity=True)["datasets"]
    right = {y for y, clean in zip(entry["samples"]["labels"], entry["samples"]["clean"]) if clean}
    assert (
        len(seen) == 1 and seen[0][1] == 4 / 255 and len(seen[0][0]) == 2 and len(set(seen[0][0])) == min(2, len(right))
    )
    assert entry["health"][-1]["check"] == "batch size"


@pytest.mark.slow
def test_the_costly_checks_take_no_more_images_at_once_than_the_evaluation(colours, measure, tmp_path, monkeypatch):
    sizes, forward = [], image_tower.ImageTower.forward
    monkeypatch.setattr(
        image_tower.ImageTower,
        "forward",
        lambda self, images, *args: sizes.append(len(images)) or forward(self, images, *args),
    )
    lines = {}
    for limit in (100, 3):
        sizes.clear()
        (entry,) = measure(colours, tmp_path / str(limit), attacks=("pgd",), iters=2, sanity=True, batch_size=limit)[
            "datasets"
        ]
        lines[limit] = {line["check"]: line["detail"] for line in entry["health"]}
        assert max(sizes) == min(limit, 48)
        at = {100: r"\d+ at 1, \d+ at 8, \d+ at 64", 3: r"\d+ at 1, \d+ at 3"}[limit]
        assert re.fullmatch(rf"broken of \d+: {at}; logits differ by .*", lines[limit].pop("batch size"))
    assert lines[100] == lines[3] and "random noise weaker than the attack" in lines[3]


@pytest.mark.slow
def test_sanity_is_added_to_what_is_measured_and_stays(measure, tmp_path, monkeypatch):
    """With --sanity a finished evaluation is the same one: its attacks, of hours, are not made again."""
    write(tmp_path / "root" / "colours", 24)
    write(tmp_path / "root" / "flickr", 6, captions=lambda i: f"a picture {i}")
    (tmp_path / "root" / "flickr" / "dataset_type.txt").write_text("retrieval\n")
    root, out, said = tmp_path / "root", tmp_path / "out" / "results.json", []
    at_once = measure(root, tmp_path / "at once", sanity=True)
    plain = measure(root)
    assert plain["settings"] == at_once["settings"] and [d["sanity"] for d in plain["datasets"]] == [False, False]
    compare_all([tmp_path / "at once", tmp_path / "out"])
    for module, name in ((zeroshot, "measure"), (retrieval, "measure"), (ensemble, "run_attacks")):
        monkeypatch.setattr(module, name, None)  # measuring again would fail
    added = measure(root, sanity=True, say=said.append)
    assert "colours: is measured, the checks of --sanity are added" in said and not any(
        "replaced" in line for line in said
    )
    assert [strip_seconds(d) for d in added["datasets"]] == [strip_seconds(d) for d in at_once["datasets"]]
    assert (
        added["datasets"][0]["health"][: len(plain["datasets"][0]["health"])] == plain["datasets"][0]["health"]
        and added["datasets"][0]["sanity"]
    )
    monkeypatch.setattr(zeroshot, "sanity", None)
    for sanity in (True, False):
        before = out.read_bytes(), out.stat().st_mtime_ns
        assert measure(root, sanity=sanity, say=said.append) == results.read(out) == json.loads(json.dumps(added))
        assert "holds these results already" in said[-1] and (out.read_bytes(), out.stat().st_mtime_ns) == before


def test_sanity_belongs_into_the_same_folder(colours, exported, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "sanity", lambda *_: [{"check": "batch size", "status": "PASS", "detail": "all agree"}])
    words = [
        "evaluate",
        exported,
        "--data",
        colours,
        "--attacks",
        "pgd",
        "--iters",
        1,
        "--workers",
        0,
        "--device",
        "cpu",
    ]
    assert command(*words) == command(*words, "--sanity") == 0
    (out,) = (tmp_path / "evaluations").iterdir()
    (entry,) = results.read(out)["datasets"]
    assert entry["sanity"] and entry["health"][-1]["check"] == "batch size"


def test_sanity_of_a_model_that_is_never_right_has_nothing_to_check(measure, tmp_path):
    noise = dict.fromkeys(COLOURS)  # images do not depend on their labels
    (entry,) = measure(write(tmp_path / "right", 4, classes=noise), iters=1)["datasets"]
    wrong = write(
        tmp_path / "wrong", 4, classes=noise, label=lambda i, n: (entry["samples"]["clean_prediction"][i] + 1) % n
    )
    said = []
    (entry,) = measure(wrong, tmp_path / "other", iters=1, sanity=True)["datasets"]
    told = [line for line in entry["health"] if line["status"] != "PASS"]
    # Labels that are never right are doubted, too.
    assert told[0] == zeroshot.NOTHING_ATTACKED and [line["check"] for line in told[1:]] == ["above chance"]
    assert entry["sanity"] and not any(line["check"] == "batch size" for line in entry["health"])
    measure(wrong, tmp_path / "other", iters=1, sanity=True, say=said.append)
    assert "holds these results already" in said[-1]
