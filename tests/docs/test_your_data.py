"""The newcomer's path of docs/your-data.md, command by command, on tiny images and a tiny model."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).parents[2] / "docs" / "your-data.md"
CLASSES = {"red square": (220, 40, 40), "blue square": (40, 40, 220)}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Twelve photographs a class and split, below the current folder."""
    monkeypatch.chdir(tmp_path)
    random = np.random.Generator(np.random.PCG64(5))
    for split in ("train", "test"):
        for name, colour in CLASSES.items():
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(12):
                pixels = np.clip(np.array(colour) + random.normal(0, 20, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")


def commands():
    """The page's commands, in their order."""
    return re.findall(r"^mmtard .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.slow
def test_the_page_leads_from_a_folder_of_images_to_a_report(photos, command, vit, capfd):
    tiny = [
        f"student.arch={vit}", "student.weights=random", f"teachers.clean={{arch: {vit}, weights: random}}",
        f"teachers.robust={{arch: {vit}, weights: random}}", "train.steps=2", "train.batch_size=8",
        "train.micro_batch_size=null", "train.warmup_steps=0", "attack.steps=1", "data.workers=0", "checkpoint.every=2",
        "engine.device=cpu", "engine.precision=float32",
    ]  # fmt: skip
    done = []
    for line in commands():
        # The tiny student's start stands for the public weights that training begins with on the page.
        words = shlex.split(line.replace("openai --arch ViT-B-32", "runs/mine/start"))[1:]
        if words[0] in ("config", "train"):
            words += tiny
        if words[0] == "evaluate":
            words += ["--iters", "2", "--device", "cpu", "--workers", "0"]
        assert command(*words) in (0, None), line
        done.append(words[0])
    assert done == ["shards", "shards", "config", "train", "evaluate", "evaluate", "compare", "report", "export"]
    printed = capfd.readouterr().out
    assert "red square" in Path("shards/train/classnames.txt").read_text() and "linf" in printed
    assert Path("reports/mine/report.html").is_file() and Path("exported/mine/open_clip_config.json").is_file()
