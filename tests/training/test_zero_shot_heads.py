import pytest

from mmtard.config import Model
from mmtard.errors import UserError
from mmtard.models.loading import load_clip
from mmtard.training import class_targets

NAMES, TEMPLATES = ["cat", "dog", "cow"], ["a photo of a {}", "a drawing of a {}"]


@pytest.fixture
def clip(vit):
    return lambda seed: load_clip(Model(arch=vit, weights="random"), seed)


def test_embeddings_are_stored_and_read_again(tmp_path, clip, ranks, monkeypatch):
    student = clip(1)
    first = class_targets.zero_shot_heads(tmp_path, {"student": student}, NAMES, TEMPLATES, ranks)["student"]
    monkeypatch.setattr(type(student), "class_embeddings", lambda *_: pytest.fail("the text tower was asked again"))
    again = class_targets.zero_shot_heads(tmp_path, {"student": student}, NAMES, TEMPLATES, ranks)["student"]
    assert first.class_embeddings.equal(again.class_embeddings) and first.class_embeddings.shape[0] == len(NAMES)


def test_another_text_tower_gets_its_own_embeddings(tmp_path, clip, ranks):
    class_targets.zero_shot_heads(tmp_path, {"student": clip(1)}, NAMES, TEMPLATES, ranks)
    other = clip(2)
    built = class_targets.zero_shot_heads(tmp_path, {"student": other}, NAMES, TEMPLATES, ranks)["student"]
    assert built.class_embeddings.equal(other.class_embeddings(NAMES, TEMPLATES))


def test_other_class_names_are_refused(tmp_path, clip, ranks):
    class_targets.zero_shot_heads(tmp_path, {"student": clip(1)}, NAMES, TEMPLATES, ranks)
    with pytest.raises(UserError, match="classnames"):
        class_targets.zero_shot_heads(tmp_path, {"student": clip(1)}, [*NAMES[:2], "horse"], TEMPLATES, ranks)


@pytest.mark.parametrize("cut", [0, 1, 9])
def test_embeddings_that_are_damaged_are_refused_in_one_line(tmp_path, clip, ranks, cut):
    class_targets.zero_shot_heads(tmp_path, {"student": clip(1)}, NAMES, TEMPLATES, ranks)
    path = tmp_path / "class_embeddings.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one bit of the last number
    path.write_bytes(content[: len(content) - cut])
    with pytest.raises(UserError, match="does not match its checksum.*; remove it to have it made anew"):
        class_targets.zero_shot_heads(tmp_path, {"student": clip(1)}, NAMES, TEMPLATES, ranks)
    (tmp_path / "checksums.json").unlink()  # of a version that had none
    if cut:
        with pytest.raises(UserError, match="cannot be read: .*; remove it to have it made anew"):
            class_targets.zero_shot_heads(tmp_path, {"student": clip(1)}, NAMES, TEMPLATES, ranks)
    path.unlink()
    class_targets.zero_shot_heads(tmp_path, {"student": clip(1)}, NAMES, TEMPLATES, ranks)
