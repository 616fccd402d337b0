"""ImageNet-C: found by name in both layouts, measured clean, and its mean corruption error."""

import numpy as np
import pytest
from PIL import Image

from mmtard.evaluation import datasets, table
from mmtard.evaluation.corruptions import ALEXNET_ERROR, SEVERITIES, corruption_error


def entry(corruption, severity, accuracy):
    return {"kind": "corruption", "corruption": corruption, "severity": severity, "clean_all": {"accuracy": accuracy}}


def test_the_mean_corruption_error_is_the_papers():
    """A model of AlexNet's own errors has 100 %; one with half of them on one corruption 1/30 less."""
    same = [entry(name, s, 1 - error + (s - 3) / 100) for name, error in ALEXNET_ERROR.items() for s in SEVERITIES]
    assert len(ALEXNET_ERROR) == 15 and corruption_error(same)["mean_corruption_error"] == pytest.approx(1)
    half = [
        e | {"clean_all": {"accuracy": 1 - ALEXNET_ERROR["fog"] / 2}} if e["corruption"] == "fog" else e for e in same
    ]
    found = corruption_error(half)
    assert found["mean_corruption_error"] == pytest.approx(1 - 1 / 30) and found["missing"] == []
    assert found["corruptions"]["fog"]["corruption_error"] == pytest.approx(0.5)


def test_a_part_of_imagenet_c_has_no_mean_corruption_error():
    part = [entry("fog", s, 0.5) for s in SEVERITIES] + [entry("snow", 1, 0.5)]
    found = corruption_error(part)
    assert found["mean_corruption_error"] is None and len(found["missing"]) == 75 - 6 and "snow/2" in found["missing"]
    assert found["corruptions"]["fog"]["corruption_error"] == pytest.approx(0.5 / ALEXNET_ERROR["fog"])
    assert found["corruptions"]["snow"]["corruption_error"] is None
    assert corruption_error([{"kind": "zeroshot"}]) is None


@pytest.mark.parametrize("layout", ["imagenet-c", "ImageNet-C/weather", "wds_imagenet-c"])
def test_imagenet_c_is_measured_clean_as_it_is_unpacked(measure, tmp_path, monkeypatch, capsys, layout):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "root" / layout.partition("/")[0]
    for severity in (1, 2):
        for colour, name in ((90, "n01440764"), (200, "n01443537")):
            folder = tmp_path / "root" / layout / "fog" / str(severity) / name
            folder.mkdir(parents=True)
            Image.fromarray(np.full((8, 8, 3), colour + severity, np.uint8)).save(folder / "0.JPEG")
    (root / "classnames.txt").write_text("tench\ngoldfish\n")
    for where, wanted in ((root, None), (tmp_path / "root", ["imagenet_c"]), (tmp_path / "root", ["ImageNet-C/fog/2"])):
        found = datasets.find_datasets(str(where), wanted)
        assert [s.name for s in found] == [
            f"ImageNet-C/fog/{s}" for s in (1, 2) if wanted is None or len(wanted[0]) < 12 or s == 2
        ]
    if layout != "imagenet-c":
        return
    found = measure(tmp_path / "root", sanity=True)
    first, second = found["datasets"]
    assert (first["kind"], first["corruption"], first["severity"], first["eps"]) == ("corruption", "fog", 1, {})
    assert first["n_total"] == 2 and first["classes"] == ["tench", "goldfish"] and len(first["templates"]) == 80
    assert not any(line["check"] == "attacks" for line in first["health"]) and found["averages"]["all"] is None
    expected = 1 - (first["clean_all"]["accuracy"] + second["clean_all"]["accuracy"]) / 2
    assert found["imagenet_c"]["corruptions"]["fog"]["error"] == pytest.approx(expected)
    table.show(found)
    printed = capsys.readouterr().out
    assert "no mean corruption error: without gaussian_noise/1" in printed and "81.90" in printed
    assert measure(tmp_path / "root", sanity=True) == found
