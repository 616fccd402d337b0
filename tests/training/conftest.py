"""Whole runs in this process: a configuration of a few short steps, and what trains it."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from processes import only_rank

from mmtard import config
from mmtard.training.train import Trainer
from mmtard.training.watchdog import Watchdog


@pytest.fixture(scope="module")
def ranks_of_module():
    """One group for all runs of this module."""
    with only_rank() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def train(ranks_of_module):
    """`mmtard.training.train.train` in the module's group."""

    def run(given, interruption):
        with Watchdog(given, ranks_of_module) as watchdog:
            return Trainer(given, ranks_of_module, watchdog).train(interruption)

    return run


@pytest.fixture
def settings(tmp_path, vit):
    """Call with the run's name and changes of its configuration; 24 images, labels only where `labels` says so."""

    def make(name, labels=True, data=(), **changes):
        shards = tmp_path / f"shards{labels}"
        if not shards.exists():
            shards.mkdir()
            rng = np.random.default_rng(0)
            with tarfile.open(shards / "0.tar", "w") as tar:
                for i in range(24):
                    image = io.BytesIO()
                    Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(image, "PNG")
                    for suffix, content in [("png", image.getvalue())] + [("cls", str(i % 3).encode())] * labels:
                        member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            if labels:
                (shards / "classnames.txt").write_text("cat\ndog\ncow\n")
        base = {
            "run_dir": str(tmp_path / name),
            "student": {"arch": vit, "weights": "random"},
            "attack": {"eps": "8/255", "step_size": "4/255", "steps": 2},
            "data": {"shards": str(shards), "lanes": 2, "window": 8, "workers": 0, **dict(data)},
            "train": {"steps": 4, "batch_size": 8, "lr": 1e-3},
            "engine": {"precision": "float32", "device": "cpu"},
            "checkpoint": {"every": 4},
            "log": {"tensorboard": False},
            "resume": {"max_preemptions": None},
        }
        return config.validate({**base, **changes}), tmp_path / name

    return make


@pytest.fixture
def wide(tmp_path):
    """Model config of a ViT on 24 px images, of another width, embedding and context length than `vit`."""
    vision = {"image_size": 24, "patch_size": 8, "width": 48, "layers": 1, "head_width": 16}
    text = {"context_length": 12, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1}
    path = tmp_path / "tests-wide-trained.json"
    path.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    return str(path)
