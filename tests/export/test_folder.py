import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from mmtard.config import Model
from mmtard.errors import UserError
from mmtard.export import folder
from mmtard.export.folder import export
from mmtard.models import clip, loading
from mmtard.models.clip import START_FOLDER
from mmtard.runs.checkpoint_writer import Checkpoints


@pytest.fixture
def run(vit, tmp_path):
    """A run folder: start (seed 1, its own normalisation), checkpoints of steps 1 and 2 (towers of seeds 2 and 3)."""
    run_folder = tmp_path / "run"
    start = loading.load_clip(Model(arch=vit, weights="random", quick_gelu=True), seed=1)
    start.config["preprocess_cfg"].update(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    start.save(run_folder / clip.START_FOLDER)
    saver = Checkpoints(run_folder, keep_last=5)
    for step in (1, 2):
        tower = loading.load_clip(Model(arch=vit, weights="random"), seed=step + 1).tower()
        saver.save(step, dict(tower.state_dict()), {}, {"step": step})
        saver.wait()
    return run_folder


def trained(vit, run, seed):
    """The image tower the export must hold, put together here: seed's weights in the start's architecture."""
    clip = loading.load_clip(Model(weights=str(run / START_FOLDER)))
    clip.model.visual.load_state_dict(
        loading.load_clip(Model(arch=vit, weights="random"), seed=seed).model.visual.state_dict()
    )
    return clip


@pytest.mark.parametrize("source, seed", [("", 3), ("checkpoints/step-1", 2)])
def test_open_clip_loads_the_folder_with_the_trained_embeddings(vit, run, tmp_path, source, seed):
    written = export(Model(weights=str(run / source)), tmp_path / "out")
    assert {p.name for p in written} == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "image_tower.pt",
        "README.md",
    }
    clip = trained(vit, run, seed)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    text = open_clip.get_tokenizer(clip.name)(["a cat"])
    with torch.no_grad():
        image = model.eval().encode_image(preprocess(Image.fromarray(pixels))[None])
        torch.testing.assert_close(image, clip.tower().eval()(x), rtol=1e-5, atol=1e-6)
        assert torch.equal(model.encode_text(text), clip.model.eval().encode_text(text))
    assert {type(m).__name__ for m in model.modules() if "GELU" in type(m).__name__} == {"QuickGELU"}


def test_the_image_tower_file_is_a_plain_state_dict(vit, run, tmp_path):
    export(Model(weights=str(run)), tmp_path / "out")
    state = torch.load(tmp_path / "out" / "image_tower.pt", weights_only=True)
    expected = trained(vit, run, 3).model.visual
    fresh = open_clip.create_model("tests-vit").visual
    fresh.load_state_dict(state, strict=True)
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in fresh.state_dict().items())


def test_an_earlier_export_is_replaced_whole(vit, run, tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(folder, "TOWER_FILE", "of_an_older_version.pt")
        export(Model(weights=str(run / "checkpoints/step-1")), tmp_path / "out")
    assert (tmp_path / "out" / "of_an_older_version.pt").is_file()
    written = export(Model(weights=str(run)), tmp_path / "out")
    assert len(written) == 4 and not (tmp_path / "out" / "of_an_older_version.pt").exists()
    state = torch.load(tmp_path / "out" / "image_tower.pt", weights_only=True)
    assert torch.equal(state["proj"], trained(vit, run, 3).model.visual.proj)


def test_what_was_not_exported_is_never_overwritten(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    # A run's start is a folder that open_clip loads, as an export is.
    for out in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex", run, run / START_FOLDER, tmp_path):
        with pytest.raises(UserError, match="exists and is not a (model that mmtard made|folder); choose another"):
            export(Model(weights=str(run)), out)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_clone_of_a_model_repository_and_an_edited_card_stay(run, tmp_path):
    out = tmp_path / "out"
    export(Model(weights=str(run)), out)
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref")
    with pytest.raises(UserError, match=r"holds '.git/HEAD', which mmtard did not write there; choose another folder"):
        export(Model(weights=str(run)), out)
    shutil.rmtree(out / ".git")
    (out / "README.md").write_text("my own words")
    with pytest.raises(UserError, match="holds 'README.md', which was changed since mmtard wrote it"):
        export(Model(weights=str(run)), out)
    assert (out / "README.md").read_text() == "my own words"


def test_a_model_is_not_exported_over_itself(run, tmp_path):
    """Its card would be gone: of an exported folder alone it is not known how it was trained."""
    export(Model(weights=str(run)), tmp_path / "out")
    with pytest.raises(UserError, match="is the model itself; choose another OUT"):
        export(Model(weights=str(tmp_path / "out")), tmp_path / "out")


@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, writer):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    def full_too(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    if writer == "torch":
        monkeypatch.setattr(folder.torch, "save", full)
        monkeypatch.setattr(folder, "LITTLE_ROOM", 2**62)
    else:
        monkeypatch.setattr("mmtard.runs.checkpoints.save_file", full_too)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    words = r"^cannot write '.*out': No space left on device \(the disk .* needed\); free"
    with pytest.raises(UserError, match=words) as told:
        export(Model(weights=str(run)), tmp_path / "out")
    assert "\n" not in str(told.value) and sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_folder_without_a_usable_checkpoint_is_refused(run, tmp_path):
    for step in (1, 2):
        (run / "checkpoints" / f"step-{step}" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"with usable weights \(step-2: no manifest.json; step-1: no manifest.json\)"):
        export(Model(weights=str(run)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
