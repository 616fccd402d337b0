"""`mmtard bench evaluate`: both libraries on the same samples, counted from outside, as a table and as JSON."""

import json

import pytest
import torch
from torch import nn

from mmtard.attacks.state import AttackSettings
from mmtard.benchmarks.evaluate import SUITES, EvaluationBenchmark
from mmtard.distributed.progress import WorkProgress
from mmtard.errors import UserError

SETTINGS = AttackSettings(eps=0.006, iters=4, queries=6, targets=2)


@pytest.fixture(scope="module")
def found():
    """(what `compare` found, the sizes of all batches that the model was given, by suite)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(196, 5)).requires_grad_(False)
    images = torch.rand(24, 3, 16, 16)
    labels = net(images).argmax(1)
    asked = []

    def model(x):
        asked.append(len(x))
        return net(x)

    said = []
    bench = EvaluationBenchmark(SETTINGS, say=lambda line: said.append((line, sum(asked))))
    return bench.run(model, images, labels, compiled=model), said


def test_both_attack_the_same_samples_and_every_pass_is_counted(found):
    report, said = found
    suites = report.numbers["suites"]
    names = [suite.name for suite in SUITES.values()]
    assert list(suites) == [row for name in names for row in (name, f"{name}, compiled")]
    assert report.numbers["samples"] == 24
    before = None
    for (line, total), name in zip(said, names):
        suite, compiled = suites[name], suites[f"{name}, compiled"]
        assert line.startswith(f"{name}: mmtard")
        assert compiled["mmtard"]["passes"] == suite["mmtard"]["passes"] and compiled["standing"] == suite["standing"]
        counted = 2 * suite["mmtard"]["passes"] + suite["pyautoattack"]["passes"]
        if before is not None:
            assert total - before == counted
        before = total
        assert suite["mmtard"]["passes"] < suite["pyautoattack"]["passes"], "what has fallen is asked no more"
        assert suite["flags_differ"] <= 3 and 0 < suite["standing"] < 24
        assert suite["ratio"] == suite["pyautoattack"]["seconds"] / suite["mmtard"]["seconds"] > 0


def test_robustvlms_restarts_are_theirs_alone(found):
    fare, robustvlm = (found[0].numbers["suites"][SUITES[name].name] for name in ("fare", "robustvlm"))
    assert fare["mmtard"]["passes"] == robustvlm["mmtard"]["passes"]
    assert robustvlm["pyautoattack"]["passes"] > fare["pyautoattack"]["passes"]


def test_the_command_prints_a_table_and_writes_it(exported, colours, tmp_path, capsys, command, monkeypatch):
    told = {"part": [], "say": [], "advance": []}
    for name, calls in told.items():
        monkeypatch.setattr(WorkProgress, name, lambda self, *given, calls=calls: calls.append(given))
    out = tmp_path / "bench.json"
    means = ["--n-samples", 8, "--iters", 2, "--suites", "fare", "--eps", "1/255", "--device", "cpu"]
    assert not command(
        "bench", "evaluate", exported, "--data", colours, "--against", "pyautoattack", *means, "--out", out
    )
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    assert "flags differ" in printed and f"written to {out}" in printed.replace("\n", "")
    assert written["samples"] == 8 and written["suites"].keys() == {"fare"} and written["settings"]["iters"] == 2
    assert told["say"] == [(f"fare, {library}: round 1 of 1",) for library in ("mmtard", "pyautoattack")]
    [(_, total)] = told["part"]
    assert sum(amount for (amount,) in told["advance"]) == total and len(told["advance"]) > 4


def test_a_suite_that_needs_more_classes_is_refused_before_anything_is_timed():
    asked = []
    with pytest.raises(UserError, match="--suites: 'standard' needs .* 4 classes, there are 3; give data"):
        EvaluationBenchmark(SETTINGS, say=asked.append).run(
            lambda x: x.flatten(1)[:, :3], torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
        )
    assert not asked


def test_what_is_wrong_is_told_in_the_commands_own_flags(colours, command, capsys):
    assert command("bench", "evaluate", "openai", "--data", colours) == 2
    assert "mmtard: --arch: weights 'openai' do not name their architecture; set it" in capsys.readouterr().err
    assert command("bench", "evaluate", "openai", "--data", "nowhere") == 2
    assert "mmtard: --data: missing shard 'nowhere'" in capsys.readouterr().err
