"""Tests that need a GPU. Without one they are skipped; `MMTARD_GPU_TESTS=rehearse` runs their bodies on the CPU.

A rehearsal shows that the tests themselves run; what only CUDA can answer is skipped at its place, with the reason.
`launch/gpu_check.sh` runs them, and then the benchmarks.
"""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

VARIABLE = "MMTARD_GPU_TESTS"
HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# cuBLAS reads it when CUDA starts, which is before the first test with engine.deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda" or os.environ.get(VARIABLE) == "rehearse":
        return
    skipped = pytest.mark.skip(reason=f"needs a GPU; {VARIABLE}=rehearse runs the bodies of these tests on the CPU")
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(skipped)


def only_on_cuda(what: str) -> None:
    """Skip the rest of a test in a rehearsal: it asks something that only CUDA answers."""
    if DEVICE != "cuda":
        pytest.skip(f"rehearsed on the CPU as far as it goes; {what}")


@pytest.fixture
def gpu_ranks():
    """A group of this process alone on the GPU, over NCCL (in a rehearsal on the CPU, over gloo)."""
    from mmtard.distributed import ranks as process_group

    before = dict(os.environ)
    try:
        yield process_group.start(DEVICE)
    finally:
        process_group.stop()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """48 noisy squares of three colours, in two shards, with class names."""
    folder = tmp_path_factory.mktemp("gpu") / "shards"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(24):
                pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8)
                pixels[8:24, 8:24, i % 3] += 150
                image = io.BytesIO()
                Image.fromarray(pixels).save(image, "PNG")
                for suffix, content in (("png", image.getvalue()), ("cls", str(i % 3).encode())):
                    member = tarfile.TarInfo(f"{shard}{i:03d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / "classnames.txt").write_text("red square\ngreen square\nblue square\n")
    (folder.parent / "gpu_tests_clip.json").write_text(json.dumps(MODEL))
    return folder


@pytest.fixture
def job(shards, tmp_path):
    """Call with a name and changes by section: the configuration of a run of eight MMT-ARD steps, and its folder."""
    from mmtard import config

    model = {"arch": str(shards.parent / "gpu_tests_clip.json"), "weights": "random"}
    base = {
        "seed": 5,
        "student": model,
        "teachers": {"clean": model, "robust": model},
        "method": {"name": "mmtard", "weighting": "confidence_sigmoid"},
        "attack": {"eps": "8/255", "step_size": "4/255", "steps": 3},
        "data": {"shards": str(shards), "lanes": 4, "window": 16, "workers": 1},
        "train": {"steps": 8, "batch_size": 16, "lr": 1e-3, "warmup_steps": 2},
        # `mmtard cache` runs a teacher uncompiled: its bits are those of a teacher that is not compiled either.
        "engine": {"precision": "bf16", "device": DEVICE, "deterministic": True, "compile": "off"},
        "checkpoint": {"every": 4, "keep_last": 2},
        "log": {"tensorboard": False},
        "resume": {"max_preemptions": None},
    }

    def make(name: str, **changes):
        merged = {
            section: {**base.get(section, {}), **value} if isinstance(value, dict) else value
            for section, value in changes.items()
        }
        run = tmp_path / name
        return config.validate({**base, "run_dir": str(run), **merged}), run

    return make
