"""docs/api.md: every Python block runs, in its order, on a tiny model; what it names exists."""

import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
from PIL import Image

import mmtard
from mmtard import api

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
# What the page says of a real model, as the tiny one has it.
TINY = {'"ViT-B-32", pretrained="openai"': '"tests-vit"', '"ViT-B-32"': '"tests-vit"', '"openai"': '"random"'}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the page's image and its data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for k, name in enumerate(["cat", "dog"] * 3):
        path = tmp_path / "pets" / "test" / name / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    path.rename(tmp_path / "cat.png")
    return tmp_path


def test_the_page_runs_from_top_to_bottom(vit, place, monkeypatch, capsys):
    begun = []
    open_clip.add_model_config(vit)
    monkeypatch.setattr(api, "train", lambda config, overrides: begun.append((config, overrides)) or 0)
    namespace = {}
    for block in BLOCKS:
        for theirs, tiny in TINY.items():
            block = block.replace(theirs, tiny)
        exec(compile(block, "docs/api.md", "exec"), namespace)
    said = capsys.readouterr().out
    assert "torch.Size([4, 3])" in said and "4 images: clean 100.0%, under attack " in said
    assert "images: torch.uint8 instead of float32; divide 8-bit pixels by 255" in said
    assert (place / "results" / "pets" / "results.json").is_file() and "\nPets " in said
    assert begun == [("vitb32_mmtard", ["run_dir=runs/b32", "data.shards=shards/train"])]
    assert namespace["stronger"].shape == namespace["images"].shape


def test_the_page_names_every_public_function_loss_and_attack():
    from mmtard.attacks.registry import ALIASES, ATTACKS

    for name in mmtard.__all__:
        assert f"mmtard.{name}" in PAGE or f"import losses, {name}" in PAGE, name
    for name in [*ATTACKS, *ALIASES]:
        assert f"`{name}`" in PAGE, name
        assert name in ALIASES or re.search(rf"[ (]{name}[ ,(]", mmtard.attack.__doc__), (
            f"{name}: mmtard.attack's docstring"
        )
    listed = re.search(r"`mmtard.losses` has (.*?):", PAGE, re.S)[1]
    own = {name for name, value in vars(mmtard.losses).items() if getattr(value, "__module__", "") == "mmtard.losses"}
    assert set(re.findall(r"`(\w+)`", listed)) == {name for name in own if not name.startswith("_")} - {"true_class"}


def test_the_signatures_on_the_page_are_the_functions():
    import inspect

    for name in ("attack", "load", "train"):
        shown = re.search(rf"`mmtard\.{name}\((.*?)\)`", PAGE, re.S)[1]
        words = [word.split("=")[0].strip() for word in re.sub(r"\(\)", "", shown).split(",")]
        assert [w for w in words if w != "*"] == list(inspect.signature(getattr(mmtard, name)).parameters), name
