"""A run is asked in the words it was trained with, and told from its own training data."""

import json

import pytest
import yaml
from tiny_datasets import write

from mmtard.config import Model
from mmtard.data.dataset import open_dataset
from mmtard.errors import UserError
from mmtard.evaluation import datasets, table
from mmtard.evaluation.trained_with import trained_with
from mmtard.models import loading
from mmtard.models.merging import merge
from mmtard.runs.checkpoint_writer import Checkpoints

OWN = "a picture, {c}\n"


@pytest.fixture
def run(exported, colours, tmp_path, tree):
    """A run whose start and checkpoint are the untrained CLIP; it says that `colours` trained it, in its own words."""
    folder = tmp_path / "run"
    clip = loading.load_clip(Model(weights=str(exported)))
    clip.save(folder / "start")
    tree["data"] |= {"shards": str(colours / "test"), "templates": ["the colour {}", "all {}"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (source,) = datasets.find_datasets(str(colours))
    saver, state = Checkpoints(folder, 1), {"step": 3, "data_fingerprint": open_dataset(source.data).fingerprint}
    saver.save(3, dict(clip.tower().state_dict()), {}, state)
    saver.wait()
    return folder


@pytest.fixture
def others(tmp_path):
    """A dataset that no run has seen, with prompts of its own."""
    folder = write(tmp_path / "others", 16, size=(8, 8))
    (folder / "zeroshot_classification_templates.txt").write_text(OWN)
    return folder


def lines(entry, check):
    return [line for line in entry["health"] if line["check"] == check]


@pytest.mark.parametrize("part", ["", "start", "checkpoints/step-3", "checkpoints/latest"])
def test_a_run_is_evaluated_with_the_prompts_it_was_trained_with(run, others, measure, part, capsys):
    found = measure(others, model=run / part, attacks=("pgd",), iters=1)
    (entry,) = found["datasets"]
    assert entry["templates"] == ["the colour {}", "all {}"] and entry["templates_from"] == "of the run's training"
    table.show(found)
    assert "prompts: 'the colour {}' and 1 more (of the run's training)\n" in capsys.readouterr().out


def test_prompts_that_are_asked_for_come_before_a_runs_own(run, others, measure, tmp_path):
    (entry,) = measure(others, model=run, attacks=("pgd",), iters=1, templates=("one {}",))["datasets"]
    assert (entry["templates"], entry["templates_from"]) == (["one {}"], "as asked for")
    (entry,) = measure(others, tmp_path / "o", model=run, attacks=("pgd",), iters=1, datasets_prompts=True)["datasets"]
    assert (entry["templates"], entry["templates_from"]) == (["a picture, {}"], "the dataset's own")


def test_the_training_data_of_a_run_is_told_by_what_it_holds_wherever_it_lies(run, colours, others, measure, tmp_path):
    elsewhere = write(tmp_path / "copied" / "colours", 48)
    for i, (data, status) in enumerate(((colours, "WARN"), (elsewhere, "WARN"), (others, "PASS"))):
        (entry,) = measure(data, tmp_path / str(i), model=run, attacks=("pgd",), iters=1)["datasets"]
        (line,) = lines(entry, "not the training data")
        assert line["status"] == status and ("was trained on" in line["detail"])
    (entry,) = measure(others, tmp_path / "none", model=run / "start", attacks=("pgd",), iters=1)["datasets"]
    assert lines(entry, "not the training data")[0]["status"] == "PASS"


def test_a_model_merged_of_a_run_is_evaluated_as_the_run_is(run, others, measure, tmp_path):
    """So that `mmtard compare` takes the two as they are, from any folder."""
    out = merge(Model(weights=str(run / "start")), Model(weights=str(run)), 0.5, tmp_path / "merged")
    (entry,) = measure(others, model=out, attacks=("pgd",), iters=1)["datasets"]
    assert entry["templates"] == ["the colour {}", "all {}"] and lines(entry, "not the training data")
    plain = merge(Model(weights=str(run / "start")), Model(weights=str(out)), 0.5, tmp_path / "of start")
    assert trained_with(Model(weights=str(plain))).run == run
    circle = {part: {"folder": f"{out}/../of start"} for part in "ab"}
    (plain / "merged.json").write_text(json.dumps(circle))
    assert trained_with(Model(weights=str(plain))) is None
    (plain / "merged.json").write_text("{}")  # as mmtard wrote it before
    assert trained_with(Model(weights=str(plain))) is None


def test_a_model_that_is_no_run_says_nothing_of_its_training(exported, others, measure):
    assert trained_with(Model(weights=str(exported))) is None and trained_with(Model(weights="openai")) is None
    (entry,) = measure(others, attacks=("pgd",), iters=1)["datasets"]
    assert entry["templates_from"] == "the dataset's own" and not lines(entry, "not the training data")


def test_prompts_of_a_run_that_are_gone_are_asked_for(run, others, measure):
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["data"]["templates"] = "gone/prompts.txt"
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(
        UserError, match="the prompts it was trained with cannot be read .*; name them with --templates"
    ):
        measure(others, model=run)
