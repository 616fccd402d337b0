"""Configurations that others wrote: only known keys pass, and nothing in them or beside them runs."""

import json
import random
import shutil
from pathlib import Path

import pytest
from embeddings_of import refused

from mmtard.config import Model
from mmtard.errors import UserError
from mmtard.models import clip, loading, model_config
from mmtard.runs import checkpoint_writer


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    base.save(folder)
    return folder


@pytest.fixture
def stranger(saved, tmp_path):
    """Call with changes to its text_cfg: a model folder whose tokenizer is Python of its own; that it ran is seen."""
    folder, mark = tmp_path / "stranger", tmp_path / "RAN"

    def make(**text):
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        change(folder, text_cfg={"hf_tokenizer_name": "org/nice", **text})
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "Nice", "auto_map": {"AutoTokenizer": ["nice.Nice", None]}})
        )
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
        (folder / "nice.py").write_text(f"open({str(mark)!r}, 'w')\nclass Nice: pass\n")
        return folder

    yield make
    assert not mark.exists(), "code of the model's folder was run"


def change(folder, **sections):
    """Add keys to sections of a folder's model_cfg; `top` are keys of the model_cfg itself."""
    path = folder / clip.CONFIG_FILE
    content = json.loads(path.read_text())
    for section, keys in sections.items():
        at = content["model_cfg"] if section == "top" else content["model_cfg"][section]
        at.update(keys)
    path.write_text(json.dumps(content))


REMOTE = {"tokenizer_kwargs": {"trust_remote_code": True}}


def test_a_folder_that_asks_for_remote_code_is_refused_by_the_keys_name(stranger):
    refused("sets text_cfg.tokenizer_kwargs.trust_remote_code|remove it", weights=str(stranger(**REMOTE)))
    with pytest.raises(UserError, match="trust_remote_code"):
        loading.load_skeleton(Model(weights=str(stranger(**REMOTE))), "student")


def test_a_runs_start_that_asks_for_remote_code_is_refused(base, stranger, tmp_path):
    shutil.copytree(stranger(**REMOTE), tmp_path / "run" / clip.START_FOLDER)
    saver = checkpoint_writer.Checkpoints(tmp_path / "run", keep_last=1)
    saver.save(1, dict(base.tower().state_dict()), {}, {})
    saver.wait()
    with pytest.raises(UserError, match="trust_remote_code"):
        loading.load_clip(Model(weights=str(tmp_path / "run")))


def test_a_model_config_that_asks_for_remote_code_is_refused(vit, stranger, tmp_path):
    cfg = json.loads(Path(vit).read_text())
    cfg["text_cfg"] |= {"hf_tokenizer_name": str(stranger()), **REMOTE}
    (tmp_path / "their.json").write_text(json.dumps(cfg))
    refused("student.arch: |their.json|trust_remote_code", arch=str(tmp_path / "their.json"), weights="random")


def test_a_tokenizer_with_code_of_its_own_is_refused_without_running_it(vit, stranger, tmp_path):
    pytest.importorskip("transformers")
    folder = stranger()
    with pytest.raises(UserError, match=r"tokenizer_config.json' asks to run code of its own.*mmtard never does"):
        loading.load_clip(Model(weights=str(folder))).class_embeddings(["cat"], ["{}"])
    cfg = json.loads(Path(vit).read_text())
    cfg["text_cfg"]["hf_tokenizer_name"] = str(folder)
    (tmp_path / "tests-their.json").write_text(json.dumps(cfg))
    with pytest.raises(UserError, match="asks to run code of its own"):
        loading.load_clip(Model(arch=str(tmp_path / "tests-their.json"), weights="random")).tokenizer()


