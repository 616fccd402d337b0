"""`mmtard config`: what it finds wrong, and how it explains the settings."""

import json
from pathlib import Path

import pytest
import yaml

from mmtard import config as settings
from mmtard.cli.config import find_faults
from mmtard.cli.main import main
from mmtard.config import METHODS, explain, open_clip_names

NAMES = {"ViT-B-32", "ViT-L-14", "RN50"}


@pytest.fixture
def faults(tree, write, monkeypatch, tmp_path):
    """Call with overrides: what is wrong with the configuration, where open_clip knows three architectures."""
    (tmp_path / "robust").mkdir()
    tree["teachers"]["robust"] = {"weights": str(tmp_path / "robust")}
    monkeypatch.setattr("mmtard.cli.config.architectures", lambda: NAMES)
    monkeypatch.setattr("mmtard.cli.config.weight_tags", lambda: {"ViT-B-32": {"openai", "laion2b"}})
    monkeypatch.chdir(tmp_path)
    path = write(tree)
    return lambda *overrides: list(find_faults(settings.load(path, list(overrides))))


WRONG = [
    ("student.arch=ViT-B-23", "student.arch: open_clip has no architecture 'ViT-B-23'; near: ViT-B-32"),
    (
        "student.weights=opeani",
        "student.weights: 'opeani' is neither a file|nor a tag of ViT-B-32 (tags: laion2b, openai)",
    ),
    ("student.arch=null", "student.arch: weights 'openai' do not name their architecture; set it"),
    ("student.arch=mine.json", "student.arch: 'mine.json' does not exist"),
    (
        "teachers.robust.weights=runs/gone",
        "teachers.robust.weights: 'runs/gone' does not exist; correct the path, or make",
    ),
    ("data.shards=gone.tar", "data.shards: missing shard 'gone.tar'"),
    ("probe={data: gone, every: 500}", "probe.data: missing shard 'gone'"),
    ("data.classnames=names.txt", "data.classnames: 'names.txt' is no file"),
    ("data.templates=prompts.txt", "data.templates: 'prompts.txt' is no file"),
    ("data.index=gone/index.npz", "data.index: 'gone/index.npz' is no file"),
    ("attack.step_size=3/255", "attack.step_size: 3/255 is above attack.eps 2/255"),
    ("train.lr=1e30", "train.lr: 1e+30: AdamW moves every weight by about that much a step"),
    ("train.weight_decay=1e5", "train.weight_decay: 100000 times train.lr 2e-05 is not below 1"),
]


@pytest.mark.parametrize("override, words", WRONG, ids=[o for o, _ in WRONG])
def test_config_says_what_is_wrong_in_one_line(faults, override, words):
    (fault,) = [f for f in faults(override) if not f.startswith("train.weight_decay: 0.0001")]
    assert all(word in fault for word in words.split("|")) and "\n" not in fault, fault


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["attack.steps=1", "attack.step_size=2.5/255"],
        ["attack.algorithm=apgd", "attack.step_size=3/255"],
        ["student.weights=random"],
        ["student.weights=hf-hub:org/name", "student.arch=null"],
        ["data.templates=a photo of {}"],
    ],
)
def test_config_finds_nothing_wrong_with_what_is_right(faults, overrides):
    assert faults(*overrides) == []


def test_the_untouched_student_is_not_looked_for_in_a_run_that_is_to_come(faults):
    assert faults("method.name=fare", "teachers=null") == []


def test_config_prints_the_settings_and_then_what_is_wrong_with_status_2(tree, write, capsys):
    assert main(["config", str(write(tree)), "data.shards=gone.tar", "teachers.robust.weights=runs/x"]) == 2
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["data"]["shards"] == "gone.tar"
    assert [line.split(": ")[1] for line in err.splitlines()] == ["teachers.robust.weights", "data.shards"]


def test_architectures_and_tags_are_those_that_open_clip_itself_lists():
    open_clip = pytest.importorskip("open_clip")
    listed = {}
    for name, tag in open_clip.list_pretrained():
        listed.setdefault(name, set()).add(tag)
    # Other tests of this process may have added architectures of their own to open_clip's list.
    own = Path(open_clip.__file__).parent / "model_configs"
    added = {name for name in open_clip.list_models() if not (own / f"{name}.json").is_file()}
    assert open_clip_names.architectures() == set(open_clip.list_models()) - added
    assert open_clip_names.weight_tags() == listed


# ---------------------------------------------------------------- explained


def test_a_setting_is_explained_with_its_default_its_bounds_and_its_meaning(capsys):
    assert main(["config", "--explain", "attack.momentum"]) == 0
    assert capsys.readouterr().out.split("\n") == [
        "attack.momentum",
        "    a number, at least 0, below 1; default 0.0",
        "    pgd: momentum of the normalised gradient",
        "",
    ]
    assert "'2/255'" not in explain.explain("attack.eps") and "default 2/255" in explain.explain("attack.eps")


def test_a_section_is_explained_whole_and_no_key_means_all_of_them(tree, write):
    attack, everything = explain.explain("attack"), explain.explain()
    assert attack.count("attack.") >= 12 and attack in everything
    resolved = yaml.safe_load(settings.dump(settings.load(write(tree))))
    explained = {s.key.replace("NAME", "clean") for s in explain.all_settings()}

    def keys(part, prefix=""):
        for name, value in part.items():
            if isinstance(value, dict) and name not in ("views", "fusion"):
                yield from keys(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    assert {key.replace("robust.", "clean.") for key in keys(resolved)} <= explained


def test_settings_of_each_method_and_of_any_teacher_are_explained():
    assert "(method ard)" in explain.explain("method.alpha") and "(method tga_zsr)" in explain.explain("method.alpha")
    assert explain.explain("teachers.any.stored") == explain.explain("teachers.NAME.stored")
    assert all(f"{name}: " in explain.explain("method.name").replace("\n    ", " ") for name in METHODS)


@pytest.mark.parametrize("key, near", [
    ("lanes", "data.lanes"), ("trust", "mean method.trust?"), ("attack.epz", "attack.eps"), ("zzzz", "lists all")
])  # fmt: skip
def test_an_unknown_key_is_answered_with_the_nearest(key, near, capsys):
    assert main(["config", "--explain", key]) == 2
    err = capsys.readouterr().err
    assert f"--explain: there is no setting '{key}'" in err and near in err


def test_the_json_schema_knows_every_key_and_bound_and_requires_nothing_that_a_base_may_hold(capsys):
    assert main(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "required" not in schema and {"base", "run_dir", "method"} <= schema["properties"].keys()
    attack, train = schema["$defs"]["Attack"]["properties"], schema["$defs"]["Train"]["properties"]
    assert (attack["momentum"]["minimum"], attack["momentum"]["exclusiveMaximum"]) == (0, 1)
    assert attack["eps"]["type"] == ["number", "string"] and train["steps"] == {
        "description": "updates of the whole run", "minimum": 1, "type": "integer",
    }  # fmt: skip
    names = {
        d["properties"]["name"]["const"]
        for d in schema["$defs"].values()
        if "const" in d.get("properties", {}).get("name", {})
    }
    assert names == METHODS.keys()


def test_config_without_a_configuration_says_how_to_find_one(capsys):
    assert main(["config"]) == 2
    assert "name a configuration; `mmtard configs` lists those" in capsys.readouterr().err
