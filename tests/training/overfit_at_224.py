"""Catastrophic overfitting of a small ViT on images of 224 px, and what the alarm does about it.

    OMP_NUM_THREADS=1 python -m tests.training.overfit_at_224 OUT

No test. On two cores 16 minutes, after the pretraining: a CLIP of patches of 32 px is pretrained on the quickstart's
images, enlarged, and trained on 512 of them against one large step that starts at the image: with an alarm that only
reports, and beside it with one after which the attack has three steps.
"""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch.nn.functional as F
import yaml

from mmtard.examples import pretrain
from mmtard.examples.shapes import make_data

SIZE = 224
ALARM_STEPS = {"reported": None, "answered": 3}  # run -> attack.alarm_steps
EPS = "32/255"


def pretrained(out: Path) -> dict:
    """A student that is pretrained into OUT."""
    architecture = json.loads(pretrain.ARCHITECTURE.read_text())
    architecture["vision_cfg"] |= {"image_size": SIZE, "patch_size": 32}
    (out / "tiny_clip_224.json").write_text(json.dumps(architecture, indent=2))
    embed = pretrain._embed_images

    def enlarged(model, images):
        return embed(model, F.interpolate(images.float(), size=(SIZE, SIZE), mode="bicubic").clamp(0, 255))

    how = pretrain.Pretraining(out / "tiny_clip_224.json", steps=300, batch_size=128)
    with mock.patch.object(pretrain, "_embed_images", enlarged):
        pretrain.pretrain(make_data(out / "shapes"), out / "pretrained", how)
    made = out / "pretrained"
    return {"arch": str(made / "tiny_clip_224.json"), "weights": str(made / "tiny_clip_224.safetensors")}


def configuration(out: Path, name: str, student: dict, pool: Path) -> dict:
    """The settings of one of the two trainings."""
    train = {"steps": 300, "batch_size": 128, "lr": 2e-3, "warmup_steps": 20, "weight_decay": 1e-4, "grad_clip": 1.0}
    attack = {"eps": EPS, "steps": 1, "step_size": None, "random_start": False, "ramp": {"until": 100, "eps": 0}}
    return {
        "run_dir": str(out / name),
        "method": {"name": "tecoa"},
        "student": student,
        "data": {"shards": str(pool), "templates": ["a photo of a {}"], "lanes": 8, "window": 256, "workers": 0},
        "attack": {**attack, "alarm_every": 20, "alarm_steps": ALARM_STEPS[name]},
        "train": train,
        "engine": {"device": "cpu", "precision": "float32", "zero_stage": 0},
        "log": {"every": 10},
    }


def side_by_side(commands: list[list[str]]) -> None:
    """Run the program with each of these words, at once."""
    running = [subprocess.Popen([sys.executable, "-m", "mmtard", *words]) for words in commands]
    if any([one.wait() for one in running]):
        sys.exit("a command failed")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.training.overfit_at_224 OUT")
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    pool = make_data(out / "pool", train=512, test=200, zeroshot=24) / "train"
    student = pretrained(out)
    for name in ALARM_STEPS:
        (out / f"{name}.yaml").write_text(yaml.safe_dump(configuration(out, name, student, pool)))
    side_by_side([["train", f"{out}/{name}.yaml"] for name in ALARM_STEPS])
    asked = ["--data", str(pool), "--eps", EPS, "--attacks", "pgd", "--iters", "10", "--n-samples", "all"]
    side_by_side([["evaluate", f"{out}/{name}", *asked] for name in ALARM_STEPS])