def test_a_text_tower_with_code_of_its_own_is_refused_without_running_it(stranger, tmp_path):
    pytest.importorskip("transformers")
    folder = stranger()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "nice", "auto_map": {"AutoConfig": "nice.Config", "AutoModel": "nice.Nice"}})
    )
    change(folder, text_cfg={"hf_model_name": str(folder), "hf_pooler_type": "mean_pooler"})
    refused("text_cfg.hf_model_name|asks to run code of its own", weights=str(folder))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "bert", "auto_map": {"AutoModel": "nice.Nice"}, "hidden_size": 16})
    )
    refused("text_cfg.hf_model_name|asks to run code of its own", weights=str(folder))


@pytest.mark.parametrize(
    "section, keys, words",
    [
        ("top", {"cast_dtype": "float16"}, "sets cast_dtype, which mmtard does not pass on"),
        ("vision_cfg", {"pretrained_path": "/etc/x"}, "sets vision_cfg.pretrained_path"),
        ("vision_cfg", {"timm_model_name": "hf-hub:org/model"}, "vision_cfg.timm_model_name is 'hf-hub:org/model'"),
        ("vision_cfg", {"act_kwargs": {"inplace": True}}, "sets vision_cfg.act_kwargs.inplace"),
        ("vision_cfg", {"width": "wide"}, 'vision_cfg.width is "wide"'),
        ("vision_cfg", {"image_size": [16, None]}, "vision_cfg.image_size is [16, null]"),
        ("text_cfg", {"norm_kwargs": 3}, "text_cfg.norm_kwargs"),
        ("text_cfg", {"vocab_size": 10**12}, "text_cfg.vocab_size is 1000000000000"),
        ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "/etc/x"}}, "sets text_cfg.tokenizer_kwargs.bpe_path"),
    ],
)
def test_keys_and_values_that_no_model_knows_are_refused_by_name(saved, tmp_path, section, keys, words):
    shutil.copytree(saved, tmp_path / "model")
    change(tmp_path / "model", **{section: keys})
    refused(words, weights=str(tmp_path / "model"))


def test_a_preprocessing_that_gives_no_numbers_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    path = tmp_path / "model" / clip.CONFIG_FILE
    content = json.loads(path.read_text())
    for keys, words in (
        ({"std": [0.2, 0, 0.2]}, "preprocess_cfg.std is [0.2, 0, 0.2]|three numbers above 0"),
        ({"mean": [0.5]}, "preprocess_cfg.mean is [0.5]"),
        ({"hook": "x"}, "sets preprocess_cfg.hook"),
    ):
        path.write_text(json.dumps({**content, "preprocess_cfg": {**content["preprocess_cfg"], **keys}}))
        refused(words, weights=str(tmp_path / "model"))


def test_every_architecture_of_open_clip_has_only_known_keys(monkeypatch):
    import open_clip

    monkeypatch.setattr(model_config, "_check_text_model", lambda *_: None)  # would ask the hub
    for name in open_clip.list_models():
        model_config.check_model_config(open_clip.get_model_config(name), "student", name)


def test_a_damaged_model_folder_is_one_line(saved, tmp_path):
    """150 mutations of the configuration: each loads or is refused in one line."""
    dice, refusals = random.Random(0), 0
    shutil.copytree(saved, tmp_path / "model")
    path = tmp_path / "model" / clip.CONFIG_FILE
    original = path.read_bytes()
    for _ in range(150):
        content = bytearray(original)
        for _ in range(dice.choice((1, 1, 2, 5))):
            content[dice.randrange(len(content))] = dice.choice(b'0123456789"{}[],:xnt \x00\xff')
        if dice.random() < 0.2:
            del content[dice.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            loading.load_clip(Model(weights=str(tmp_path / "model")))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1200, error
            refusals += 1
    assert refusals > 100


def test_a_link_planted_where_a_folder_is_written_is_not_followed(base, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    (tmp_path / "start.tmp").symlink_to(tmp_path / "precious")
    (tmp_path / "start").symlink_to(tmp_path / "precious")
    base.save(tmp_path / "start")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "mine"
    assert [p.name for p in (tmp_path / "precious").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "start").is_symlink() and (tmp_path / "start" / clip.CONFIG_FILE).is_file()
