"""The main job on real photographs. Needs the research images of ../shared/data; skipped where they are absent."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from .launch import run_ranks

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the images of {DATA}")]


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_imagenette_at_224_with_the_main_jobs_models(job, tmp_path):
    small, large = ({"arch": arch, "weights": "random"} for arch in ("ViT-B-32", "ViT-L-14"))
    run = tmp_path / "imagenette"  # 1.6 GB, which go with the test
    config, _ = job(
        "imagenette",
        run_dir=str(run),
        student=small,
        teachers={"clean": small, "robust": {**large, "placement": "sharded"}},
        method={"name": "mmtard", "weighting": "official"},
        attack={"eps": "2/255", "step_size": "1/255", "steps": 1},
        data={"shards": str(DATA / "imagenette224"), "index": str(tmp_path / "index.npz"), "lanes": 4, "workers": 1},
        train={"steps": 2, "batch_size": 4, "lr": 2e-5},
        checkpoint={"every": 2},
    )
    printed = run_ranks(["-m", "mmtard", "train", config], 2, tmp_path, "run", timeout=580)
    assert "ViT" not in printed and "4735 samples of 10 classes, images 224 px" in printed
    assert [row["skipped"] for row in rows(run)] == [0, 0]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows(run))
    # A ViT-L/14 image tower has 304 M parameters, 1.2 GB in float32: half of it on each rank. A ViT-B/32 of 88 M
    # stands whole on both.
    held = {
        line.split()[1]: line.split("a rank holds ")[1].removesuffix(" MiB").split(", ")
        for line in printed.splitlines()
        if line.startswith("teacher ")
    }
    assert [round(float(mib), -1) for mib in held["robust:"]] == [580, 580]
    assert [round(float(mib), -1) for mib in held["clean:"]] == [340, 340]


def cifar10(folder: Path, source: Path, n: int) -> Path:
    """The first n images of a blob file as WebDataset shards."""
    with np.load(source) as stored:  # each look-up decompresses the array anew
        blob, offset, label, classes = (stored[name] for name in ("blob", "offset", "label", "classes"))
    folder.mkdir(parents=True)
    with wds.ShardWriter(str(folder / "%d.tar"), maxcount=500, verbose=0) as out:
        for i in range(n):
            encoded = blob[offset[i] : offset[i + 1]].tobytes()
            out.write({"__key__": f"{i:05d}", "webp": encoded, "cls": str(label[i]).encode()})
    (folder / "classnames.txt").write_text("\n".join(classes.tolist()))
    return folder


def test_cifar10_adversarial_training_learns_and_makes_robust(job, tmp_path):
    train = cifar10(tmp_path / "train", DATA / "cifar10_train0of2_webp.npz", 5000)
    test = cifar10(tmp_path / "test", DATA / "cifar10_test_webp.npz", 400)
    config, run = job(
        "cifar10",
        teachers={},
        method={"name": "tecoa"},
        attack={"eps": "4/255", "step_size": "2/255", "steps": 3},
        data={"shards": str(train), "lanes": 8, "window": 512, "workers": 1, "flip": True},
        train={"steps": 150, "batch_size": 64, "lr": 1e-3, "warmup_steps": 10},
        checkpoint={"every": 150},
    )
    run_ranks(["-m", "mmtard", "train", config], 2, tmp_path, "train", timeout=580)
    loss = [row["loss"] for row in rows(run)]
    assert np.mean(loss[-20:]) < np.mean(loss[:20]) - 0.2
    evaluate = [
        "-m",
        "mmtard",
        "evaluate",
        run,
        "--data",
        test,
        "--eps",
        "4/255",
        "--attacks",
        "pgd",
        "--iters",
        "5",
        "--n-samples",
        "all",
        "--device",
        "cpu",
    ]
    run_ranks([*evaluate, "--out", tmp_path / "evaluation"], 2, tmp_path, "evaluate")
    (found,) = json.loads((tmp_path / "evaluation" / "results.json").read_text())["datasets"]
    # Chance is 10 %, and 3 points are two standard errors of 400 samples.
    assert found["clean"]["accuracy"] > 0.16
    assert found["eps"]["4/255"]["robust"]["accuracy"] > 0.13
