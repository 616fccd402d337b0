import pytest

from mmtard import heads
from mmtard.config import Model
from mmtard.errors import UserError
from mmtard.towers import load

NAMES, TEMPLATES = ["cat", "dog", "cow"], ["a photo of a {}", "a drawing of a {}"]


@pytest.fixture
def clip(vit):
    return lambda seed: load(Model(arch=vit, weights="random"), seed)


def test_embeddings_are_stored_and_read_again(tmp_path, clip, ranks, monkeypatch):
    student = clip(1)
    first = heads.build(tmp_path, {"student": student}, NAMES, TEMPLATES, ranks)["student"]
    monkeypatch.setattr(type(student), "class_embeddings", lambda *_: pytest.fail("the text tower was asked again"))
    again = heads.build(tmp_path, {"student": student}, NAMES, TEMPLATES, ranks)["student"]
    assert first.class_embeddings.equal(again.class_embeddings) and first.class_embeddings.shape[0] == len(NAMES)


def test_another_text_tower_gets_its_own_embeddings(tmp_path, clip, ranks):
    heads.build(tmp_path, {"student": clip(1)}, NAMES, TEMPLATES, ranks)
    other = clip(2)
    built = heads.build(tmp_path, {"student": other}, NAMES, TEMPLATES, ranks)["student"]
    assert built.class_embeddings.equal(other.class_embeddings(NAMES, TEMPLATES))


def test_other_class_names_are_refused(tmp_path, clip, ranks):
    heads.build(tmp_path, {"student": clip(1)}, NAMES, TEMPLATES, ranks)
    with pytest.raises(UserError, match="classnames"):
        heads.build(tmp_path, {"student": clip(1)}, [*NAMES[:2], "horse"], TEMPLATES, ranks)
