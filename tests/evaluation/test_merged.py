"""What `mmtard merge` writes is evaluated, compared and exported as any other model is, by the commands themselves."""

import csv
import json

import numpy as np
import open_clip
import pytest
import torch
import yaml
from tiny_datasets import strip_seconds

from mmtard.config import Model
from mmtard.examples.pretrain import ARCHITECTURE
from mmtard.models import loading
from mmtard.runs.checkpoint_writer import Checkpoints

EPS = "1/255"


@pytest.fixture
def here(exported, colours, tmp_path, tree, monkeypatch):
    """The current folder, with `run`, whose checkpoint is another image tower than its start's."""
    monkeypatch.chdir(tmp_path)
    loading.load_clip(Model(weights=str(exported))).save(tmp_path / "run" / "start")
    tree["data"]["templates"] = ["the colour {}"]
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(tree))
    saver = Checkpoints(tmp_path / "run", 1)
    trained = loading.load_clip(Model(arch=str(ARCHITECTURE), weights="random"), seed=5)
    saver.save(3, dict(trained.tower().state_dict()), {}, {"step": 3})
    saver.wait()
    return tmp_path


@pytest.fixture
def evaluate(here, colours, command):
    """Call with a model: what `mmtard evaluate` wrote of it, where it writes when no folder is named."""

    def results_of(model):
        attack = ("--attacks", "pgd", "--iters", 2, "--eps", EPS)
        assert command("evaluate", model, "--data", colours, *attack, "--device", "cpu", "--workers", 0) == 0
        found = (json.loads(path.read_text()) for path in here.rglob("results.json"))
        (results,) = (one for one in found if one["model"]["weights"] == model)
        return results

    return results_of


def flags(results):
    (entry,) = results["datasets"]
    return {"": entry["samples"]["clean"], EPS: entry["samples"]["eps"][EPS]["robust"]}


def measured(results):
    """Everything of the data but the times, and the folder of the run that a line of health names."""
    (entry,) = strip_seconds(results["datasets"])
    return {key: value for key, value in entry.items() if key != "health"}


def test_a_merged_model_is_evaluated_and_compared_as_the_models_it_lies_between(here, evaluate, command, capsys):
    for weight, name in ((0, "none"), (0.5, "half"), (1, "all")):
        assert command("merge", "run/start", "run", "--weight", weight, f"merged/{name}") == 0
    start, run, none, half, whole = map(evaluate, ("run/start", "run", "merged/none", "merged/half", "merged/all"))
    assert measured(none) == measured(start) and none["model"]["sha256"] == start["model"]["sha256"]
    assert measured(whole) == measured(run) and whole["model"]["sha256"] == run["model"]["sha256"]
    assert half["datasets"][0]["templates"] == ["the colour {}"], "the run's own"
    assert all(flags(half)[eps] not in (flags(start)[eps], flags(run)[eps]) for eps in ("", EPS))

    capsys.readouterr()
    models = {"run": run, "half": half, "all": whole}
    assert command("compare", "run", "merged/half", "merged/all", "--csv", "table.csv") == 0
    printed = capsys.readouterr()
    said, warned = printed.out.splitlines(), printed.err
    assert "warning" not in warned
    rows = {(row["model"], row["eps"]): row for row in csv.DictReader((here / "table.csv").open())}
    assert rows.keys() == {(name, eps) for name in models for eps in ("", EPS)}
    for (name, eps), row in rows.items():
        ours, theirs = np.array(flags(models[name])[eps]), np.array(flags(run)[eps])
        assert float(row["accuracy"]) == ours.mean() and here.joinpath(row["results"]).is_file()
        assert any(f"│ {name} " in line and f" {100 * ours.mean():.2f} " in line for line in said)
        if name != "run":
            assert float(row["difference"]) == pytest.approx(ours.mean() - theirs.mean())
            assert (int(row["only_first"]), int(row["only_this"])) == ((theirs & ~ours).sum(), (ours & ~theirs).sum())
    assert float(rows["all", EPS]["mcnemar_p"]) == 1 and rows["all", EPS]["only_this"] == "0"
    assert any(line.startswith("half: evaluations/") for line in said), "where its numbers stand"

    assert command("merge", "run/start", "run", "--weight", 0.4, "merged/half") == 0
    assert command("compare", "run", "merged/half", "merged/all") == 0
    (warned,) = capsys.readouterr().err.splitlines()
    assert warned.startswith("warning: 'merged/half' holds other weights now than those measured in ")
    assert warned.endswith("/results.json; `mmtard evaluate merged/half` measures them")


def test_a_merged_model_is_exported_as_it_is_and_its_card_says_what_it_is(here, evaluate, command):
    assert command("merge", "run/start", "run", "--weight", 0.25, "merged/quarter") == 0
    accuracy = evaluate("merged/quarter")["datasets"][0]["clean"]["accuracy"]
    assert command("export", "merged/quarter", "exported") == 0
    images, text = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), ["red", "blue"]

    def embedded(folder):
        model = open_clip.create_model(f"local-dir:{folder}").eval()
        with torch.no_grad():
            return model.encode_image(images), model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(text))

    assert all(map(torch.equal, embedded("exported"), embedded("merged/quarter")))
    tower = torch.load("exported/image_tower.pt", weights_only=True)
    a, b = (loading.load_clip(Model(weights=end)).model.visual.state_dict() for end in ("run/start", "run"))
    for name, value in tower.items():
        torch.testing.assert_close(value, 0.75 * a[name] + 0.25 * b[name])
    assert tower.keys() == a.keys()
    card = (here / "exported" / "README.md").read_text()
    assert "\nmmtard merge run/start run --weight 0.25 OUT\n" in card and "Not by a run of mmtard" not in card
    (result,) = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(100 * accuracy, 2), "of exactly these weights"
