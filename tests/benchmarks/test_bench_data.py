"""`mmtard bench data`: what it reads is what the training reads, and its numbers add up."""

import json

import numpy as np
import pytest
from PIL import Image

from mmtard.benchmarks.data import STAGES, STORED, DataBenchmark
from mmtard.benchmarks.pictures import draw_pictures
from mmtard.config import validate
from mmtard.distributed.progress import WorkProgress


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, vit):
    model = {"arch": vit, "weights": "random"}
    return validate({
        "run_dir": str(tmp_path_factory.mktemp("run")),
        "student": model,
        "teachers": {"clean": model, "robust": model},
        "method": {"name": "mmtard"},
        "attack": {"steps": 1},
        "data": {"shards": "none", "lanes": 4, "workers": 1},
        "train": {"steps": 10, "batch_size": 8},
        "engine": {"device": "cpu", "precision": "float32"},
    })  # fmt: skip


def test_drawn_pictures_are_of_imagenets_size_and_weight(tmp_path):
    draw_pictures(tmp_path, 3)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert [Image.open(file).size for file in files] == 3 * [(500, 375)]
    assert 70_000 < np.mean([file.stat().st_size for file in files]) < 150_000


def test_multipliers_of_the_samples_have_one_for_each_of_the_data(tiny, tmp_path):
    bound = {"method": {"name": "lore", "bound": {"multipliers": "sample"}}, "teachers": {}, "attack": {"steps": 1}}
    config = validate(tiny.model_dump(mode="json") | bound)
    DataBenchmark(config, drawn=24, images=2, rounds=1, steps=1).run(tmp_path / "out.json")
    [step] = json.loads((tmp_path / "out.json").read_text())["loop"]["seconds"]
    assert step > 0  # an index of 24 into multipliers of a batch of 2 ended it


def test_a_benchmark_of_drawn_pictures_tells_rates_and_waits(tiny, tmp_path, capsys, monkeypatch):
    said = []
    monkeypatch.setattr(WorkProgress, "say", lambda self, words: said.append(words))
    DataBenchmark(tiny, drawn=24, images=8, rounds=2, steps=2).run(tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    stored, resized = found["core"][STORED], found["core"]["pre-resized: 256 px, quality 90"]
    assert len(stored["images_per_s"]) == len(stored["images_per_cpu_s"]) == 2 and stored["milliseconds"].keys() == set(
        STAGES
    )
    assert (
        resized["kilobytes"] < stored["kilobytes"] / 2
        and resized["milliseconds"]["decode"] < stored["milliseconds"]["decode"]
    )
    loop = found["loop"]
    assert len(loop["seconds"]) == len(loop["waited"]) == 2 and 0 <= loop["waited_share"] < 1
    assert loop["images_per_s_needed_a_rank"] == pytest.approx(8 / np.median(loop["seconds"]))
    printed = capsys.readouterr().out
    assert "One core: images for a student of 16 px" in printed and "images/s a rank takes" in printed
    assert said[0] == "as stored: round 1 of 2" and said[-1] == "the loop: step 2 of 2" and len(said) == 2 * 2 + 3
