"""`mmtard.evaluate` and `mmtard.train`: what the command line does, from a program that goes on afterwards."""

import json
import os
import re
import signal
import threading

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

import mmtard
from mmtard.errors import RunError, UserError
from mmtard.evaluation import python_call, results

MEANS = {"protocol": "quick", "eps": "4/255", "iters": 2, "n_samples": "all", "workers": 0, "say": lambda *_: None}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images of two colours in class folders."""
    folder = tmp_path_factory.mktemp("data") / "colours"
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 200, (20, 20, 3), dtype=np.uint8)
            pixels[..., channel] += 55
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def caches_go_elsewhere(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def without_times(results):
    text = json.dumps(results["datasets"])
    return json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds"})


def test_a_wrapped_open_clip_model_is_measured_as_its_exported_folder(open_clip_model, root, tmp_path):
    model = mmtard.load(open_clip_model, arch="tests-vit")
    before = dict(os.environ)
    ours = mmtard.evaluate(model, root, out=tmp_path / "a", norm="Linf", attacks="apgd-ce", **MEANS)
    assert not dist.is_initialized() and dict(os.environ) == before
    assert results.read(tmp_path / "a") == ours
    model.clip.save(tmp_path / "exported")
    folder = mmtard.evaluate(tmp_path / "exported", root, out=tmp_path / "b", attacks=["apgd-ce"], **MEANS)
    assert without_times(ours) == without_times(folder)
    (dataset,) = ours["datasets"]
    assert (
        dataset["classes"] == ["cat", "dog"]
        and list(dataset["eps"]) == ["4/255"]
        and len(dataset["samples"]["ids"]) == 12
    )
    assert ours["settings"]["norm"] == "linf" and ours["settings"]["attacks"] == ["apgd-ce"]


def test_a_group_that_the_program_is_in_already_is_left_as_it_is(vit, root, tmp_path, ranks):
    results = mmtard.evaluate("random", root, arch=vit, out=tmp_path, attacks="pgd", device="cpu", **MEANS)
    assert results["datasets"][0]["n_total"] == 12 and dist.is_initialized()
    assert ranks.sum([1.0]) == [1.0]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"protocol": "nips"}, "unknown protocol 'nips'; known: .*fare"),
        ({"eps": 8}, "^eps: 8 lets an attack replace the whole image"),
        ({"norm": "L2", "eps": None}, "^norm: the radii of 'quick' are linf's, not l2's; give its own with eps"),
        ({"attacks": ["transfer"]}, "^attacks: 'transfer' needs .*; name it with transfer_from"),
        ({"eps": "x"}, "eps: 'x' is not a fraction"),
        ({"eps": ["2/255", None]}, "eps: None is not a number"),
        ({"norm": "foo"}, "norm: 'foo' is not known"),
        ({"steps": 3}, "unknown setting of an evaluation 'steps'; known: attacks, independent_radii, iters"),
        ({"n_samples": "some"}, "n_samples: 'some' is no number"),
        ({"datasets": ["birds"]}, "unknown dataset in .* 'birds'"),
        ({"model": 3}, r"model: a int; give a source, or wrap an open_clip model with mmtard.load\(model\)"),
    ],
    ids=str,
)
def test_wrong_use_is_answered_before_anything_is_measured(change, message, model, root, tmp_path):
    given = {"model": model, "data": root, "out": tmp_path / "out", **MEANS, **change}
    with pytest.raises(UserError, match=message):
        mmtard.evaluate(given.pop("model"), given.pop("data"), **given)
    assert not (tmp_path / "out").exists() and not dist.is_initialized()


@pytest.mark.parametrize(
    "said,in_python",
    [
        ("model.arch: weights 'a' do not say; set it, e.g. arch: ViT-B-32", "arch: weights 'a' .* arch=\"ViT-B-32\"$"),
        ("--transfer-from.arch: set it, e.g. arch: RN50", 'transfer_arch: set it, e.g. transfer_arch="RN50"$'),
        ("--transfer-from.weights: '--x/y-z' is not here", "transfer_from: '--x/y-z' is not here$"),
        ("source.text: name it, e.g. text: openai", 'text: name it, e.g. text="openai"$'),
        ("model.text: name it, e.g. text: openai", r"model \(text of mmtard.load\): name it, e.g. text=\"openai\"$"),
        ("data.shards: missing shard 'a'", "data: missing shard 'a'$"),
        ("engine.device: 'cuda', but torch sees no GPU", "device: 'cuda', but torch sees no GPU$"),
        ("--out: 'a' is another set's; give --n-samples", "out: 'a' is another set's; give n_samples$"),
    ],
)
def test_errors_name_the_arguments_of_a_call(said, in_python):
    assert re.match(in_python, python_call.in_arguments(said)), python_call.in_arguments(said)


def test_a_model_wrapped_without_its_architecture_says_how_to_name_it(open_clip_model, root):
    with pytest.raises(UserError, match=r"name it: mmtard.load\(model, arch='ViT-B-32'\)"):
        mmtard.evaluate(mmtard.load(open_clip_model), root, **MEANS)


@pytest.fixture
def trained(monkeypatch):
    """The (config, interruption) of each training that would have begun; it sets what a real one leaves behind."""
    from mmtard.training import train

    begun = []

    def run(config, interruption):
        begun.append((config, interruption, signal.getsignal(signal.SIGINT)))
        os.environ |= {"RANK": "0", "DS_ACCELERATOR": "cpu"}
        return 0

    monkeypatch.setattr(train, "train", run)
    return begun


def test_training_leaves_signals_and_environment_to_the_program(trained, tree, write, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    before = signal.getsignal(signal.SIGINT)
    assert mmtard.train(tree) == 0
    assert mmtard.train(write(tree), ["train.steps=7"]) == 0
    assert [config.train.steps for config, *_ in trained] == [10, 7]
    assert all(handler == interruption._note for _, interruption, handler in trained)
    assert signal.getsignal(signal.SIGINT) is before and not {"RANK", "DS_ACCELERATOR"} & set(os.environ)


def test_training_runs_in_a_thread_too_where_no_handler_may_be_set(trained, tree):
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(mmtard.train(mmtard.config.validate(tree))))
    thread.start()
    thread.join()
    assert statuses == [0] and trained[0][2] is signal.getsignal(signal.SIGINT)


def test_what_training_cannot_begin_with_is_said_at_once(trained, tree, tmp_path):
    for config, overrides, message in (
        ("vitb32_mmtart", [], "unknown configuration 'vitb32_mmtart'; did you mean vitb32_mmtard"),
        ({**tree, "train": {"step": 3}}, [], "train.step"),
        (tree, ["train.steps=3"], "overrides: they belong to a file"),
        ({**tree, "data": {**tree["data"], "shards": str(tmp_path / "none")}}, [], "none"),
    ):
        with pytest.raises(UserError, match=message):
            mmtard.train(config, overrides)
    assert not trained


def test_a_run_that_may_not_be_started_again_is_refused(trained, tree, monkeypatch):
    from mmtard.runs import history

    monkeypatch.setattr(history, "why_not_restart", lambda run, resume: "it was started 20 times")
    with pytest.raises(RunError, match="it was started 20 times"):
        mmtard.train(tree)
    assert not trained
