import io
import json
import os
import tarfile

import numpy as np
import pytest
import yaml
from PIL import Image

from .launch import run_ranks

MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """A tiny job: shards of noisy coloured squares and a configuration of 24 MMT-ARD steps; `job(name, **changes)`
    writes its YAML.
    """
    folder = tmp_path_factory.mktemp("job")
    shards = folder / "shards"
    shards.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(3):
        with tarfile.open(shards / f"{shard}.tar", "w") as tar:
            for i in range(50):
                label = int(rng.integers(3))
                pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8)
                pixels[8:24, 8:24, label] += 150
                image = io.BytesIO()
                Image.fromarray(pixels).save(image, "JPEG")
                for name, content in (
                    (f"{shard}{i:03d}.jpg", image.getvalue()),
                    (f"{shard}{i:03d}.cls", str(label).encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (shards / "classnames.txt").write_text("red square\ngreen square\nblue square\n")
    (folder / "tiny_test_clip.json").write_text(json.dumps(MODEL))
    model = {"arch": str(folder / "tiny_test_clip.json"), "weights": "random"}
    base = {
        "seed": 5,
        "student": model,
        "teachers": {"clean": model, "robust": model},
        "method": {"name": "mmtard", "weighting": "confidence_sigmoid"},
        "attack": {"eps": "8/255", "step_size": "4/255", "steps": 2},
        "data": {"shards": str(shards), "lanes": 4, "window": 16, "workers": 1, "flip": True},
        "train": {"steps": 24, "batch_size": 16, "lr": 1e-3, "warmup_steps": 4},
        "engine": {"precision": "float32", "device": "cpu"},
        "checkpoint": {"every": 4, "keep_last": 2},
        "log": {"tensorboard": False},
    }

    def write(name: str, **changes):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**base, "run_dir": str(folder / "runs" / name), **changes}))
        return path, folder / "runs" / name

    return write


@pytest.fixture
def train_here():
    """Call with a configuration file: its run trained in this process, as the only rank; the exit status. Raises what
    ends the run.
    """
    from mmtard import config
    from mmtard.distributed import interruption, ranks as process_group
    from mmtard.training.train import train

    before = dict(os.environ)
    os.environ["DS_ACCELERATOR"] = "cpu"
    yield lambda path: train(config.load(path), interruption.Interruption())
    process_group.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def undisturbed(job, tmp_path_factory):
    """The run folder of the job as it ends on two ranks when nothing happens to it."""
    config, run = job("undisturbed")
    run_ranks(["-m", "mmtard", "train", config], 2, tmp_path_factory.mktemp("undisturbed"), "run")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 24
    return run
