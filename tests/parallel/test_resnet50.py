"""A configured ResNet student at its full size and resolution: trained on two ranks, exported."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from mmtard.cli.main import main
from mmtard.config import Model
from mmtard.models import loading
from mmtard.runs.checkpoints import read_optimizer, read_weights

from .launch import run_ranks

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Eight images of noise at 224 px, of two classes."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(8):
            image = io.BytesIO()
            Image.fromarray(rng.integers(0, 128 + 127 * (i % 2), (224, 224, 3), dtype=np.uint8)).save(image, "JPEG")
            for suffix, content in (("jpg", image.getvalue()), ("cls", str(i % 2).encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (folder / "classnames.txt").write_text("dark noise\nbright noise\n")
    return folder


def rows(run):
    return {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def command(name, run, shards, vit, resnet, **student):
    """Two steps of configs/NAME_mmtard.yaml with two small teachers."""
    return [
        "-m",
        "mmtard",
        "train",
        CONFIGS / f"{name}_mmtard.yaml",
        f"data.shards={shards}",
        f"run_dir={run}",
        "student.weights=random",
        *(f"student.{key}={value}" for key, value in student.items()),
        *(
            f"teachers.{teacher}={{arch: {arch}, weights: random}}"
            for teacher, arch in (("clean", vit), ("robust", resnet))
        ),
        "train.batch_size=4",
        "train.steps=2",
        "train.warmup_steps=0",
        "train.lr=1e-3",
        "data.lanes=4",
        "data.workers=1",
        "attack.steps=2",
        "checkpoint.every=1",
        "engine.device=cpu",
        "engine.precision=float32",
    ]


def changes(run):
    """The run's last weights; tensor -> how far it went from the start, of those that some gradient reaches (softmax
    cancels k_proj.bias).
    """
    assert (
        all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows(run).values())
        and len(rows(run)) == 2
    )
    start, end = (
        loading.load_clip(Model(weights=str(run / "start"))).tower().state_dict(),
        read_weights(run / "checkpoints/step-2"),
    )
    return end, {
        k: (v - start[k]).norm().item()
        for k, v in end.items()
        if v.is_floating_point() and not k.endswith("k_proj.bias")
    }


def test_a_resnet_50_trains_with_synced_statistics_and_is_exported(shards, vit, resnet, tmp_path):
    """And with a term of its last map, through a learned 1x1 projection to a teacher's of fewer channels."""
    feature = "terms.feature={teacher: robust, teacher_view: adv, of: tokens}"
    ranks = [*command("rn50", tmp_path / "run", shards, vit, resnet, batch_norm="synced"), feature]
    run_ranks(ranks, 2, tmp_path, "ranks")
    end, gone = changes(tmp_path / "run")
    learned = read_optimizer(tmp_path / "run/checkpoints/step-2")["learned.feature.weight"]
    assert learned.shape == (256, 2048) and all(0 < row["feature"] < 2 for row in rows(tmp_path / "run").values())
    assert sum("running_" in key for key in gone) == 2 * 55 and all(gone.values())
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert all(torch.equal(v, end[f"visual.{k}"]) for k, v in model.visual.state_dict().items())
